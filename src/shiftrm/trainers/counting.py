"""Weigh every pair of an optimizer step equally across micro-batches and processes."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shiftrm.trainers.collator import COUNTED

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base
else:
    _Base = object


class CountsPairs(_Base):
    """A trainer mixin that takes the gradient of the mean loss over all pairs of a step.

    A pair in a short last micro-batch weighs as much as any other. Pairs that accelerate adds to
    pad the last batch of several processes do not count, unless the data set is a stream without
    length, where they cannot be identified.
    """

    _pairs_in_step = 0.0
    _pairs_waiting = 0.0
    """Pairs whose gradient is in `.grad` but has not been used by an optimizer step."""

    loss_is_scaled_for_ga = True
    """Stops the Trainer from dividing by the number of micro-batches."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and its pair count over all processes.

        Each batch marks which of its pairs count; accelerate pads the last batch.
        """
        samples = []
        for batch in itertools.islice(epoch_iterator, num_batches):
            batch[COUNTED] = self._counted(batch).to(device)
            samples.append(batch)
        own = sum(float(batch[COUNTED].sum()) for batch in samples)
        pairs = self.accelerator.reduce(torch.tensor(own, device=device), reduction="sum")
        self._join_waiting(float(pairs))
        return samples, pairs

    def _counted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for each pair of the batch just fetched, 0 for padding, [B]."""
        rows = len(batch["input_ids"])
        pairs = rows if "segment_ids" in batch else rows // 2
        state = self.accelerator.gradient_state
        real = pairs
        if state.end_of_dataloader and state.remainder > 0:  # processes in order, then padding
            real = state.remainder - self.accelerator.process_index * pairs
        return (torch.arange(pairs) < real).float()

    def _join_waiting(self, pairs: float) -> None:
        """Include in this step the pairs whose gradient has not been used yet.

        A streamed epoch can end in the middle of a step; the next epoch then completes the step.
        """
        waiting = [p.grad for p in self.model.parameters() if p.grad is not None]
        before = self._pairs_waiting if waiting else 0.0
        self._pairs_in_step = self._pairs_waiting = before + pairs
        if before:
            for gradient in waiting:
                gradient.mul_(before / self._pairs_in_step)

    def _share_of_step(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return these pairs' share of the step's mean loss; averaging over processes sums them."""
        if COUNTED not in inputs:
            return losses.mean()
        share = self.accelerator.num_processes / self._pairs_in_step
        return (losses * inputs[COUNTED]).sum() * share

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before every optimizer step."""
        self._pairs_waiting = 0.0
        return super()._get_grad_norm(model, grad_norm=grad_norm)
