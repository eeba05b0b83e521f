"""The settings of a drift monitor."""

import math
from dataclasses import dataclass, fields
from typing import Any

from shiftrm.errors import UserError
from shiftrm.monitor.signals import SIGNALS

__all__ = ["MonitorConfig"]

NUMBERS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured, what is audited, and what the alarm means.

    Attributes:
        threshold: the alarm says that accuracy on the policy's own pairs was below this.
        alpha: probability of a false alarm over the whole run; of each reward model, if it is
            changed within the run.
        budget: labels that may be asked for in the whole run; 0: free signals only.
        audit_pairs: pairs of one audit. There are `budget // audit_pairs` audits.
        audit_from: first step that may have an audit. Before the policy has moved, labels speak for
            the reward model.
        audit_every: steps between audits while no signal is flagged.
        audit_flagged: steps between audits while one is.
        pool_steps: an audit draws from the pairs of so many last steps.
        targeted: share of an audit's draws that go where the reward model looks doubtful; the rest
            is drawn evenly. Weights correct for it.
        signals: names in `SIGNALS`; None: all that apply.
        every: steps between measurements of the signals.
        baseline, window: steps at the start, and last steps, whose means are compared.
        flag: a signal is flagged when its window is this many standard errors from the baseline in
            its suspicious direction.
        sight_pairs: pairs of each sight test in a step.
        probe_groups: groups of the first steps that are kept as the frozen probe set.
        seed: of what is drawn.

    Raises:
        UserError: a value out of range, or an unknown signal.
    """

    threshold: float = 0.6
    alpha: float = 0.05
    budget: int = 200
    audit_pairs: int = 20
    audit_from: int = 1
    audit_every: int = 20
    audit_flagged: int = 5
    pool_steps: int = 2
    targeted: float = 0.5
    signals: tuple[str, ...] | None = None
    every: int = 1
    baseline: int = 10
    window: int = 10
    flag: float = 4.0
    sight_pairs: int = 64
    probe_groups: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds = NUMBERS.get(field.type)
            value = getattr(self, field.name)
            if kinds and (not isinstance(value, kinds) or isinstance(value, bool)):
                kind = "a whole number" if kinds == (int,) else "a number"
                raise UserError(f"{field.name} is {value!r}; it must be {kind}")
        if isinstance(self.signals, str):
            raise UserError(f"signals is {self.signals!r}; give a list, [{self.signals!r}]")
        for name in ("threshold", "alpha"):
            self._require(name, 0 < getattr(self, name) < 1, "must lie between 0 and 1")
        self._require("targeted", 0 <= self.targeted < 1, "must be at least 0 and below 1")
        self._require("budget", self.budget >= 0, "must not be negative")
        self._require("flag", 0 < self.flag < math.inf, "must be above 0")
        for field in fields(self):
            if field.type is int and field.name not in ("seed", "budget"):
                self._require(field.name, getattr(self, field.name) >= 1, "must be at least 1")
        if 0 < self.budget < self.audit_pairs:
            raise UserError(
                f"budget is {self.budget}, less than the {self.audit_pairs} pairs of one audit; "
                "raise it, lower audit_pairs, or give 0 for no audits"
            )
        for name in self.signals or ():
            SIGNALS.get(name)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}; it {rule}")

    @property
    def audits(self) -> int:
        """The number of audits that the budget allows."""
        return self.budget // self.audit_pairs

    @property
    def names(self) -> list[str]:
        """The names of the signals."""
        return SIGNALS.names() if self.signals is None else list(self.signals)
