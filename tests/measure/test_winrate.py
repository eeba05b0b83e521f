"""Win rates against numbers worked out by hand, and what length control does."""

import math
from collections import Counter

import numpy as np
import pytest

from shiftrm.measure.judges.comparing import Comparison, JudgeAnswer, Verdict, of_both_orders
from shiftrm.measure.judges.length_control import fit_logistic, length_controlled_rate
from shiftrm.measure.judges.win_rates import headline, summarise, warnings


def read(prompt, first, second, ours="four", theirs="two"):
    """A verdict of a judge who read both orders; None is an answer without a verdict."""
    answers = tuple(JudgeAnswer("", x, "" if x else "empty") for x in (first, second))
    both = first is not None and second is not None
    return Verdict(
        Comparison(prompt, ours, theirs),
        of_both_orders(first, second) if both else None,
        answers,
        note="" if both else "empty",
    )


def scored(prompt, outcome, ours="four", theirs="two"):
    return Verdict(Comparison(prompt, ours, theirs), outcome, scores=(0.0, 0.0))


# -- rates -------------------------------------------------------------------------------------


def test_rates_by_hand():
    verdicts = [
        read("1", "A", "B", ours="12345678"),  # win
        read("2", "A", "B"),  # win
        read("3", "B", "A"),  # lose
        read("4", "A", "A"),  # tie: looked at the place
        read("5", "C", "C"),  # tie
        read("6", "A", "C"),  # tie: disagree
        read("7", "A", None),  # not counted
        Verdict(Comparison("8", "x", "x"), "tie", note="identical"),
    ]
    found = summarise(verdicts, judge="j")
    assert (found.asked, found.counted, found.identical) == (8, 7, 1)
    assert found.problems == {"empty": 1}
    assert [m.value for m in (found.win, found.tie, found.lose)] == pytest.approx(
        [2 / 7, 4 / 7, 1 / 7]
    )
    assert found.rate.value == pytest.approx((2 + 4 / 2) / 7)
    assert found.length_ours == pytest.approx((8 + 5 * 4 + 1) / 7)
    assert found.length_theirs == pytest.approx((6 * 3 + 1) / 7)
    # The answers of prompts 1 to 6: A B, A B, B A, A A, C C, A C.
    position = found.position
    assert (position.first, position.second, position.tie) == (6, 3, 3)
    assert position.first_share.value == pytest.approx(6 / 9)
    assert position.consistency.value == pytest.approx(4 / 6)


def test_the_interval_is_the_bootstraps():
    """Of n = 20 prompts, 13 wins: the draws are binomial, whose quantiles are known."""
    verdicts = [scored(str(i), "win" if i < 13 else "lose") for i in range(20)]
    found = summarise(verdicts, resamples=4000)
    wins = np.cumsum([math.comb(20, k) * 0.65**k * 0.35 ** (20 - k) for k in range(21)])
    low, high = (int(np.searchsorted(wins, q)) / 20 for q in (0.025, 0.975))
    assert (found.win.low, found.win.high) == pytest.approx((low, high), abs=0.0501)
    assert found.lose.low == pytest.approx(1 - found.win.high)
    assert found.position is None


def test_the_interval_by_enumeration():
    """Two prompts, one won and one lost: the draws are 0, 1/2, 1/2, 1, so the ends are 0 and 1."""
    found = summarise([scored("a", "win"), scored("b", "lose")])
    assert (found.win.value, found.win.low, found.win.high) == (0.5, 0.0, 1.0)
    [one] = [summarise([scored("a", "win")])]
    assert (one.win.value, one.win.low) == (1.0, None)


def test_equal_prompts_are_drawn_together():
    """Twice the same ten prompts say no more than ten prompts do."""
    once = [scored(str(i), "win" if i < 5 else "lose") for i in range(10)]
    found, twice = summarise(once), summarise(once + once)
    assert (twice.win.low, twice.win.high) == (found.win.low, found.win.high)
    assert twice.counted == 20


def test_nothing_counted():
    assert summarise([read("1", None, "A")]) is None
    with pytest.raises(ValueError, match="no verdicts"):
        summarise([])


# -- length control ----------------------------------------------------------------------------


def control(scores, differences, **options):
    prompts = [str(i) for i in range(len(scores))]
    options = {"resamples": 20, **options}
    return length_controlled_rate(scores, differences, prompts, **options)


def test_when_length_alone_decides_the_rate_is_one_half():
    differences = [-50, -30, -20, -10, 10, 20, 30, 50]
    found = control([0, 0, 0, 0, 1, 1, 1, 1], differences)
    assert found.value == pytest.approx(0.5, abs=1e-9)


