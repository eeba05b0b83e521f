"""Signals from the rewards alone: their spread within groups, ties, saturation, their level."""

import numpy as np

from shiftrm.core.within import spread_within
from shiftrm.files import Row
from shiftrm.monitor.signals import SIGNALS, Signal, Step, pair_differences

NEAR = 0.05
"""Rewards this near to the highest of the step count as saturated, in spreads of the probe set."""


def _spread(rows: list[Row]) -> float:
    rewards = np.array([r for row in rows for r in row["rewards"]], dtype=np.float64)
    places = [number for number, row in enumerate(rows) for _ in row["rewards"]]
    return spread_within(rewards, places)


def _of_probe(step: Step) -> float | None:
    found = _spread([row for row in step.probe if len(row["responses"]) > 1])
    return found if found > 0 else None


def _against_probe(step: Step) -> float | None:
    probe = _of_probe(step)
    return None if probe is None or not step.several else _spread(step.several) / probe


def _level(step: Step) -> float | None:
    probe = _of_probe(step)
    if probe is None:
        return None
    start = np.mean([r for row in step.probe for r in row["rewards"]])
    return float(step.rewards.mean() - start) / probe


def _ties(step: Step) -> float | None:
    found = [pair_differences(row) for row in step.several]
    differences = np.concatenate(found) if found else np.zeros(0)
    return float((differences == 0).mean()) if len(differences) else None


def _saturation(step: Step) -> float | None:
    probe = _of_probe(step)
    if probe is None:
        return None
    return float((step.rewards >= step.rewards.max() - NEAR * probe).mean())


SIGNALS.register("spread")(
    Signal(
        "spread",
        "standard deviation of the rewards within prompts, over that of the frozen responses of "
        "the first steps under the same reward",
        "low",
        _against_probe,
    )
)
SIGNALS.register("level")(
    Signal(
        "reward level",
        "how far the mean reward has risen above the frozen responses, in their spreads",
        "high",
        _level,
    )
)
SIGNALS.register("ties")(
    Signal("ties", "share of pairs of different responses with equal rewards", "high", _ties)
)
SIGNALS.register("saturation")(
    Signal(
        "saturation",
        f"share of the rewards within {NEAR:g} spreads of the highest",
        "high",
        _saturation,
    )
)
