import math
import random
import statistics
import time

import pytest
from scipy import stats

from shiftrm.core.discrimination import (
    absolute_differences,
    auc,
    calibration_curve,
    calibration_error,
    correlation,
    difference_variance,
    pair_accuracy,
    pair_rank_correlation,
    rank_correlation,
)
from shiftrm.measure.judges.win_rates import win_tie_lose


def test_pair_accuracy_by_hand():
    # right, wrong, gold tie (left out), reward tie (half), right
    accuracy, n = pair_accuracy([1.0, -2.0, 5.0, 0.0, -0.1], [2.0, 0.5, 0.0, 1.0, -3.0])
    assert (accuracy, n) == (2.5 / 4, 4)


def test_a_blind_model_scores_one_half():
    assert pair_accuracy([0.0] * 10, [1.0] * 10) == (0.5, 10)


def test_no_pair_left_is_not_a_number():
    assert pair_accuracy([1.0], [0.0]) == (None, 0)


def test_accuracy_ignores_scale_and_variance_does_not():
    differences, gold = [0.3, -0.2, 0.9], [1.0, 1.0, 1.0]
    doubled = [2 * d for d in differences]
    assert pair_accuracy(doubled, gold) == pair_accuracy(differences, gold)
    pairs = [(d, 0.0) for d in differences]
    assert difference_variance([(2 * a, b) for a, b in pairs]) == pytest.approx(
        4 * difference_variance(pairs)
    )


def test_difference_variance_by_hand():
    assert difference_variance([(1.0, 3.0), (2.0, 1.0)]) == pytest.approx((4 + 1) / 2)
    assert absolute_differences([(1.0, 3.0), (2.0, 1.0)]) == [2.0, 1.0]
    with pytest.raises(ValueError, match="no pairs"):
        difference_variance([])


def test_win_tie_lose_by_hand():
    shares = win_tie_lose([3.0, 1.0, 1.2, 0.0], [1.0, 3.0, 1.0, 0.25], tie_margin=0.25)
    assert shares == pytest.approx((0.25, 0.5, 0.25))
    win, tie, lose = win_tie_lose([1.0, 2.0], [0.0, 5.0], tie_margin=0.0)
    assert win_tie_lose([0.0, 5.0], [1.0, 2.0], tie_margin=0.0) == (lose, tie, win)
    with pytest.raises(ValueError, match="no prompts"):
        win_tie_lose([], [], tie_margin=0.0)


def test_auc_by_hand():
    # 3 x 2 comparisons: 1 beats 0, ties 1; 2 beats both; 0 ties 0, loses to 1
    assert auc([1.0, 2.0, 0.0], [0.0, 1.0]) == (1 + 0.5 + 1 + 1 + 0.5 + 0) / 6
    assert auc([1.0], [1.0]) == 0.5
    assert auc([2.0, 3.0], [1.0]) == 1.0
    assert math.isnan(auc([math.nan], [1.0]))
    assert auc([math.inf], [1e300]) == 1.0
    for empty in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="at least one"):
            auc(*empty)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_all_comparisons(seed):
    """Against the definition, with many ties."""
    rng = random.Random(seed)
    chosen = [rng.randint(-3, 5) / 4 for _ in range(rng.randint(1, 40))]
    rejected = [rng.randint(-5, 3) / 4 for _ in range(rng.randint(1, 40))]
    wins = [1.0 if c > r else 0.5 if c == r else 0.0 for c in chosen for r in rejected]
    assert auc(chosen, rejected) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auc(rejected, chosen) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-12)
    cubed = auc([c**3 for c in chosen], [r**3 for r in rejected])
    assert cubed == auc(chosen, rejected), "only the order matters"


def test_calibration_error_by_hand():
    """sigmoid(ln 3) = 0.75 (bin 5 of 10), sigmoid(ln 9) = 0.9 (bin 8): right 2 of 4, and 1 of 1."""
    three, nine = math.log(3.0), math.log(9.0)
    differences = [three, three, -three, -three, nine]
    expected = 4 / 5 * abs(0.75 - 0.5) + 1 / 5 * abs(0.9 - 1.0)
    assert calibration_error(differences) == pytest.approx(expected)
    # in one bin: mean confidence 0.78, right 3 of 5
    assert calibration_error(differences, bins=1) == pytest.approx(0.78 - 0.6)
    confidence, correct, count = calibration_curve(differences)
    assert (correct.tolist(), count.tolist()) == ([0.5, 1.0], [4.0, 1.0])
    assert confidence.tolist() == pytest.approx([0.75, 0.9])


def test_calibration_at_the_ends():
    assert calibration_error([0.0] * 3) == 0.0, "a blind model says 0.5 and is half right"
    assert calibration_error([1000.0, 1e308]) == 0.0
    assert calibration_error([-1000.0]) == 1.0
    assert math.isnan(calibration_error([math.nan, 1.0]))
    with pytest.raises(ValueError, match="no pairs"):
        calibration_error([])
    with pytest.raises(ValueError, match="bins is 0"):
        calibration_error([1.0], bins=0)


