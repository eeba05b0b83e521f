"""How well rewards separate responses: accuracy with labels, spread without.

Every function takes plain sequences of floats (lists, tuples, arrays). A NaN among the rewards
makes the result NaN.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = Sequence[float] | Floats


def pair_accuracy(
    differences: Sequence[float], gold_differences: Sequence[float]
) -> tuple[float | None, int]:
    """Share of pairs that the reward model orders as the gold reward does.

    Pairs with equal gold are ignored. Pairs with equal reward count one half, so that a constant
    model scores 0.5.

    Args:
        differences: r(first) - r(second), one per pair.
        gold_differences: the same of the gold reward, or +1 / -1 labels.

    Returns:
        The accuracy (None if no pair is left) and the number of pairs used.
    """
    correct, n = 0.0, 0
    for difference, gold in zip(differences, gold_differences, strict=True):
        if gold == 0:
            continue
        n += 1
        correct += 0.5 if difference == 0 else float((difference > 0) == (gold > 0))
    return (correct / n if n else None), n


def difference_variance(pairs: Sequence[Sequence[float]]) -> float:
    """Variance of r(x, s_1) - r(x, s_2) over prompts (the MetaRM paper's Figure 1).

    The two responses are draws of one policy, so the difference has mean zero and its mean
    square is the unbiased variance.

    Args:
        pairs: two rewards per prompt.
    """
    if not pairs:
        raise ValueError("no pairs")
    return sum((first - second) ** 2 for first, second in pairs) / len(pairs)


def absolute_differences(pairs: Sequence[Sequence[float]]) -> list[float]:
    """|r(x, s_1) - r(x, s_2)|, one per prompt (the paper's Figures 1 and 5)."""
    return [abs(first - second) for first, second in pairs]


def auc(chosen: Numbers, rejected: Numbers) -> float:
    """Probability that a random chosen reward exceeds a random rejected one, ties counting 1/2.

    Over all chosen x rejected, so unlike the accuracy it also compares responses to different
    prompts: the area under the ROC curve of "this response was chosen". Exact, by sorting, in
    O(n log n). Unchanged by any increasing map of the rewards.

    Args:
        chosen, rejected: rewards; their numbers may differ.

    Raises:
        ValueError: one of them is empty.
    """
    good, bad = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if not good.size or not bad.size:
        raise ValueError("auc needs at least one chosen and one rejected reward")
    if np.isnan(good).any() or np.isnan(bad).any():
        return float("nan")
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(ordered, good, side="right").sum(dtype=np.int64)
    return float(int(below) + int(not_above)) / (2.0 * good.size * bad.size)


def calibration_error(differences: Numbers, *, bins: int = 10) -> float:
    """Expected calibration error (ECE) of the Bradley-Terry probabilities, in [0, 1].

    By a reward difference, the preferred response is the chosen one with probability
    sigmoid(|difference|).

    Args:
        differences: r(chosen) - r(rejected), one per pair; a tie counts as half right.
        bins: as in `calibration_curve`.

    Raises:
        ValueError: no pairs, or no bins.
    """
    difference = np.asarray(differences, dtype=np.float64)
    if np.isnan(difference).any():
        return float("nan")
    confidence, correct, count = calibration_curve(difference, bins=bins)
    return float((count * np.abs(confidence - correct)).sum() / count.sum())


def calibration_curve(differences: Numbers, *, bins: int = 10) -> tuple[Floats, Floats, Floats]:
    """Stated probability and observed accuracy in each bin; empty bins are left out.

    Args:
        differences: r(chosen) - r(rejected), one per pair, none NaN.
        bins: of equal width over [0.5, 1]; a bin holds its lower edge, the last one also 1.

    Returns:
        Mean of sigmoid(|difference|), accuracy and number of pairs, one entry per bin.

    Raises:
        ValueError: no pairs, or no bins.
    """
    difference = np.asarray(differences, dtype=np.float64)
    if not difference.size:
        raise ValueError("no pairs")
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    stated = 1.0 / (1.0 + np.exp(-np.abs(difference)))
    right = np.where(difference == 0, 0.5, difference > 0)
    which = np.minimum(((stated - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    count = np.bincount(which, minlength=bins)
    kept = count > 0
    confidence = np.bincount(which, stated, minlength=bins)[kept] / count[kept]
    correct = np.bincount(which, right, minlength=bins)[kept] / count[kept]
    return confidence, correct, count[kept].astype(np.float64)


def correlation(x: Numbers, y: Numbers) -> float | None:
    """Pearson's correlation, in [-1, 1]; None if either is constant or there are fewer than two.

    Raises:
        ValueError: x and y differ in length.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"x has {a.size} values and y {b.size}")
    if not a.size:
        return None
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    if a.min() == a.max() or b.min() == b.max():
        return None
    a, b = _centred(a), _centred(b)
    value = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return min(1.0, max(-1.0, value))  # rounding may exceed the limits


def rank_correlation(x: Numbers, y: Numbers) -> float | None:
    """Spearman's rank correlation, in [-1, 1]; equal values share the mean of their ranks.

    Returns:
        None if either is constant or there are fewer than two values; NaN if one is NaN.

    Raises:
        ValueError: x and y differ in length.
    """
    from scipy import stats  # takes most of a second to import

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    return correlation(stats.rankdata(a), stats.rankdata(b))


def pair_rank_correlation(
    differences: Numbers, gold_differences: Numbers
) -> tuple[float | None, int]:
    """Spearman's correlation of reward differences and gold differences.

    Every pair counts in both orders, (a, b) and (b, a), so the result does not depend on which
    response of a pair comes first. Pairs with equal gold are ignored, as in `pair_accuracy`.

    Args:
        differences: r(first) - r(second), one per pair.
        gold_differences: the same of the gold reward.

    Returns:
        The correlation (None if the rewards of every pair are equal, or no pair is left) and the
        number of pairs used.
    """
    ours = np.asarray(differences, dtype=np.float64)
    gold = np.asarray(gold_differences, dtype=np.float64)
    kept = gold != 0
    ours, gold = ours[kept], gold[kept]
    found = rank_correlation(np.concatenate([ours, -ours]), np.concatenate([gold, -gold]))
    return found, int(kept.sum())


def _centred(values: Floats) -> Floats:
    """Subtract the mean and scale to about 1, so that squares neither overflow nor underflow."""
    values = values / np.abs(values).max()
    values = values - values.mean()
    values = values / np.abs(values).max()
    return (
        values - values.mean()
    )  # again, since the first mean was rounded at the values' magnitude
