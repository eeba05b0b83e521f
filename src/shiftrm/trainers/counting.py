"""Every pair of an optimizer step counts once, however micro-batches and processes share them."""

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
    """What a trainer of pairs does instead of dividing by the number of micro-batches.

    The gradient is that of the mean loss over all pairs of the step. A short last micro-batch does
    not weigh as much as a full one, and pairs with which accelerate fills up the last batch of
    several processes do not count (of a stream without length nobody knows which they are).
    """

    _pairs_in_step = 0.0
    _pairs_waiting = 0.0
    """Of these, `.grad` has the gradient, but no optimizer step has used it yet."""

    loss_is_scaled_for_ga = True
    """For the Trainer, which would divide by the number of micro-batches."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of an optimizer step, and its pairs over all processes.

        Every batch says which of its pairs count; accelerate fills the last one up with others.
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
        """1 for each pair of a batch just fetched, 0 for one that fills it up, [B]."""
        rows = len(batch["input_ids"])
        pairs = rows if "segment_ids" in batch else rows // 2
        state = self.accelerator.gradient_state
        real = pairs
        if state.end_of_dataloader and state.remainder > 0:  # processes in order, then what fills
            real = state.remainder - self.accelerator.process_index * pairs
        return (torch.arange(pairs) < real).float()

    def _join_waiting(self, pairs: float) -> None:
        """Count pairs whose gradient still waits for its optimizer step into this one.

        A streamed epoch can end in the middle of a step, which the next one then completes.
        """
        waiting = [p.grad for p in self.model.parameters() if p.grad is not None]
        before = self._pairs_waiting if waiting else 0.0
        self._pairs_in_step = self._pairs_waiting = before + pairs
        if before:
            for gradient in waiting:
                gradient.mul_(before / self._pairs_in_step)

    def _share_of_step(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What these pairs add to the mean over the step's; the mean over processes adds up."""
        if COUNTED not in inputs:
            return losses.mean()
        share = self.accelerator.num_processes / self._pairs_in_step
        return (losses * inputs[COUNTED]).sum() * share

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before every optimizer step."""
        self._pairs_waiting = 0.0
        return super()._get_grad_norm(model, grad_norm=grad_norm)