def plain_calibration_error(differences, bins):
    members = [[] for _ in range(bins)]
    for d in differences:
        stated = 1 / (1 + math.exp(-abs(d)))
        for b in range(bins):
            low, high = 0.5 + b * 0.5 / bins, 0.5 + (b + 1) * 0.5 / bins
            if low <= stated < high or (b == bins - 1 and stated == 1.0):
                members[b].append((stated, 0.5 if d == 0 else float(d > 0)))
    total = 0.0
    for inside in filter(None, members):
        total += abs(sum(s for s, _ in inside) - sum(c for _, c in inside)) / len(differences)
    return total


@pytest.mark.parametrize("bins", [1, 4, 10, 13])
def test_calibration_error_against_a_plain_loop(bins):
    rng = random.Random(bins)
    differences = [rng.gauss(0.4, 1.5) for _ in range(300)] + [0.0] * 7 + [40.0]
    assert calibration_error(differences, bins=bins) == pytest.approx(
        plain_calibration_error(differences, bins), abs=1e-12
    )


def test_a_model_that_tells_the_truth_is_calibrated():
    rng = random.Random(0)
    size = [abs(rng.gauss(0, 2)) for _ in range(40_000)]
    told = [d if rng.random() < 1 / (1 + math.exp(-d)) else -d for d in size]
    assert calibration_error(told) < 0.01
    assert calibration_error([3 * d for d in told]) > 0.05, "three times too sure"


def test_correlation_by_hand():
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 2.0, 3.0], [1.0, 0.0, -1.0]) == pytest.approx(-1.0)
    assert correlation([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]) == pytest.approx(0.0)
    # x - 2 = (-1, 0, 1), y - 5/3 = (-2/3, 4/3, -2/3): covariance 0
    assert correlation([1.0, 2.0, 3.0], [1.0, 3.0, 1.0]) == pytest.approx(0.0)


def test_correlation_with_a_constant_is_none():
    for constant in (0.0, 0.1, 1e300):
        assert correlation([constant] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) is None
        assert correlation([1.0, 2.0], [constant] * 2) is None
    assert correlation([], []) is None
    assert correlation([1.0], [2.0]) is None
    assert math.isnan(correlation([1.0, math.nan], [1.0, 2.0]))
    with pytest.raises(ValueError, match="x has 1 values and y 2"):
        correlation([1.0], [1.0, 2.0])


def test_correlation_of_values_that_hardly_differ():
    step = 2.0**-52
    assert correlation([1.0, 1.0 + step, 1.0 + 2 * step], [0.0, 1.0, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_correlation_against_the_standard_library(scale):
    rng = random.Random(1)
    x = [rng.gauss(5, 2) for _ in range(200)]
    y = [0.3 * a + rng.gauss(0, 1) for a in x]
    expected = statistics.correlation(x, y)
    assert correlation([scale * a for a in x], y) == pytest.approx(expected, abs=1e-9)
    assert correlation(y, [-scale * a for a in x]) == pytest.approx(-expected, abs=1e-9)


def test_a_hundred_thousand_pairs_take_no_time():
    rng = random.Random(2)
    chosen = [rng.gauss(0.5, 1) for _ in range(100_000)]
    rejected = [rng.gauss(0, 1) for _ in range(100_000)]
    start = time.process_time()
    value = auc(chosen, rejected)
    calibration_error([c - r for c, r in zip(chosen, rejected, strict=True)])
    correlation(chosen, rejected)
    assert time.process_time() - start < 2.0, "quadratic would take minutes"
    # N(0.5, 1) over N(0, 1): Phi(0.5 / sqrt 2)
    assert value == pytest.approx(statistics.NormalDist().cdf(0.5 / math.sqrt(2)), abs=0.005)


def test_rank_correlation_by_hand_and_against_scipy():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [-1, -20, -300]) == pytest.approx(-1)
    rng = random.Random(0)
    x = [rng.randint(0, 9) for _ in range(50)]  # with ties
    y = [a + rng.randint(0, 9) for a in x]
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert math.isnan(rank_correlation([1.0, math.nan], [1.0, 2.0]))
    with pytest.raises(ValueError, match="x has 1 values and y 2"):
        rank_correlation([1.0], [1.0, 2.0])


def test_pair_rank_correlation_does_not_depend_on_the_order_in_a_pair():
    rng = random.Random(0)
    ours = [rng.gauss(0, 1) for _ in range(40)]
    gold = [a + rng.gauss(0, 1) for a in ours]
    found, n = pair_rank_correlation(ours, gold)
    signs = [rng.choice((-1, 1)) for _ in ours]
    other, _ = pair_rank_correlation(
        [s * a for s, a in zip(signs, ours, strict=True)],
        [s * b for s, b in zip(signs, gold, strict=True)],
    )
    assert n == 40
    assert found == pytest.approx(other, abs=1e-12)
    both = stats.spearmanr(ours + [-a for a in ours], gold + [-b for b in gold]).statistic
    assert found == pytest.approx(both)
    assert pair_rank_correlation([2.0, -1.0], [5.0, -0.1])[0] == pytest.approx(1.0)
    assert pair_rank_correlation([2.0, -1.0], [-5.0, 0.1])[0] == pytest.approx(-1.0)
    # A pair of equal gold is left out; a constant reward has no order.
    assert pair_rank_correlation([2.0, -1.0, 9.0], [5.0, -0.1, 0.0]) == (pytest.approx(1.0), 2)
    assert pair_rank_correlation([0.0, 0.0], [1.0, 2.0]) == (None, 2)
    assert pair_rank_correlation([1.0], [0.0]) == (None, 0)
