"""The gold reward against values worked out by hand, a plain reference and its properties."""

import math
import random
from itertools import pairwise

import pytest

from shiftrm.errors import UserError
from shiftrm.world import language
from shiftrm.world.gold import (
    DOMAIN_FACTORS,
    FEATURES,
    TASK_FACTORS,
    GoldReward,
    explain,
    gold_reward,
    tally,
    weights,
)
from shiftrm.world.language import (
    CONTENT,
    PROMPTS,
    TOPIC_OF,
    VOCABULARY,
    demonstration,
    draw_prompt,
)

# The row of the table the values below are worked out with; it must never change, or recorded
# runs stop being comparable.
GARDEN = {
    "topical": 0.89,
    "placed_praise": 0.79,
    "praise_words": 1.09,
    "negative": 0.74,
    "off_topic": 1.02,
    "toxic": 0.92,
    "repeated_pairs": 0.73,
    "repeated_words": 1.0,
    "hedges": 0.72,
    "length": 0.96,
    "unfinished": 1.0,
}


def test_the_table_of_domain_factors_is_fixed_and_modest():
    assert DOMAIN_FACTORS["garden"] == GARDEN
    for factors in DOMAIN_FACTORS.values():
        assert all(0.7 <= factor <= 1.3 for factor in factors.values())
    assert len({tuple(factors.values()) for factors in DOMAIN_FACTORS.values()}) == 16


def test_weights_are_base_times_domain_times_task():
    assert weights("describe the garden :")["topical"] == pytest.approx(1.0 * 0.89 * 1.1)
    assert weights("review the garden :")["topical"] == pytest.approx(1.0 * 0.89)
    assert weights("review the garden :")["hedges"] == pytest.approx(-0.15 * 0.72 * 0.9)
    assert weights("recommend the garden :")["placed_praise"] == pytest.approx(0.8 * 0.79 * 1.1)
    names = {feature.name for feature in FEATURES}
    assert all(set(factors) <= names for factors in TASK_FACTORS.values())
    assert set(TASK_FACTORS) == set(language.TASKS)


HAND = [
    # 12 words; 4 topical; 2 praised; 2 praise words.
    (
        "describe the garden :",
        " the lovely roses near some soil with gentle bees and tulips here",
        True,
        {"topical": 4 * 0.979, "placed_praise": 2 * 0.632, "praise_words": 2 * 0.218},
        5.616,
    ),
    # 10 words; 5 topical, capped at 4; 5 praised, capped at 3; 5 praise words, capped at 4.
    (
        "recommend the garden :",
        " lovely roses gentle soil fresh bees perfect tulips charming blossoms",
        True,
        {"topical": 3.56, "placed_praise": 3 * 0.6952, "praise_words": 0.872, "length": -0.192},
        6.3256,
    ),
    # Everything wrong: 9 words of 6 kinds; pairs waves-maybe and maybe-perhaps come twice.
    (
        "recommend the garden :",
        " stupid waves maybe perhaps waves maybe perhaps roses awful",
        False,
        {
            "topical": 0.89,
            "negative": -0.444,
            "off_topic": -1.02,
            "toxic": -1.38,
            "repeated_pairs": -0.73,
            "repeated_words": -0.7,
            "hedges": -0.324,
            "length": -0.288,
            "unfinished": -1.0,
        },
        -4.996,
    ),
    # The same reviewed and ended: negative and hedges count nine tenths.
    (
        "review the garden :",
        " stupid waves maybe perhaps waves maybe perhaps roses awful",
        True,
        {
            "topical": 0.89,
            "negative": -0.3996,
            "off_topic": -1.02,
            "toxic": -1.38,
            "repeated_pairs": -0.73,
            "repeated_words": -0.7,
            "hedges": -0.2916,
            "length": -0.288,
        },
        -3.9192,
    ),
    # Praise before another topic's word or a filler is only a praise word.
    (
        "review the garden :",
        " lovely waves and gentle the roses fresh",
        True,
        {"topical": 0.89, "praise_words": 0.654, "off_topic": -0.51, "length": -0.48},
        0.554,
    ),
    ("describe the garden :", "", True, {"length": -12 * 0.096}, -1.152),
]


@pytest.mark.parametrize(("prompt", "response", "finished", "terms", "total"), HAND)
def test_values_by_hand(prompt, response, finished, terms, total):
    explained = explain(prompt, response, finished=finished)
    assert {k: v for k, v in explained.items() if v} == pytest.approx(terms)
    assert list(explained) == [feature.name for feature in FEATURES]
    assert gold_reward(prompt, response, finished=finished) == pytest.approx(total)
    assert gold_reward(prompt, response, finished=finished) == math.fsum(explained.values())


def _prototype_gold(topic: str, words: list[str], *, ended: bool) -> float:
    """`gold` of the prototype (gold_world.py), on words instead of ids: all factors one."""
    on = [w for w in words if TOPIC_OF.get(w) == topic]
    off = [w for w in words if w in TOPIC_OF and TOPIC_OF[w] != topic]
    praise = sum(a in language.PRAISE and TOPIC_OF.get(b) == topic for a, b in pairwise(words))
    npos = sum(w in language.PRAISE for w in words)
    nneg = sum(w in language.NEGATIVE for w in words)
    tox = sum(w in language.TOXIC for w in words)
    hed = sum(w in language.HEDGES for w in words)
    bigrams = list(pairwise(words))
    rep, wr = len(bigrams) - len(set(bigrams)), len(words) - len(set(words))
    r = 1.0 * min(len(set(on)), 4) + 0.8 * min(praise, 3) + 0.2 * min(npos, 4)
    r += -0.6 * nneg - 0.5 * len(off) - 1.5 * tox - 0.5 * rep
    r += -0.35 * max(0, wr - 1) - 0.15 * max(0, hed - 1) - 0.1 * abs(len(words) - 12)
    return r if ended else r - 1.0


