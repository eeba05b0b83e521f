"""Disagreement with a second reward function, if the monitor has one."""

import numpy as np

from shiftrm.models.scoring import score_rows
from shiftrm.monitor.signals import SIGNALS, Signal, Step, pair_differences


def _disagreement(step: Step) -> float | None:
    if step.second is None or not step.several:
        return None
    others = score_rows(step.second, step.several)
    ours = np.concatenate([pair_differences(row) for row in step.several])
    theirs = np.concatenate(
        [pair_differences(row, found) for row, found in zip(step.several, others, strict=True)]
    )
    if not len(ours):
        return None
    return float(np.where(ours * theirs == 0, 0.5, ours * theirs < 0).mean())


SIGNALS.register("disagreement")(
    Signal(
        "disagreement",
        "share of pairs that a second reward model orders the other way round",
        "high",
        _disagreement,
    )
)
