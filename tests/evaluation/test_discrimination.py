import pytest

from shiftrm.evaluation.discrimination import (
    absolute_differences,
    difference_variance,
    pair_accuracy,
)
from shiftrm.evaluation.winrate import win_tie_lose


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
