"""Free signals: numbers of a training step that need no labels.

To add one, write a file in `monitor/registered`, or give `package.module:attribute` as its name.
None of them raises the alarm: rewards and texts alone cannot say whether a reward model orders
responses rightly (docs/monitor.md shows what each one knew). They say when and where to audit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from shiftrm.core.discrimination import Floats
from shiftrm.files import Row
from shiftrm.models.rendering import Text
from shiftrm.models.responses import Response, group_responses
from shiftrm.monitor.trained_on import TrainingStates
from shiftrm.registry import Registry

__all__ = ["SIGNALS", "Score", "Signal", "Step", "measure_step"]

Score = Callable[..., Sequence[float]]
"""Rewards of texts: `(prompts, responses, *, finished)`, as a `Scorer`."""


@dataclass(frozen=True)
class Step:
    """What the signals see of a training step.

    Attributes:
        number: of the step, as the trainer counts.
        groups: `{"prompt", "responses", "finished", "rewards"}`; one row for each prompt.
        score: the reward function, for texts that the policy did not write.
        probe: the same rows of the first steps, frozen, with today's rewards; empty at the start.
        second: a second reward function, or None.
        pairs: how many pairs a test that scores changed texts makes.
        trained_on: the states of a reward model's training pairs, or None.
    """

    number: int
    groups: Sequence[Row]
    score: Score
    probe: Sequence[Row] = ()
    second: Score | None = None
    pairs: int = 64
    trained_on: TrainingStates | None = None

    @cached_property
    def states(self) -> list[Tensor]:
        """The hidden states of each group's responses, [N, H]; of `trained_on`'s model."""
        if self.trained_on is None:
            return []
        found = self.trained_on.states(self.responses)
        return list(found.split([len(row["responses"]) for row in self.groups]))

    @property
    def several(self) -> list[Row]:
        """The groups of at least two responses."""
        return [row for row in self.groups if len(row["responses"]) > 1]

    @property
    def responses(self) -> list[Response]:
        return [response for row in self.groups for response in group_responses(row)]

    @property
    def rewards(self) -> Floats:
        return np.array([r for row in self.groups for r in row["rewards"]], dtype=np.float64)


@dataclass(frozen=True)
class Signal:
    """One free signal.

    Attributes:
        label: short, for plots and logs.
        meaning: what it is, in a sentence.
        suspicious: which way it moves, in theory, when a policy exploits its reward model.
        measure: its value in a step; None where it cannot be computed (one response a prompt, or
            texts that the test cannot change).
        scores: whether it asks the reward function about texts that the policy did not write.
    """

    label: str
    meaning: str
    suspicious: Literal["low", "high"]
    measure: Callable[[Step], float | None]
    scores: bool = field(default=False)


SIGNALS = Registry[Signal]("free signal", Signal, home="shiftrm.monitor.registered")


def measure_step(step: Step, names: Sequence[str]) -> dict[str, float]:
    """Return the signals of a step that could be computed and are finite.

    Raises:
        UserError: an unknown name.
    """
    found = {}
    for name in names:
        value = SIGNALS.get(name).measure(step)
        if value is not None and np.isfinite(value):
            found[name] = float(value)
    return found


def pair_differences(row: Row, rewards: Sequence[float] | None = None) -> Floats:
    """Return `r_i - r_j` over the pairs i < j of a group whose texts differ."""
    values = np.asarray(row["rewards"] if rewards is None else rewards, dtype=np.float64)
    i, j = different(row["responses"], row.get("finished"))
    return np.asarray(values[i] - values[j], dtype=np.float64)


def different(texts: Sequence[Text], finished: Sequence[bool] | None = None) -> tuple[Any, Any]:
    """Return the indices i < j of the pairs of responses whose text or ending differ."""
    ended = [True] * len(texts) if finished is None else finished
    keys = [repr((text, end)) for text, end in zip(texts, ended, strict=True)]
    numbers = np.unique(keys, return_inverse=True)[1] if keys else np.zeros(0, dtype=np.int64)
    i, j = np.triu_indices(len(keys), k=1)
    kept = numbers[i] != numbers[j]
    return i[kept], j[kept]
