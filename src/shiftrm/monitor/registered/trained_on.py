"""Signals from the hidden states of the reward model's training pairs, if the monitor has them."""

import numpy as np

from shiftrm.monitor.signals import SIGNALS, Signal, Step, different


def _distance(step: Step) -> float | None:
    if step.trained_on is None or not step.responses:
        return None
    return float(np.mean([step.trained_on.distances(states).mean() for states in step.states]))


def _expected_errors(step: Step) -> float | None:
    if step.trained_on is None:
        return None
    found = []
    for row, states in zip(step.groups, step.states, strict=True):
        i, j = different(row["responses"], row.get("finished"))
        if len(i):
            found.append(step.trained_on.error_probabilities(states, i, j))
    return float(np.concatenate(found).mean()) if found else None


SIGNALS.register("distance")(
    Signal(
        "distance from training",
        "Mahalanobis distance of the responses' hidden states from those of the reward model's "
        "training pairs, whose own is 1",
        "high",
        _distance,
    )
)
SIGNALS.register("expected_errors")(
    Signal(
        "expected errors",
        "share of pairs that heads drawn from the reward model's posterior order the other way",
        "high",
        _expected_errors,
    )
)