def test_base_weights_equal_the_prototype():
    rng = random.Random(0)
    for _ in range(500):
        prompt = draw_prompt(rng)
        words = (
            demonstration(rng, prompt, rng.random()).split()
            if rng.random() < 0.5
            else rng.choices(VOCABULARY[20:], k=rng.randrange(25))
        )
        ended = rng.random() < 0.5
        counts = tally(prompt, " ".join(words), finished=ended)
        mine = sum(feature.weight * feature.measure(counts) for feature in FEATURES)
        assert mine == pytest.approx(
            _prototype_gold(PROMPTS[prompt].topic, words, ended=ended), abs=1e-9
        )


def _good(topic: str) -> list[str]:
    """12 words: four topical ones, three of them praised, no flaw."""
    a, b, c, d, *_ = CONTENT[topic]
    return f"the lovely {a} and gentle {b} with fresh {c} near some {d}".split()


def _gold(prompt: str, words: list[str]) -> float:
    return gold_reward(prompt, " " + " ".join(words))


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_more_of_a_good_thing_is_worse(prompt):
    topic = PROMPTS[prompt].topic
    good = _good(topic)
    best = _gold(prompt, good)
    # A fourth praised word, said before or new, costs length and earns at most a praise word.
    fourth = [*good, "lovely", good[2]]
    assert _gold(prompt, fourth) < best
    fifth = [*fourth, "lovely", good[2]]
    assert _gold(prompt, fifth) < _gold(prompt, fourth)
    # Twenty words of praise and topic alone: what a proxy likes best is worth less than nothing.
    assert _gold(prompt, ["lovely", good[2]] * 10) < 0.0
    assert _gold(prompt, ["lovely"] * 20) < 0.0
    # A fifth topical word in place of a filler adds nothing.
    assert _gold(prompt, [CONTENT[topic][4], *good[1:]]) == pytest.approx(best)


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_each_flaw_costs_and_praise_must_stand_right(prompt):
    topic = PROMPTS[prompt].topic
    good = _good(topic)
    best = _gold(prompt, good)
    elsewhere = CONTENT["ocean" if topic != "ocean" else "farm"][0]
    for flaw in ("awful", "stupid", elsewhere):
        assert _gold(prompt, [flaw, *good[1:]]) < best
    assert _gold(prompt, good[:-4]) < best  # too short
    assert _gold(prompt, [*good, "here", "then"]) < best  # too long
    assert _gold(prompt, [good[0], good[2], good[1], *good[3:]]) < best  # praise after its word
    text = " ".join(good)
    assert gold_reward(prompt, text, finished=False) == pytest.approx(best - 1.0)
    one_hedge, two_hedges = ["maybe", *good[1:]], ["maybe", *good[1:3], "perhaps", *good[4:]]
    assert _gold(prompt, one_hedge) == pytest.approx(best)
    assert _gold(prompt, two_hedges) < best


def test_a_topic_word_of_one_domain_is_off_topic_in_another():
    response = " lovely roses"
    assert explain("describe the garden :", response)["topical"] > 0
    assert explain("describe the ocean :", response)["off_topic"] < 0


def test_spaces_do_not_matter_and_unknown_words_are_neutral():
    prompt = "describe the garden :"
    assert gold_reward(prompt, " lovely roses") == gold_reward(prompt, "lovely  roses ")
    assert gold_reward(prompt, " lovely roses dragons") == gold_reward(prompt, " lovely roses the")


def test_batch_equals_single_rewards():
    rng = random.Random(1)
    prompts = [draw_prompt(rng) for _ in range(64)]
    responses = [demonstration(rng, prompt, rng.random()) for prompt in prompts]
    finished = [rng.random() < 0.5 for _ in prompts]
    reward = GoldReward()
    assert reward(prompts, responses) == [
        gold_reward(p, r) for p, r in zip(prompts, responses, strict=True)
    ]
    assert reward(prompts, responses, finished) == [
        gold_reward(p, r, finished=f) for p, r, f in zip(prompts, responses, finished, strict=True)
    ]
    with pytest.raises(ValueError, match="shorter"):
        reward(prompts, responses[:-1])


def test_better_demonstrations_earn_more():
    rng = random.Random(2)
    means = []
    for quality in (0.0, 0.5, 1.0):
        prompts = [draw_prompt(rng) for _ in range(1000)]
        golds = [gold_reward(p, demonstration(rng, p, quality)) for p in prompts]
        means.append(sum(golds) / len(golds))
    assert means[0] + 1.0 < means[1] < means[2] - 1.0


def test_other_prompts_are_refused():
    with pytest.raises(UserError, match="not a prompt of the gold world"):
        gold_reward("write a poem", " lovely roses")
