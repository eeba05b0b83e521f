"""Choose the length of a MetaRM step by what it does to rewards and to the loss on pairs."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.core.curvature import coarsest_type
from shiftrm.core.meta import global_norm, look_ahead
from shiftrm.core.meta_direction import inner_product
from shiftrm.core.meta_effect import (
    StepEffect,
    first_length,
    growth,
    length_by_effect,
    scaling_derivative,
    squared_differences,
)
from shiftrm.core.objectives import SPREAD
from shiftrm.errors import UserError
from shiftrm.trainers.meta_passes import MetaPasses
from shiftrm.trainers.sharding import reshard

logger = logging.getLogger(__name__)


EFFECTS = ("rho", "growth", "loss_rise")
"""What is logged of a step, as `meta_rho` and so on."""


class MetaEffect(MetaPasses):
    """A trainer mixin for `meta_step="effect"`; see `core.meta_effect`.

    Each trial costs a forward pass over the meta batch and one over a micro-batch of pairs.
    """

    _last_length: float = 0.0
    """The length of the last step, which the next one tries first; 0 if there was none."""

    def _check_effect(self) -> None:
        """Refuse weights in which a step cannot be measured; say which setting is not used."""
        coarsest = coarsest_type(self._trainable())
        if torch.finfo(coarsest).eps > torch.finfo(torch.float32).eps:
            raise UserError(
                f"meta_step='effect': a step is measured in the weights, and {coarsest} would "
                "round it away; load the model with dtype=float32 (bf16=True may stay on)"
            )
        if self.args.eta_given:
            logger.warning(
                "meta_learning_rate is not used with meta_step='effect': meta_effect and "
                "meta_loss_rise set the length of the step"
            )

    def _length_by_effect(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        gradients: Sequence[Tensor],
        directions: Sequence[Tensor],
    ) -> float:
        """Return and log the length of a step along the directions; all processes choose the same.

        Args:
            inputs: the micro-batch of pairs that the loss is measured on.
            gradients: grad J at theta. `_seen` holds the rewards that it was computed from.
        """
        parameters = self._trainable()
        before = self._loss_only(model, inputs)

        def effect(length: float) -> StepEffect:
            with look_ahead(parameters, directions, meta_learning_rate=length):
                squares = self._squared_differences(model)
                loss = self._loss_only(model, inputs)
                reshard(model)  # so that theta comes back into the shards
            return StepEffect(
                growth(squares, by_change=self.args.meta_objective not in SPREAD),
                (loss - before) / before if before > 0 else loss,
            )

        chosen = length_by_effect(
            effect,
            guess=self._last_length or self._first_length(gradients, directions),
            target=self.args.meta_effect,
            loss_rise=self.args.meta_loss_rise,
        )
        self._last_length = chosen.length
        self._log_meta("meta_rho", chosen.length)
        if self.args.meta_direction != "random":  # whose step is only as long as this one
            self._log_meta("meta_growth", chosen.effect.growth)
            self._log_meta("meta_loss_rise", chosen.effect.loss_rise)
        self._log_meta("meta_trials", chosen.trials)
        return chosen.length

    def _first_length(self, gradients: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
        groups = zip(self._micro_batches(), self._seen or [], strict=True)
        scaling = sum(
            weight * scaling_derivative(self._meta_objective, rewards, mask=exists)
            for (weight, _), (rewards, exists) in groups
        )
        return first_length(
            self._sum_over_processes(scaling / self.meta_batch_size),
            float(inner_product(gradients, directions)),
            target=self.args.meta_effect,
            otherwise=0.01 * float(global_norm([p.detach() for p in self._trainable()])),
        )

    @torch.no_grad()
    def _squared_differences(self, model: nn.Module) -> Tensor:
        """Return `squared_differences` between theta and now, summed over the meta batch, [3]."""
        total = torch.zeros(3, dtype=torch.float32, device=self.args.device)
        for (weight, part), (before, exists) in zip(
            self._micro_batches(), self._seen or [], strict=True
        ):
            with self.compute_loss_context_manager():
                after, _ = self._meta_rewards(model, part)
            squares = squared_differences(before, after, mask=exists).sum(dim=1)
            total = total + weight * squares
        return self._reduce(total, "sum")

    @torch.no_grad()
    def _loss_only(self, model: nn.Module, inputs: dict[str, Tensor]) -> float:
        """Return the loss on a micro-batch of pairs, over all processes."""
        losses = [self._micro_batch_loss(model, part) for part in self._passes(model, inputs)]
        reshard(model)
        return float(self._reduce(sum(losses[1:], start=losses[0]), "mean"))

    def _first_pairs(self) -> dict[str, Tensor]:
        """Return a micro-batch of the first pairs, for a step outside of training."""
        size = int(self.args.per_device_train_batch_size)
        start = self.accelerator.process_index * size
        data: Any = self.train_dataset
        rows = list(itertools.islice(data, self.accelerator.num_processes * size))
        mine = [rows[i % len(rows)] for i in range(start, start + size)]
        batch: dict[str, Tensor] = self.data_collator(mine)
        return batch
