"""Print training progress as text where no progress bar can be shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shiftrm import progress

SHOWN = ("loss", "accuracy", "meta_influence")
"""Metrics shown in progress lines."""


def say(line: str) -> None:
    """Print a progress line and append it to the work folder's log."""
    print(line, flush=True)
    running = progress.current()
    if running is not None:
        running.note(line)


def log_progress_to(work: Path | None) -> None:
    """Also write the running command's progress to this folder from now on."""
    running = progress.current()
    if running is not None:
        running.log_to(work)


class ProgressInWords(TrainerCallback):
    """Print a line for every log, and report counts to `shiftrm.progress`.

    Args:
        shown: metrics to include in the lines.
        speaks: False if a progress bar is shown; then only counts are reported.
    """

    def __init__(self, shown: Sequence[str] = SHOWN, *, speaks: bool = True) -> None:
        self._shown, self._speaks = tuple(shown), speaks
        self._tasks: dict[str, progress.ProgressTask] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = self._shown
        values = {
            key: value
            for key, value in (logs or {}).items()
            if key in shown or (key.startswith("eval_") and key.endswith(shown))
        }
        if self._speaks and state.is_world_process_zero and values:
            place = f"step {state.global_step} of {state.max_steps}"
            words = ", ".join(f"{key} {float(value):.4g}" for key, value in values.items())
            say(f"{place if state.max_steps else 'before training'}: {words}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("training step", state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("training step", state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end("training step")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        done = self._tasks["evaluation batch"].done if "evaluation batch" in self._tasks else 0
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        self._count("evaluation batch", done + 1, total)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end("evaluation batch")

    def _count(self, label: str, done: int, total: int | None) -> None:
        running = progress.current()
        if running is not None:
            if label not in self._tasks:
                self._tasks[label] = running.begin(label, total, done=done)
            self._tasks[label].advance(done, total)

    def _end(self, label: str) -> None:
        running, ended = progress.current(), self._tasks.pop(label, None)
        if running is not None and ended is not None:
            running.end(ended)
