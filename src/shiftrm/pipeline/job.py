"""What all jobs share: their inputs, their settings, and the words of a command."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

__all__ = ["Input", "Job", "Made", "Training", "as_word", "options", "text"]


@dataclass(frozen=True)
class Made:
    """A file or folder that another stage of the run makes."""

    stage: str
    file: str = "model"

    def __str__(self) -> str:
        return f"{self.stage}/{self.file}"


Input = str | Made
"""A path, a hub name or any other source; or what another stage makes."""


class Job(Protocol):
    """One piece of work.

    Attributes:
        makes: the file or folder below `out` that is the result.
        several: whether it may run on several processes under `accelerate launch`.
    """

    several: ClassVar[bool]

    @property
    def makes(self) -> str: ...

    def command(self, output: str) -> list[str]:
        """Return the words after `shiftrm` that do the same by hand."""

    def on_machine(self, way: Mapping[str, Any]) -> "Job":
        """Return the job with settings that change how it is computed and not what."""

    def run(self, output: Path) -> str | None:
        """Write `output`, and return a summary in words (None on all but the main process)."""


@dataclass(frozen=True)
class Training:
    """What the jobs that train have in common.

    Attributes:
        settings: values by field of the job's configuration class and `trl.ModelConfig`.
        told: the command line that a person gave, for the model card.
    """

    makes: ClassVar[str] = "model"
    several: ClassVar[bool] = True

    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    told: str | None = field(default=None, kw_only=True)

    def on_machine(self, way: Mapping[str, Any]) -> Any:
        return replace(self, settings={**self.settings, **way})

    def command(self, output: str) -> list[str]:
        words = [*self._words(), "--output", output]
        return words + [as_word(key, value) for key, value in self.settings.items()]

    def _words(self) -> list[str]:
        raise NotImplementedError

    def _told(self, output: Path) -> str:
        return self.told or shlex.join(["shiftrm", *self.command(str(output))])


def text(value: Input | None) -> str | None:
    """Return an optional input as text."""
    return None if value is None else str(value)


def options(**values: Any) -> list[str]:
    """Return the options of a command; None leaves one out."""
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def as_word(key: str, value: Any) -> str:
    """Return `key=value` as a word of a command, the value as YAML reads it back."""
    if isinstance(value, bool):
        return f"{key}={'true' if value else 'false'}"
    if isinstance(value, list | tuple | dict):
        return f"{key}={json.dumps(value)}"
    return f"{key}={'null' if value is None else value}"
