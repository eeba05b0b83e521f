"""Paired comparisons over seeds: differences, t intervals, Holm's correction. Pure functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """One arm against another over the seeds that both have.

    Attributes:
        mean, low, high: of the differences, with the 95 % t interval; NaN with fewer than 2 seeds.
        p: two-sided, of the t test that the mean is zero.
        wins: seeds with a difference above zero.
        worst: the smallest difference.
    """

    mean: float
    low: float
    high: float
    p: float
    wins: int
    worst: float
    n: int


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired:
    """Compare values by seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    n = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return _compared(float(differences.mean()) if n else math.nan, error, differences)


def paired_at_equal_kl(
    gold: Mapping[int, float], kl: Mapping[int, float], slope: Callable[[int | None], float]
) -> Paired:
    """Compare two arms in gold, moved along the line of gold on KL to the same KL.

    The error is a jackknife's over the seeds (Efron and Stein 1981), which estimates the slope anew
    without each seed, so that the slope's own error is in the interval.

    Args:
        gold, kl: differences between the arms, by seed.
        slope: of gold on KL, estimated without a seed; None: from all.
    """

    def mean(without: int | None) -> float:
        found = [gold[seed] - slope(without) * kl[seed] for seed in gold if seed != without]
        return sum(found) / len(found) if found else math.nan

    differences = [gold[seed] - slope(None) * kl[seed] for seed in gold]
    return _compared(mean(None), jackknife_error(mean, list(gold)), np.array(differences))


def ratio(part: Mapping[int, float], whole: Mapping[int, float]) -> tuple[float, float, float]:
    """Return the ratio of two means over seeds with its jackknife interval."""
    seeds = sorted(part.keys() & whole.keys())

    def estimate(without: int | None) -> float:
        sums = [sum(one[seed] for seed in seeds if seed != without) for one in (part, whole)]
        return sums[0] / sums[1] if sums[1] > 0 else math.nan

    value = estimate(None)
    return value, *t_interval(value, jackknife_error(estimate, seeds), len(seeds))


def jackknife_error(estimate: Callable[[int | None], float], seeds: Sequence[int]) -> float:
    """Return the standard error of an estimate that can be made without a seed; NaN of one seed."""
    n = len(seeds)
    if n < 2:
        return math.nan
    without = np.array([estimate(seed) for seed in seeds])
    return math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))


def _compared(mean: float, error: float, differences: np.ndarray) -> Paired:
    """Return a mean with its t interval, from its standard error and the differences by seed."""
    n, wins = len(differences), int((differences > 0).sum())
    worst = float(differences.min()) if n else math.nan
    if not error > 0:  # one seed, or the same arm twice
        return Paired(mean, math.nan, math.nan, math.nan, wins, worst, n)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(mean, *t_interval(mean, error, n), p, wins, worst, n)


def t_interval(mean: float, error: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of an estimate from n seeds with this standard error."""
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the given order; NaN stays NaN and is not counted."""
    order = sorted((p, k) for k, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for place, (p, k) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p))
        adjusted[k] = largest
    return adjusted


def pooled_slope(points: Sequence[tuple[str, float, float]]) -> float:
    """Return the slope of gold on KL within arms, from (arm, KL, gold) of single seeds.

    0 where there is nothing to estimate it from.
    """
    x, y = [], []
    for arm in {name for name, *_ in points}:
        mine = np.array([(kl, gold) for name, kl, gold in points if name == arm])
        centred = mine - mine.mean(axis=0)
        x += list(centred[:, 0])
        y += list(centred[:, 1])
    square = float(np.dot(x, x)) if x else 0.0
    return float(np.dot(x, y)) / square if square > 0 else 0.0
