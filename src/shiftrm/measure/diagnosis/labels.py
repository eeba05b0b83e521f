"""How rewards agree with the labels of preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shiftrm.core.discrimination import (
    Floats,
    calibration_curve,
    calibration_error,
)
from shiftrm.core.intervals import RESAMPLES, Measured, measured, measured_mean, weighted_mean
from shiftrm.measure.diagnosis.scored import ScoredPair


@dataclass(frozen=True)
class Labels:
    """Agreement of rewards with labels. Pairs with equal tokens on both sides are left out.

    Attributes:
        pairs, prompts: numbers after that.
        same_share: share of pairs that were left out.
        accuracy: share ordered as labelled, equal rewards counting 1/2.
        auc: see `discrimination.auc`.
        calibration_error: see there; without an interval, since resampling increases it.
        margin_mean: mean r(chosen) - r(rejected).
        accuracy_shorter, accuracy_longer: accuracy on pairs whose chosen response is shorter or
            longer, with the number of such pairs.
        curve: (stated probability, accuracy, pairs) of every non-empty bin.
    """

    pairs: int
    prompts: int
    same_share: float
    accuracy: Measured
    auc: Measured
    calibration_error: float
    margin_mean: Measured
    accuracy_shorter: Measured | None
    pairs_shorter: int
    accuracy_longer: Measured | None
    pairs_longer: int
    curve: list[tuple[float, float, int]] = field(default_factory=list)


def labels(
    pairs: Sequence[ScoredPair], *, seed: int = 0, resamples: int = RESAMPLES
) -> Labels | None:
    """See `Labels`; None if no pair has two different sides."""
    kept = [p for p in pairs if p.chosen.key is None or p.chosen.key != p.rejected.key]
    if not kept:
        return None
    prompts = [pair.prompt for pair in kept]
    chosen = np.array([pair.chosen.reward for pair in kept])
    rejected = np.array([pair.rejected.reward for pair in kept])
    longer_by = np.array([pair.chosen.length - pair.rejected.length for pair in kept])
    margin = chosen - rejected
    right = np.where(margin == 0, 0.5, margin > 0).astype(np.float64)
    of_auc = _WeightedAuc(chosen, rejected)

    def mean(values: Floats) -> Measured:
        return measured_mean(values, prompts, seed=seed, resamples=resamples)

    def accuracy_at(where: NDArray[np.bool_]) -> Measured | None:
        """Return the accuracy on the pairs at `where`, resampling the prompts of all pairs."""
        return measured(
            lambda w: weighted_mean(right, w * where), prompts, seed=seed, resamples=resamples
        )

    area = measured(of_auc, prompts, seed=seed, resamples=resamples)
    assert area is not None
    curve = zip(*(column.tolist() for column in calibration_curve(margin)), strict=True)
    return Labels(
        pairs=len(kept),
        prompts=len(set(prompts)),
        same_share=1 - len(kept) / len(pairs),
        accuracy=mean(right),
        auc=area,
        calibration_error=calibration_error(margin),
        margin_mean=mean(margin),
        accuracy_shorter=accuracy_at(longer_by < 0),
        pairs_shorter=int((longer_by < 0).sum()),
        accuracy_longer=accuracy_at(longer_by > 0),
        pairs_longer=int((longer_by > 0).sum()),
        curve=[(stated, share, int(count)) for stated, share, count in curve],
    )


class _WeightedAuc:
    """AUC for weighted pairs. It sorts once, since a bootstrap calls it a thousand times."""

    def __init__(self, chosen: Floats, rejected: Floats) -> None:
        values, rank = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
        self._size = values.size
        self._chosen, self._rejected = rank[: chosen.size], rank[chosen.size :]

    def __call__(self, weights: Floats) -> float:
        total = weights.sum()
        if total == 0:
            return float("nan")
        at = np.bincount(self._rejected, weights, minlength=self._size)
        not_above = np.cumsum(at) - 0.5 * at  # below, and half of those equal
        return float((weights * not_above[self._chosen]).sum() / total**2)
