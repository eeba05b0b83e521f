"""The measures of an arm, from its rewards and the gold of the same responses.

Intervals are 95 % bootstraps over prompts; two arms are compared on the same responses to the same
prompts, so their difference is resampled prompt by prompt.
"""

from collections.abc import Sequence

import numpy as np

from shiftrm.core.discrimination import Floats, pair_accuracy, rank_correlation
from shiftrm.core.intervals import Measured, measured, measured_mean, weighted_mean
from shiftrm.measure.best_of_n import best_of_n

__all__ = ["accuracy", "best_gold", "difference", "mean", "rank"]

Rewards = Sequence[Sequence[float]]
"""Of each prompt, one number for each response."""


def accuracy(rewards: Rewards, golds: Rewards) -> Measured | None:
    """Return the share of pairs of responses to one prompt that rewards order as the gold does.

    All pairs of a prompt count; equal rewards count one half, equal golds are left out.
    """
    right, number = [], []
    for reward, gold in zip(rewards, golds, strict=True):
        value, n = pair_accuracy(_differences(reward), _differences(gold))
        right.append(0.0 if value is None else value * n)
        number.append(float(n))
    rights, numbers = np.array(right), np.array(number)

    def share(weights: Floats) -> float:
        total = float((numbers * weights).sum())
        return float((rights * weights).sum()) / total if total else float("nan")

    return measured(share, range(len(right)), seed=0)


def rank(rewards: Rewards, golds: Rewards) -> Measured | None:
    """Return the mean of Spearman's rank correlation within prompts, where it is defined."""
    found = [rank_correlation(r, g) for r, g in zip(rewards, golds, strict=True)]
    values = np.array([np.nan if value is None else value for value in found])

    def mean(weights: Floats) -> float:
        kept = ~np.isnan(values)
        return weighted_mean(values[kept], weights[kept])

    return measured(mean, range(len(found)), seed=0)


def best_gold(rewards: Rewards, golds: Rewards, n: int) -> Floats:
    """Return each prompt's expected gold of the response that the rewards like best of n.

    Its KL to the policy that is sampled, log n - (n - 1)/n, is the same for all rewards.
    """
    _, found = best_of_n(np.array(rewards), np.array(golds), n=[n])
    return found[:, 0]


def difference(ours: Floats, theirs: Floats) -> Measured:
    """Return the mean difference of two arms' numbers by prompt."""
    return measured_mean(ours - theirs, range(len(ours)), seed=0)


def mean(values: Floats | Sequence[float]) -> Measured:
    """Return the mean of one number a prompt."""
    return measured_mean(np.asarray(values, dtype=np.float64), range(len(values)), seed=0)


def _differences(values: Sequence[float]) -> list[float]:
    """Return first minus second of all pairs, in a fixed order."""
    return [a - b for i, a in enumerate(values) for b in values[i + 1 :]]
