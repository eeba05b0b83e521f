"""Batch-wise sum-to-zero regularisation: the mean reward of a batch is pulled to zero."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.core.losses import sum_to_zero_penalty
from shiftrm.data.pairs import WEIGHT
from shiftrm.errors import UserError
from shiftrm.trainers.pair_batches import COUNTED
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["BSRConfig", "BSRTrainer"]


@dataclass
class BSRConfig(RewardConfig):
    """`RewardConfig` with the weight of the penalty."""

    bsr_coefficient: float = field(
        default=1e-3, metadata={"help": "lambda of the penalty lambda B (mean reward)^2"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bsr_coefficient >= 0:
            raise UserError(f"bsr_coefficient is {self.bsr_coefficient}; it must be at least 0")


class BSRTrainer(RewardTrainer):
    """`RewardTrainer` with the penalty `core.losses.sum_to_zero_penalty`, in training only.

    Batch and mean are those of the optimizer step. Where a step has several micro-batches or
    processes, its mean is not known when the first of them is computed, so each step begins with a
    pass over its pairs without gradients; this takes about a third more time.
    """

    _step_mean: Tensor | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        samples, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        in_parts = num_batches > 1 or self.accelerator.num_processes > 1
        in_parts = in_parts or self._most_tokens() is not None
        self._step_mean = self._mean_reward(samples) if in_parts else None
        return samples, pairs

    @torch.no_grad()
    def _mean_reward(self, samples: list[Any]) -> Tensor:
        """Return the weighted mean reward of the step's pairs on all processes."""
        total = torch.zeros(2, device=self.args.device)
        self.model_wrapped.train()
        for sample in samples:
            inputs = self._prepare_inputs(sample)
            with self.compute_loss_context_manager():
                rewards, _ = self._pair_rewards(self.model_wrapped, inputs)
            total = total + _totals(rewards, inputs)  # not in place: fp64 stays fp64
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        return _mean(total)

    def _pair_losses(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, rewards, lengths = super()._pair_losses(model, inputs)
        if not self.model.training or COUNTED not in inputs:
            return losses, rewards, lengths
        mean = self._step_mean
        if mean is None:  # the step is this batch
            mean = _mean(_totals(rewards.detach(), inputs))
        penalty = sum_to_zero_penalty(
            rewards,
            mean=mean,
            pairs=self._pairs_in_step,
            coefficient=self.args.bsr_coefficient,
            weight=inputs.get(WEIGHT, 1.0),
        )
        return losses + penalty, rewards, lengths


def _totals(rewards: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the weighted sum of the pairs' mean rewards, and the sum of the weights, [2]."""
    weights = inputs[COUNTED] * inputs.get(WEIGHT, 1.0)
    return torch.stack([(rewards.mean(1) * weights).sum(), weights.sum()])


def _mean(totals: Tensor) -> Tensor:
    """Return the mean; 0 where no pair has a weight, which then has no part in the penalty."""
    return totals[0] / totals[1].where(totals[1] > 0, 1.0)
