"""Signals from the texts: length, repetition, sameness, and how rewards go with length."""

from itertools import pairwise

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.within import centred
from shiftrm.measure.features import FEATURES, reading
from shiftrm.models.responses import group_responses
from shiftrm.monitor.signals import SIGNALS, Signal, Step, different


def _feature(step: Step, name: str) -> Floats:
    measure = FEATURES.get(name).measure
    return np.array([measure(reading(response)) for response in step.responses], dtype=np.float64)


def _mean(step: Step, name: str) -> float | None:
    values = _feature(step, name)
    return float(values.mean()) if len(values) else None


def _length_correlation(step: Step) -> float | None:
    """Pearson's correlation of reward and number of words, both less their prompt's mean."""
    places = np.repeat(np.arange(len(step.groups)), [len(row["rewards"]) for row in step.groups])
    if not len(places):
        return None
    both_N2 = centred(np.stack([_feature(step, "length"), step.rewards], axis=1), places)
    scale = float(np.sqrt((both_N2**2).sum(axis=0).prod()))
    return float(both_N2[:, 0] @ both_N2[:, 1]) / scale if scale > 0 else None


def _same(step: Step) -> float | None:
    pairs = sum(len(row["responses"]) * (len(row["responses"]) - 1) // 2 for row in step.groups)
    apart = sum(len(different(row["responses"])[0]) for row in step.groups)
    return 1 - apart / pairs if pairs else None


def _shared(step: Step) -> float | None:
    """Share of the neighbouring pairs of words of all responses that occurred before."""
    words = [reading(response).words for responses in map(group_responses, step.groups)
             for response in responses]  # fmt: skip
    pairs = [pair for text in words for pair in pairwise(text)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else None


SIGNALS.register("length_correlation")(
    Signal(
        "reward with length",
        "correlation of the reward with the number of words, within prompts",
        "high",
        _length_correlation,
    )
)
SIGNALS.register("length")(
    Signal("length", "mean number of words", "high", lambda step: _mean(step, "length"))
)
SIGNALS.register("repetition")(
    Signal(
        "repetition",
        "share of the neighbouring pairs of words that occurred before in the response",
        "high",
        lambda step: _mean(step, "repeated_pairs"),
    )
)
SIGNALS.register("same")(
    Signal("same texts", "share of pairs of responses to a prompt with equal text", "high", _same)
)
SIGNALS.register("phrases")(
    Signal(
        "stock phrases",
        "share of the neighbouring pairs of words that another response of the step also has",
        "high",
        _shared,
    )
)
SIGNALS.register("unfinished")(
    Signal(
        "cut off",
        "share of responses that the length limit cut off",
        "high",
        lambda step: _mean(step, "unfinished"),
    )
)
