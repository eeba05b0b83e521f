"""The free signals, with numbers by hand."""

import math

import numpy as np
import pytest

from shiftrm.errors import UserError
from shiftrm.monitor.signals import SIGNALS, Step, different, measure_step, pair_differences
from shiftrm.monitor.trends import flagged, trend


def row(prompt, responses, rewards, finished=None):
    ended = [True] * len(responses) if finished is None else finished
    return {"prompt": prompt, "responses": responses, "rewards": rewards, "finished": ended}


def words(prompts, responses, *, finished):
    """Words of the response that the prompt has, less a tenth of its length."""
    return [
        sum(word in p.split() for word in r.split()) - 0.1 * len(r.split())
        for p, r in zip(prompts, responses, strict=True)
    ]


def measure(name, groups, **about):
    step = Step(1, groups, words, **{"probe": groups, **about})
    return measure_step(step, [name]).get(name)


TWO = [row("a", ["x", "x y"], [0.0, 2.0]), row("b", ["u v", "u", "w"], [1.0, 1.0, 4.0])]


def test_spread_over_the_probe():
    # Within: (1 + 1 + 1 + 1 + 4) / (5 - 2) of TWO; the probe has half of the rewards.
    probe = [{**group, "rewards": [r / 2 for r in group["rewards"]]} for group in TWO]
    assert measure("spread", TWO) == pytest.approx(1.0)
    assert measure("spread", TWO, probe=probe) == pytest.approx(2.0)
    assert measure("spread", TWO, probe=()) is None


def test_level_in_spreads():
    higher = [{**group, "rewards": [r + 3 for r in group["rewards"]]} for group in TWO]
    assert measure("level", higher, probe=TWO) == pytest.approx(3 / math.sqrt(8 / 3))


def test_ties_and_equal_texts():
    groups = [row("a", ["x", "x", "y", "z"], [1.0, 1.0, 1.0, 2.0])]
    # Pairs of different texts: xy xy xz xz yz; equal rewards: the two of xy.
    assert measure("ties", groups) == pytest.approx(2 / 5)
    assert measure("same", groups) == pytest.approx(1 / 6)


def test_a_text_with_another_ending_is_another_response():
    i, j = different(["x", "x"], [True, False])
    assert (list(i), list(j)) == ([0], [1])
    assert pair_differences(row("a", ["x", "x"], [2.0, 1.0], [True, False])) == pytest.approx([1])


def test_saturation():
    groups = [row("a", ["x", "y", "z", "u"], [5.0, 4.99, 4.0, 0.0])]
    probe = [row("a", ["x", "y"], [0.0, math.sqrt(2.0)])]  # spread 1
    assert measure("saturation", groups, probe=probe) == pytest.approx(0.5)


def test_length_correlation_within_prompts():
    # Between prompts longer texts have lower rewards, within them higher ones.
    groups = [row("a", ["u", "u v"], [5.0, 6.0]), row("b", ["u v w x", "u v w x y"], [0.0, 1.0])]
    assert measure("length_correlation", groups) == pytest.approx(1.0)
    lengths, rewards = [1.0, 2.0, 4.0], [0.0, 3.0, 1.0]
    found = measure("length_correlation", [row("a", ["u", "u v", "u v w x"], rewards)])
    assert found == pytest.approx(np.corrcoef(lengths, rewards)[0, 1])


def test_texts():
    groups = [row("a", ["u v u v", "u v"], [0.0, 1.0], [True, False])]
    assert measure("length", groups) == pytest.approx(3.0)
    assert measure("repetition", groups) == pytest.approx((1 / 3 + 0) / 2)
    assert measure("phrases", groups) == pytest.approx(1 - 2 / 4)  # uv vu uv | uv
    assert measure("unfinished", groups) == pytest.approx(0.5)


def test_sight_tests_see_what_the_reward_sees():
    groups = [row(p, [f"{p} good one here now yes", f"{p} fine"], [1, 2]) for p in "abcd"]
    assert measure("sight_other_prompt", groups) == 1.0  # each response has its prompt's word
    blind = Step(1, groups, lambda p, r, *, finished: [0.0] * len(r), groups)
    assert measure_step(blind, ["sight_other_prompt"]) == {"sight_other_prompt": 0.5}
    short = [row("a", ["x", "y"], [0.0, 1.0])]
    assert measure("sight_cut", short) is None  # cannot be made


def test_disagreement():
    def second(prompts, responses, *, finished):
        return [{"x": 0.0, "y": 1.0, "z": 1.0}[text] for text in responses]

    groups = [row("a", ["x", "y", "z"], [2.0, 1.0, 3.0])]
    # xy: the other way round; xz: the same; yz: a tie of the second.
    assert measure("disagreement", groups, second=second) == pytest.approx(1.5 / 3)
    assert measure("disagreement", groups) is None


def test_chat_messages():
    prompt = [{"role": "user", "content": "say a"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("one two", "one")]
    groups = [row(prompt, answers, [1.0, 0.0])]
    assert measure("length", groups) == pytest.approx(1.5)
    assert measure("same", groups) == 0.0


@pytest.mark.parametrize("name", SIGNALS.names())
def test_nothing_breaks_on_little(name):
    for groups in ([], [row("a", [""], [0.0])], [row("a", ["", ""], [0.0, 0.0])]):
        value = measure(name, groups, second=words) if groups else 0.0
        assert value is None or math.isfinite(value)


def test_unknown_signal():
    with pytest.raises(UserError, match="unknown free signal 'sprea'"):
        measure("sprea", TWO)


# -- trends --------------------------------------------------------------------------------------


def test_trend_by_hand():
    found = trend([1.0, 3.0, 9.0, 4.0, 6.0], baseline=2, window=2)
    # Means 2 and 5, variances 2 and 2, so an error of sqrt(2/2 + 2/2).
    assert (found.start, found.now) == (2.0, 5.0)
    assert found.errors == pytest.approx(3 / math.sqrt(2))
    assert flagged("level", found, limit=2.0)
    assert not flagged("spread", found, limit=2.0)  # suspicious where it falls
    assert not flagged("level", found, limit=3.0)


def test_trend_needs_both_windows():
    assert trend([1.0, 2.0, 3.0], baseline=2, window=2) is None


def test_trend_of_constants():
    assert trend([1.0] * 4, baseline=2, window=2).errors == 0.0
    assert trend([0.0, 0.0, 1.0, 1.0], baseline=2, window=2).errors == 99.0


def test_trend_of_one_step():
    assert trend([0.0, 2.0, 5.0], baseline=2, window=1).errors == pytest.approx(4 / math.sqrt(3))
