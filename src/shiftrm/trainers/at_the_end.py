"""Resuming a training from its last checkpoint, after which no step is left."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["NoStepTooMany"]


class NoStepTooMany(_Base):
    """A trainer mixin that makes no step beyond `max_steps` when it resumes.

    transformers compares the number of steps with `max_steps` after a step only. Resumed from the
    checkpoint of the last step, in the middle of an epoch, it would train one step more.
    """

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        prepared: tuple[nn.Module, Any] = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.state.global_step >= max_steps:  # else the first epoch does, at the right moment
            self._load_rng_state(resume_from_checkpoint)
        return prepared

    def _run_epoch(self, **keywords: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**keywords)
        else:
            self.control.should_training_stop = True
