"""Paired comparisons over seeds: differences, t intervals, Holm's correction. Pure functions."""

import math
from collections.abc import Mapping, Sequence
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
    if n == 0:
        return Paired(math.nan, math.nan, math.nan, math.nan, 0, math.nan, 0)
    mean, wins, worst = float(differences.mean()), int((differences > 0).sum()), differences.min()
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    if not error > 0:  # one seed, or the same arm twice
        return Paired(mean, math.nan, math.nan, math.nan, wins, float(worst), n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(mean, mean - half, mean + half, p, wins, float(worst), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the given order; NaN stays NaN and is not counted."""
    order = sorted((p, k) for k, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for place, (p, k) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p))
        adjusted[k] = largest
    return adjusted


def at_target(gold: float, kl: float, target: float, slope: float) -> float:
    """Return gold moved along the line of gold on KL to the target KL."""
    return gold - slope * (kl - target)


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
