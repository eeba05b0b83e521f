"""How far a signal has moved: the mean of many last steps against that of many first ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.monitor.signals import SIGNALS

__all__ = ["Trend", "flagged", "trend"]

MOST = 99.0
"""Standard errors of a change in numbers that did not vary at all."""


@dataclass(frozen=True)
class Trend:
    """A signal now and at the start.

    Attributes:
        start, now: means over the two windows.
        errors: their difference in standard errors of the difference, the steps of each window
            taken as independent.
    """

    start: float
    now: float
    errors: float


def trend(values: Sequence[float], *, baseline: int, window: int) -> Trend | None:
    """Compare the last `window` values with the first `baseline`; None while they overlap."""
    if len(values) < baseline + window:
        return None
    first, last = np.asarray(values[:baseline], float), np.asarray(values[-window:], float)
    start, now = float(first.mean()), float(last.mean())
    # A window of one step has no spread of its own; the other's stands for it.
    spreads = [float(v.var(ddof=1)) if len(v) > 1 else math.nan for v in (first, last)]
    known = [s for s in spreads if not math.isnan(s)]
    both = [(known[0] if known else 0.0) if math.isnan(s) else s for s in spreads]
    error = math.sqrt(both[0] / baseline + both[1] / window)
    change = now - start
    scale = max(abs(start), abs(now), 1e-12)
    if error <= 1e-12 * scale:
        return Trend(
            start, now, 0.0 if abs(change) <= 1e-9 * scale else math.copysign(MOST, change)
        )
    return Trend(start, now, max(-MOST, min(MOST, change / error)))


def flagged(name: str, found: Trend, *, limit: float) -> bool:
    """Whether a signal moved at least `limit` standard errors in its suspicious direction."""
    errors = found.errors if SIGNALS.get(name).suspicious == "high" else -found.errors
    return errors >= limit