def test_length_alone_decides_and_we_are_mostly_longer():
    """88 % of the prompts are won by length; a judge who pays for length only says one half."""
    rng = np.random.default_rng(0)
    raw, controlled = [], []
    for _ in range(30):
        d = rng.normal(1.0, 1.0, 200)
        y = (rng.random(200) < 1 / (1 + np.exp(-4 * np.tanh(d / d.std())))).astype(float)
        raw.append(y.mean())
        controlled.append(control(y.tolist(), d.tolist(), resamples=1).value)
    assert np.mean(raw) > 0.75
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.03)


def test_without_an_effect_of_length_the_rate_is_the_raw_one():
    differences = [-3, 3, -1, 1] * 5
    scores = [1, 1, 0, 0] + [1, 1, 1, 1] * 3 + [0.5, 0.5, 0, 0]
    found = control(scores, differences)
    assert found.value == pytest.approx(np.mean(scores), abs=1e-9)
    assert control([1, 0.5, 0.5], [0, 0, 0]).value == pytest.approx(2 / 3)


def test_sides_and_units():
    rng = np.random.default_rng(1)
    d = rng.normal(0.5, 1, 40)
    y = rng.integers(0, 3, 40) / 2
    found = control(y.tolist(), d.tolist()).value
    assert control((1 - y).tolist(), (-d).tolist()).value == pytest.approx(1 - found)
    assert control(y.tolist(), (1000 * d).tolist()).value == pytest.approx(found)


def test_wins_and_losses_without_exception():
    assert control([1, 1, 1], [5, -3, 1]).value == 1.0
    assert control([0, 0, 0], [5, -3, 1]).value == 0.0


def test_equal_differences_tell_nothing():
    assert control([1, 0, 1], [7, 7, 7]) is None
    assert control([1, 0, 1], [700, 701, 702]) is None
    verdicts = [scored(str(i), "win", ours="longer") for i in range(3)]
    assert summarise(verdicts).controlled is None


def test_one_side_longer_everywhere_is_said():
    longer = [scored("a", "win", "1234", "1"), scored("b", "lose", "123", "12")]
    assert summarise(longer).extrapolated
    assert not summarise([*longer, scored("c", "win", "1", "12")]).extrapolated
    assert not summarise([scored("a", "win", "12", "34")]).extrapolated


def test_the_fit_is_a_minimum():
    """Against the gradient of the loss in the docstring, by differences."""
    rng = np.random.default_rng(2)
    x, w = np.tanh(rng.normal(0.3, 1, 60)), rng.integers(0, 3, 60).astype(float)
    y = rng.integers(0, 3, 60) / 2

    def loss(theta, phi):
        p = 1 / (1 + np.exp(-(theta + phi * x)))
        return -(w * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum() + 0.35 * phi**2

    at = fit_logistic(y, x, w, ridge=0.7)
    for i in range(2):
        step = np.eye(2)[i] * 1e-4
        slope = (loss(*(at + step)) - loss(*(at - step))) / 2e-4
        assert slope == pytest.approx(0, abs=1e-5)


def test_the_fit_by_hand():
    """Saturated: two lengths, so that without ridge the fit goes through both shares."""
    x = np.array([-1.0] * 4 + [1.0] * 4)
    y = np.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    theta, phi = fit_logistic(y, x, np.ones(8), ridge=0.0)
    assert theta == pytest.approx(0.0, abs=1e-9)
    assert phi == pytest.approx(math.log(3))
    theta, phi = fit_logistic(y, x, np.repeat([1.0, 3.0], 4), ridge=0.0)
    assert (theta, phi) == pytest.approx((0.0, math.log(3)), abs=1e-6)


def test_sequences_must_fit():
    with pytest.raises(ValueError, match="must be as many"):
        length_controlled_rate([1.0], [1.0, 2.0], ["a"])


def test_reasons_are_counted():
    verdicts = [read(str(i), None, "A") for i in range(2)]
    verdicts.append(Verdict(Comparison("x", "a", "b"), None, note="cut off"))
    verdicts.append(scored("y", "win"))
    assert Counter(summarise(verdicts).problems) == {"empty": 2, "cut off": 1}


def test_a_few_prompts_that_agree_prove_nothing():
    few = summarise([scored(str(i), "win") for i in range(4)])
    assert (few.rate.low, few.rate.high) == (1.0, 1.0)  # the bootstrap knows no other outcome
    assert headline(few) == "No clear difference between ours and theirs."
    assert any("the interval has no width" in warning for warning in warnings(few))
    many = summarise([scored(str(i), "win") for i in range(6)])  # 2 / 2^6 = 0.03
    assert headline(many) == "Ours is better."
