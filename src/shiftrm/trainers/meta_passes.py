"""Compute J and L of a MetaRM step, their gradients and curvature, on one or more processes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shiftrm.core.curvature import finite_difference_product, hessian_vector_product
from shiftrm.core.meta import add_unbiased_, midpoint_change, midpoint_change_by_differences
from shiftrm.core.objectives import Objective, held_signs
from shiftrm.errors import UserError
from shiftrm.models.prefix import SharedRows, pack
from shiftrm.trainers.meta_groups import MetaGroups, TokenGroup
from shiftrm.trainers.sharding import gradients_in_shards, is_sharded, reshard

if TYPE_CHECKING:
    from shiftrm.trainers.reward import RewardTrainer as _Base
else:
    _Base = object


class MetaPasses(_Base):
    """A trainer mixin with the computations of `MetaRMTrainer`.

    No method changes the parameters; only `_add_to_gradients` changes `.grad`.
    """

    _groups: MetaGroups
    _meta_objective: Objective
    meta_batch_size: int
    meta_curvature: str
    _compute_type: torch.dtype
    _radius: dict[str, float]  # of finite differences, carried from step to step
    _seen: list[tuple[Tensor, Tensor]] | None = None
    """Rewards and mask of every micro-batch of groups since this was set to []; None: not kept."""

    # -- grad J ------------------------------------------------------------------------------

    def _objective_gradient(self, model: nn.Module) -> tuple[float, list[Tensor]]:
        """Return J and its gradient over the global meta batch, computed in micro-batches.

        Under DDP, which does not synchronise here during gradient accumulation, this method sums
        over processes itself; FSDP2 has already averaged.
        """
        total = 0.0
        sharded = is_sharded(model)
        averaged_over = self.accelerator.num_processes if sharded else 1
        gradients_in_shards(model)  # up to the first micro-batch of pairs, for the influence
        model.train()  # as for the pairs; dropout is switched off
        with self._gradients_set_aside(), _unsynchronised(model):
            for weight, micro_batch in self._micro_batches():
                objective = self._part_of_objective(model, weight, micro_batch)
                (objective * averaged_over).backward()
                total += float(objective.detach())
            gradients = self._gradients()
        if not sharded:
            gradients = [self._reduce(g, "sum") for g in gradients]
        return self._sum_over_processes(total), gradients

    def _part_of_objective(
        self, model: nn.Module, weight: float, groups: Sequence[TokenGroup]
    ) -> Tensor:
        """Return these groups' share of J of the global meta batch, a scalar."""
        with self.compute_loss_context_manager():
            return weight * self._objective(model, groups).sum() / self.meta_batch_size

    def _objective(self, model: nn.Module, groups: Sequence[TokenGroup]) -> Tensor:
        """Return J of each group (Eq. 2 by default), shape [B]."""
        rewards, exists = self._meta_rewards(model, groups)
        if self._seen is not None:
            self._seen.append((rewards.detach(), exists))
        value = self._meta_objective(rewards, mask=exists)
        if value.shape != rewards.shape[:1]:
            raise UserError(
                f"meta_objective={self.args.meta_objective}: returned shape {tuple(value.shape)} "
                f"for {len(rewards)} groups; expected one value a group"
            )
        return value

    def _meta_rewards(
        self, model: nn.Module, groups: Sequence[TokenGroup]
    ) -> tuple[Tensor, Tensor]:
        """Return rewards of these groups and which exist, [B, K] each."""
        rows = self._packed_groups(groups)
        with self._draws_given_back():
            return self._group_rewards(model, rows), rows.exists

    def _packed_groups(self, groups: Sequence[TokenGroup]) -> SharedRows:
        rows = pack(groups, pad_token_id=self.processing_class.pad_token_id)
        return SharedRows(*(tensor.to(self.args.device) for tensor in rows))

    def _micro_batches(self) -> list[tuple[float, list[TokenGroup]]]:
        """Return this process's share of the step's groups as weighted micro-batches.

        A process with fewer groups repeats one with weight 0, because all must run the same number
        of passes: passes communicate in FSDP2, and in DDP if the model has buffers.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        groups = self._groups.batch(self._step(), self.meta_batch_size)[rank::world]
        size = self.args.per_device_train_batch_size
        own = [
            (1.0, part)
            for i in range(0, len(groups), size)
            for part in self._groups_of_passes(groups[i : i + size])
        ]
        most = math.ceil(math.ceil(self.meta_batch_size / world) / size)
        return own + [(0.0, groups[:1])] * (most - len(own))

    def _groups_of_passes(self, groups: list[TokenGroup]) -> list[list[TokenGroup]]:
        """Return these groups in parts within `max_tokens_per_pass`."""
        if self._most_tokens() is None:
            return [groups]
        parts = self._cut(self.model_wrapped, self._packed_groups(groups))
        return [[groups[i] for i in part] for part in parts]

    def _micro_batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return a micro-batch's share of L of the optimizer step, as in training."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), self._draws_given_back():
            losses, *_ = self._pair_losses(model, inputs)
        return self._share_of_step(losses, inputs)

    def _pair_gradient(
        self, model: nn.Module, inputs: dict[str, Tensor], *, averaged: bool
    ) -> list[Tensor]:
        """Return grad L of a micro-batch at the current parameters.

        FSDP2 always averages it over the processes.
        """
        with self._gradients_set_aside(), _unsynchronised(model):
            gradients_in_shards(model)
            for part in self._passes(model, inputs):
                self._micro_batch_loss(model, part).backward()
            gradients = self._gradients()
        if averaged and not is_sharded(model):
            gradients = [self._reduce(g, "mean") for g in gradients]
        return gradients

    @torch.no_grad()
    def _objective_only(self, model: nn.Module) -> float:
        with self.compute_loss_context_manager():
            values = [
                weight * float(self._objective(model, part).sum())
                for weight, part in self._micro_batches()
            ]
        reshard(model)
        return self._sum_over_processes(sum(values) / self.meta_batch_size)

    # -- curvature ---------------------------------------------------------------------------

    def _midpoint_change(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        directions: Sequence[Tensor],
        eta: float,
    ) -> list[Tensor]:
        """Return grad L(theta') - grad L(theta) of one micro-batch, averaged over processes."""
        if self.meta_curvature != "exact":
            return self._change_by_differences(model, inputs, directions, eta)
        total: list[Tensor] = []
        with _unsynchronised(model):
            for part in self._passes(model, inputs):
                change = midpoint_change(
                    partial(self._micro_batch_loss, model, part),
                    self._trainable(),
                    directions,
                    meta_learning_rate=eta,
                )
                total = [t + c for t, c in zip(total, change, strict=True)] if total else change
        return [self._reduce(c, "mean") for c in total]

    def _change_by_differences(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        directions: Sequence[Tensor],
        eta: float,
    ) -> list[Tensor]:
        """As `_midpoint_change`, from gradients averaged so that all processes try equal steps."""
        change, self._radius["L"] = midpoint_change_by_differences(
            lambda: self._pair_gradient(model, inputs, averaged=True),
            self._trainable(),
            directions,
            meta_learning_rate=eta,
            compute_type=self._compute_type,
            radius=self._radius.get("L"),
        )
        return change

    def _objective_product(
        self, model: nn.Module, vectors: Sequence[Tensor], signs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return H_J v over the global meta batch; `signs` are those of the step's grad J."""
        parameters = self._trainable()
        if self.meta_curvature != "exact":

            def gradient() -> list[Tensor]:
                with held_signs(signs):
                    return self._objective_gradient(model)[1]

            product, self._radius["J"] = finite_difference_product(
                gradient,
                parameters,
                vectors,
                compute_type=self._compute_type,
                radius=self._radius.get("J"),
            )
            return product
        total = [torch.zeros_like(p) for p in parameters]
        with _unsynchronised(model):
            for weight, part in self._micro_batches():
                products = hessian_vector_product(
                    partial(self._part_of_objective, model, weight, part),
                    parameters,
                    vectors,
                )
                total = [t + p for t, p in zip(total, products, strict=True)]
        return [self._reduce(t, "sum") for t in total]

    # -- small helpers -----------------------------------------------------------------------

    def _log_meta(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _trainable(self) -> list[nn.Parameter]:
        reshard(self.model)  # an evaluation may have left gathered copies
        return [p for p in self.model.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        """Return the parameters' gradients; zeros for parameters without one."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainable()]

    @contextmanager
    def _gradients_set_aside(self) -> Iterator[None]:
        """Empty `.grad` inside the context and restore it on exit."""
        parameters = self._trainable()
        held = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in zip(parameters, held, strict=True):
                p.grad = gradient

    @contextmanager
    def _draws_given_back(self) -> Iterator[None]:
        """Restore the random state on exit.

        Should a model draw random numbers despite our settings, compared gradients still belong to
        one function, and diagnostics do not change the step.
        """
        device = self.args.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield

    def _reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, reduction=reduction)

    def _sum_over_processes(self, value: float) -> float:
        return float(self._reduce(torch.tensor(value, device=self.args.device), "sum"))

    def _step(self) -> int:
        return int(self.state.global_step)

    def _seed_of_step(self) -> int:
        return int(self.args.seed) * 1_000_003 + self._step()

    def _add_to_gradients(self, changes: Sequence[Tensor]) -> None:
        """Add changes to `.grad`, rounded stochastically in bf16 so that small ones count."""
        for p in self._trainable():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        add_unbiased_(self._gradients(), changes, seed=self._seed_of_step())


def _unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Keep DDP's gradients local to the process in backward passes inside the context."""
    no_sync: Any = getattr(model, "no_sync", nullcontext)
    return no_sync()
