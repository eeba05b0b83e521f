"""The pairs that the next audit is drawn from."""

import random
from collections.abc import Collection, Sequence

from shiftrm.files import Row
from shiftrm.monitor.audits import Drawn, Pairs, draw_audit, ordered_pairs
from shiftrm.monitor.settings import MonitorConfig

__all__ = ["Pool"]

FEWEST = 5
"""An audit of fewer pairs waits for more steps."""


class Pool:
    """The ordered pairs of the last steps since the last audit.

    These are `pool_steps` steps, and more only while those have too few prompts for an audit.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self._steps: list[Pairs] = []

    @property
    def needed(self) -> int:
        """The number of prompts from which an audit can be drawn."""
        return min(FEWEST, self.config.audit_pairs)

    @property
    def prompts(self) -> int:
        """The number of different prompts with a pair that the reward model orders."""
        return _prompts(self._steps)

    def add(self, groups: Sequence[Row]) -> None:
        self._steps.append(ordered_pairs(groups))
        while (
            len(self._steps) > self.config.pool_steps and _prompts(self._steps[1:]) >= self.needed
        ):
            del self._steps[0]

    def clear(self) -> None:
        self._steps = []

    def draw(self, number: int, asked: Collection[str]) -> list[Drawn]:
        """Draw an audit; none while it would have too few pairs."""
        config = self.config
        rng = random.Random(f"audit/{config.seed}/{number}")
        drawn = draw_audit(
            self._steps, config.audit_pairs, targeted=config.targeted, rng=rng, asked=asked
        )
        return drawn if len(drawn) >= self.needed else []


def _prompts(steps: Sequence[Pairs]) -> int:
    return len({name for step in steps for name in step})
