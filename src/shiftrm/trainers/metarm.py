"""MetaRM as a drop-in for `trl.RewardTrainer`: preference pairs and unlabelled response groups."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.losses import difference_loss
from shiftrm.meta import (
    AdaptiveState,
    ascend_,
    global_norm,
    influence,
    look_ahead,
    meta_directions,
)
from shiftrm.prefix import SharedRows, pack
from shiftrm.trainers.meta_groups import MetaGroups, TokenGroup
from shiftrm.trainers.metarm_config import PRESETS, MetaRMConfig
from shiftrm.trainers.reward import RewardTrainer

__all__ = ["PRESETS", "MetaRMConfig", "MetaRMTrainer"]

logger = logging.getLogger(__name__)

META_STATE_FILE = "meta_state.safetensors"
"""Beside a checkpoint's optimizer state: Adam's moments of grad J (meta_step "adaptive")."""


class MetaRMTrainer(RewardTrainer):
    """Trains a reward model on pairs so that it stays sharp on responses nobody labelled.

    Each optimizer step: grad J once, over a global meta batch of groups; all micro-batches of pairs
    then see the same theta'; their gradient is applied to theta (METHODS section 1, Algorithm 1).

    Args:
        meta_dataset: groups `{"prompt", "responses", "finished"?}`, strings or chat messages: K
            responses of the *current* policy to one prompt.
        Everything else: as in `RewardTrainer`, with `args` a `MetaRMConfig`.

    Raises:
        UserError: no or unusable groups, or a distributed mode the meta step is not proven in.
    """

    def __init__(
        self,
        model: Any,
        args: MetaRMConfig | None = None,
        *trl_arguments: Any,
        meta_dataset: Iterable[dict[str, Any]] | None,
        **trl_keywords: Any,
    ) -> None:
        args = args if args is not None else MetaRMConfig("metarm-output")
        _check_arguments(args)
        super().__init__(model, args, *trl_arguments, **trl_keywords)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "MetaRMTrainer runs on one process or under DDP; with DeepSpeed or FSDP the "
                "parameters are sharded while the meta step moves them, which is not supported yet"
            )
        self._groups = MetaGroups(
            meta_dataset, self.processing_class, max_length=args.max_length, seed=args.seed
        )
        self._shift: ExitStack | None = None
        self._adaptive_state = AdaptiveState()
        world = self.accelerator.num_processes
        pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        self.meta_batch_size = args.meta_batch_size or pairs_per_step
        if self.meta_batch_size < world:
            raise UserError(
                f"meta_batch_size is {self.meta_batch_size} on {world} processes; "
                "each process needs a group"
            )

    # -- one optimizer step ------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        base_gradient = None
        if self._shift is None:  # the first micro-batch of an optimizer step
            diagnosing = self._diagnosing()
            directions = self._meta_directions(model)
            if diagnosing:
                base_gradient = self._base_gradient(model, inputs)
            self._look_ahead(directions)
            if diagnosing:
                self._metrics["train"]["meta_objective_after"].append(self._objective_only(model))
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._return_to_theta()
            raise
        if base_gradient is not None:
            change = influence(self._gradients(), base_gradient)
            self._metrics["train"]["meta_influence"].append(change)
        if self.accelerator.sync_gradients:  # the last micro-batch: clip and step happen at theta
            self._return_to_theta()
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._return_to_theta()
        if self.args.deploy == "adapted":
            self.adapt_()
        return output

    def adapt_(self) -> None:
        """One further ascent in place: theta becomes theta' for the next meta batch (Eq. 3).

        Logs J of that batch before and after. If grad J is not finite, theta stays, with a warning.
        """
        directions = self._meta_directions(self.model_wrapped)
        before = self._metrics["train"].pop("meta_objective", [])
        self._metrics["train"].clear()
        ascend_(self._trainable(), directions, meta_learning_rate=self.args.meta_learning_rate)
        if before:
            after = self._objective_only(self.model_wrapped)
            self.log({"deploy_objective_before": before[0], "deploy_objective_after": after})

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved or evaluated at theta'.

        Steps end at theta anyway; a streamed epoch can end in the middle of one. Its next
        micro-batch then looks ahead again, from the same theta on the same groups.
        """
        self._return_to_theta()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _look_ahead(self, directions: list[Tensor]) -> None:
        self._shift = ExitStack()
        self._shift.enter_context(
            look_ahead(
                self._trainable(), directions, meta_learning_rate=self.args.meta_learning_rate
            )
        )

    def _return_to_theta(self) -> None:
        if self._shift is not None:
            self._shift.close()
            self._shift = None

    # -- grad J ------------------------------------------------------------------------------

    def _meta_directions(self, model: nn.Module) -> list[Tensor]:
        """grad J on this step's meta batch, turned into a direction; zeros if not finite."""
        objective, gradients = self._objective_gradient(model)
        directions, skipped = meta_directions(
            gradients, meta_step=self.args.meta_step, state=self._adaptive_state
        )
        metrics = self._metrics["train"]
        metrics["meta_skipped"].append(float(skipped))
        if skipped:
            logger.warning("step %d: grad J is not finite; meta step skipped", self._step())
        else:
            metrics["meta_objective"].append(objective)
            metrics["meta_gradient_norm"].append(float(global_norm(gradients)))
        return directions

    def _objective_gradient(self, model: nn.Module) -> tuple[float, list[Tensor]]:
        """J and its gradient over the global meta batch, in micro-batches.

        The sum over processes is taken by hand: under gradient accumulation DDP itself would not
        synchronise here.
        """
        total = 0.0
        model.train()  # as for the pairs; dropout is switched off
        with self._gradients_set_aside(), _unsynchronised(model):
            for micro_batch in self._micro_batches():
                with self.compute_loss_context_manager():
                    objective = self._objective(model, micro_batch).sum() / self.meta_batch_size
                objective.backward()
                total += float(objective.detach())
            gradients = self._gradients()
        return self._sum_over_processes(total), [self._reduce(g, "sum") for g in gradients]

    def _objective(self, model: nn.Module, groups: Sequence[TokenGroup]) -> Tensor:
        """J of each group (Eq. 2), shape [B]."""
        rows = pack(groups, pad_token_id=self.processing_class.pad_token_id)
        rows = SharedRows(*(tensor.to(self.args.device) for tensor in rows))
        return difference_loss(self._group_rewards(model, rows), mask=rows.exists)  # Eq. 2

    def _micro_batches(self) -> list[list[TokenGroup]]:
        """This process's share of the step's groups, in micro-batches."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        groups = self._groups.batch(self._step(), self.meta_batch_size)[rank::world]
        size = self.args.per_device_train_batch_size
        return [groups[i : i + size] for i in range(0, len(groups), size)]

    # -- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._adaptive_state.steps and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self._step()}"
            save_file(self._adaptive_state.tensors(), folder / META_STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With the optimizer's state comes the meta step's own, so that resuming is exact."""
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / META_STATE_FILE
        if checkpoint is not None and path.is_file():
            self._adaptive_state = AdaptiveState.from_tensors(
                load_file(path, device=str(self.args.device))
            )

    # -- diagnostics -------------------------------------------------------------------------

    def _diagnosing(self) -> bool:
        """At the first step and before every logging step: it costs a forward and a gradient."""
        every = max(1, int(self.state.logging_steps or 1))
        return self._step() == 0 or (self._step() + 1) % every == 0

    def _base_gradient(self, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
        """grad L(theta) on the first micro-batch, to compare with grad L(theta')."""
        with self._gradients_set_aside(), _unsynchronised(model):
            with self.compute_loss_context_manager():
                losses, *_ = self._pair_losses(model, self._prepare_inputs(inputs))
            (losses.mean() / self.current_gradient_accumulation_steps).backward()
            gradients = self._gradients()
        if self.accelerator.sync_gradients:  # then the shifted gradient is an average, too
            gradients = [self._reduce(g, "mean") for g in gradients]
        return gradients

    @torch.no_grad()
    def _objective_only(self, model: nn.Module) -> float:
        with self.compute_loss_context_manager():
            values = [float(self._objective(model, part).sum()) for part in self._micro_batches()]
        return self._sum_over_processes(sum(values) / self.meta_batch_size)

    # -- small helpers -----------------------------------------------------------------------

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        """The parameters' gradients; zeros where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainable()]

    @contextmanager
    def _gradients_set_aside(self) -> Iterator[None]:
        """Inside, `.grad` is empty; outside it is what it was, whatever was accumulated."""
        parameters = self._trainable()
        held = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in zip(parameters, held, strict=True):
                p.grad = gradient

    def _reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, reduction=reduction)

    def _sum_over_processes(self, value: float) -> float:
        return float(self._reduce(torch.tensor(value, device=self.args.device), "sum"))

    def _step(self) -> int:
        return int(self.state.global_step)


def _unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside leave DDP's gradients local to the process."""
    no_sync: Any = getattr(model, "no_sync", nullcontext)
    return no_sync()


def _check_arguments(args: Any) -> None:
    if not isinstance(args, MetaRMConfig):
        raise UserError(
            f"args is a {type(args).__name__}; MetaRMTrainer takes a MetaRMConfig, which has all "
            "of RewardConfig's fields"
        )
    if not args.disable_dropout:
        raise UserError(
            "disable_dropout=False: MetaRM compares gradients at theta and theta', so dropout "
            "is off during both; leave disable_dropout at True"
        )
    if args.fp16:
        raise UserError(
            "fp16=True: the gradient of J would need loss scaling of its own; use bf16=True"
        )
