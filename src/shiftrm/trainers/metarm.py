"""MetaRM as a drop-in for `trl.RewardTrainer`: preference pairs and unlabelled response groups."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shiftrm.core.curvature import coarsest_type, kinks, relative_size
from shiftrm.core.meta import (
    AdaptiveState,
    MetaStep,
    ascend_,
    choose_meta_shift,
    global_norm,
    influence,
    look_ahead,
    meta_directions,
    second_order_term,
)
from shiftrm.core.meta_layers import per_layer, random_directions
from shiftrm.core.objectives import OBJECTIVES, recorded_signs
from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.trainers.meta_effect import EFFECTS, MetaEffect
from shiftrm.trainers.meta_groups import MetaGroups
from shiftrm.trainers.meta_state import META_STATE_FILE, MetaStepState, meta_state, read_meta_state
from shiftrm.trainers.meta_words import too_large
from shiftrm.trainers.pair_batches import without_added_nulls
from shiftrm.trainers.quantised import computed_in
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.trainers.reward_configs import PRESETS, MetaRMConfig, check_metarm
from shiftrm.trainers.sharding import (
    refuse_model_parallelism,
    reshard,
)

__all__ = ["PRESETS", "MetaRMConfig", "MetaRMTrainer"]

logger = logging.getLogger(__name__)


class MetaRMTrainer(MetaEffect, RewardTrainer):
    """Trains a reward model on pairs and keeps it discriminating on unlabelled responses.

    Each optimizer step computes grad J once, over a global meta batch of groups, evaluates all
    micro-batches of pairs at the same theta' and applies their gradient to theta (arXiv 2405.00438,
    Algorithm 1).

    Args:
        meta_dataset: groups `{"prompt", "responses", "finished"?}`, strings or chat messages: K
            responses of the *current* policy to one prompt. Or a file of groups.
        Everything else: as in `RewardTrainer`, with `args` a `MetaRMConfig`.

    Raises:
        UserError: no or unusable groups, or a distributed mode other than DDP and FSDP2.
    """

    def __init__(
        self,
        model: Any,
        args: MetaRMConfig | None = None,
        *trl_arguments: Any,
        meta_dataset: Iterable[dict[str, Any]] | str | Path | None,
        **trl_keywords: Any,
    ) -> None:
        args = args if args is not None else MetaRMConfig("metarm-output")
        check_metarm(args)
        self._meta_objective = OBJECTIVES.get(args.meta_objective)
        super().__init__(model, args, *trl_arguments, **trl_keywords)
        refuse_model_parallelism(self.accelerator, self.model)
        self._groups = MetaGroups(
            self._groups_to_read(meta_dataset),
            self.processing_class,
            limit=self._limit,
            seed=args.seed,
            vocabulary=getattr(self.model.config.get_text_config(), "vocab_size", None),
        )
        self._shift: ExitStack | None = None
        self._step_state: MetaStepState | None = None
        self._paused = False  # within a step, between two epochs of a stream
        self._radius = {}
        self._said_too_large = False
        self._choose_shift()
        self._adaptive_state = AdaptiveState()
        if args.meta_step == "effect":
            self._check_effect()
        if args.meta_direction == "random" and self.is_fsdp_enabled:
            raise UserError("meta_direction='random': not under FSDP2; use DDP or one process")
        world = self.accelerator.num_processes
        pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        self.meta_batch_size = args.meta_batch_size or pairs_per_step
        if self.meta_batch_size < world:
            raise UserError(
                f"meta_batch_size is {self.meta_batch_size} on {world} processes; "
                "each process needs a group"
            )

    def _groups_to_read(self, meta_dataset: Any) -> Any:
        """Return the groups of the meta step; a subclass may make its own."""
        if isinstance(meta_dataset, str | Path):
            return read_groups(meta_dataset)
        return without_added_nulls(meta_dataset)

    def _largest_pass(self) -> tuple[int, int, int]:
        sequences, longest, copies = super()._largest_pass()
        groups = self._groups.groups
        of_group = max(map(len, groups)) * self.args.per_device_train_batch_size
        longest = max(longest, max(len(s) for group in groups for s in group))
        if self.meta_curvature == "exact" and self._second():  # differentiating twice keeps more
            sequences, of_group = 3 * sequences, 3 * of_group
        return max(sequences, of_group), longest, copies + 3  # grad J, theta, the direction

    def _second(self) -> bool:
        """Return whether the step uses Hessian-vector products."""
        return self.meta_shift == "midpoint" or self.args.meta_order == "exact"

    def _choose_shift(self) -> None:
        """Choose how to reach theta' and compute curvature, unless the settings do.

        Under autocast fp32 parameters still move in place. A step with an influence below a few
        percent then drowns in rounding, but no more than any bf16 gradient does, and the midpoint
        would cost several gradients a step (docs/bf16-meta-step.md).
        """
        self.meta_shift = self.args.meta_shift
        if self.meta_shift == "auto":
            self.meta_shift = choose_meta_shift(self._trainable())
        sharded = self.is_fsdp_enabled
        self.meta_curvature = self.args.meta_curvature or (
            "finite_difference" if sharded else "exact"
        )
        second = self._second()
        if second and getattr(self.model, "is_loaded_in_8bit", False):
            raise UserError(
                "load_in_8bit rounds activations too, which has no second derivative; use "
                "load_in_4bit, or meta_order='first'"
            )
        if second and sharded and self.meta_curvature == "exact":
            raise UserError(
                "meta_curvature='exact': sharded parameters cannot be differentiated twice; leave "
                "it out, or set finite_difference"
            )
        self._jumps = kinks(self.model)
        if second and self.meta_curvature != "exact" and self._jumps is not None:
            raise UserError(
                f"{self._jumps}: meta_curvature='finite_difference' would be wrong; use "
                + ("meta_order='first' and fp32 weights" if sharded else "meta_curvature='exact'")
            )
        autocast_type = torch.bfloat16 if self.args.bf16 else torch.float32
        # At most fp32: norms and softmax use it whatever the weights are.
        self._compute_type = coarsest_type(computed_in(self.model), autocast_type=autocast_type)
        if self._jumps and self.meta_shift == "in_place" and not self._is_fp32():
            logger.warning("meta_influence is not measured in bf16: %s", self._jumps)

    def _is_fp32(self) -> bool:
        return torch.finfo(self._compute_type).eps <= torch.finfo(torch.float32).eps

    # -- one optimizer step ------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        base = None
        if self._step_state is None or self._paused:
            if self._step_state is None:  # the first micro-batch of an optimizer step
                self._step_state = self._begin_step(model, inputs)
            else:
                self._step_state.waiting = [g.clone() for g in self._gradients()]
                self._paused = False
            if self._diagnosing() and self.meta_shift == "in_place":
                base = self._influence_at_theta(model, inputs)
            self._look_ahead(model)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.meta_shift == "midpoint":
                self._add_midpoint_change(model, inputs)
        except BaseException:
            self._end_step()
            raise
        if base is not None:
            self._log_meta("meta_influence", influence(self._gradients_of_first(), base))
        if self.accelerator.sync_gradients:  # the last micro-batch: clip and step happen at theta
            self._return_to_theta()
            self._finish_gradient(model)
            self._end_step()
        return loss

    def _influence_at_theta(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> list[Tensor] | None:
        """Return grad L(theta) of this micro-batch, for comparison with the step's gradient.

        Returns None in bf16, where the two would differ by rounding and the change is measured
        directly.
        """
        state = self._step_state
        if state is None or state.skipped or state.eta == 0:
            self._log_meta("meta_influence", 0.0)  # theta' is theta, bit for bit
            return None
        # At the last micro-batch the shifted gradient is averaged over processes.
        averaged = self.accelerator.sync_gradients
        if self._is_fp32():
            return self._pair_gradient(model, inputs, averaged=averaged)
        if not self._jumps:
            change = self._change_by_differences(model, inputs, state.directions, state.eta)
            base = self._pair_gradient(model, inputs, averaged=True)
            self._log_meta("meta_influence", relative_size(change, base))
        return None

    def _begin_step(self, model: nn.Module, inputs: dict[str, Tensor]) -> "MetaStepState":
        """Compute grad J and the step along it; `inputs` are the step's first pairs."""
        self._radius = {}  # a resumed run tries the same steps as a straight one
        by_effect = self.args.meta_step == "effect"
        self._seen = [] if by_effect else None
        with recorded_signs() as signs:
            objective, gradients = self._objective_gradient(model)
        scaled = per_layer(gradients, self._trainable()) if self.args.meta_per_layer else gradients
        directions, skipped = meta_directions(
            scaled, meta_step=self._direction_rule(), state=self._adaptive_state
        )
        self._log_meta("meta_skipped", float(skipped))
        if skipped:
            logger.warning("step %d: grad J is not finite; meta step skipped", self._step())
        else:
            self._log_meta("meta_objective", objective)
            self._log_meta("meta_gradient_norm", float(global_norm(gradients)))
        eta = 0.0 if by_effect else self.args.meta_learning_rate
        if by_effect and not skipped:
            eta = self._length_by_effect(model, inputs, gradients, directions)
        self._seen = None
        if self.args.meta_direction == "random":
            directions = random_directions(directions, seed=self._seed_of_step())
        exact = self.args.meta_order == "exact" and not skipped
        waiting = any(p.grad is not None for p in self._trainable())
        return MetaStepState(
            directions,
            eta,
            gradients if exact else None,
            skipped,
            change=[],
            signs=signs,
            waiting=[g.clone() for g in self._gradients()] if waiting else None,
        )

    def _direction_rule(self) -> MetaStep:
        """Return how grad J becomes a direction; "effect" says how long the step is."""
        rule: MetaStep = self.args.meta_step
        return "normalized" if self.args.meta_step == "effect" else rule

    def _gradients_of_first(self) -> list[Tensor]:
        """Return what the first micro-batch of a step alone added to `.grad`."""
        gradients, state = self._gradients(), self._step_state
        if state is None or state.waiting is None:
            return gradients
        return [g - w for g, w in zip(gradients, state.waiting, strict=True)]

    def _look_ahead(self, model: nn.Module) -> None:
        """Move to theta' until `_return_to_theta`, unless rounding would lose the step."""
        state = self._step_state
        if state is None or self.meta_shift != "in_place":
            return
        self._shift = ExitStack()
        self._shift.enter_context(
            look_ahead(self._trainable(), state.directions, meta_learning_rate=state.eta)
        )
        if self._diagnosing():
            self._log_meta("meta_objective_after", self._objective_only(model))

    def _return_to_theta(self) -> None:
        if self._shift is not None:
            self._shift.close()
            self._shift = None
            reshard(self.model)

    def _end_step(self) -> None:
        self._return_to_theta()
        self._step_state, self._paused = None, False

    # -- what bf16 and the exact order add to the gradient ---------------------------------------

    def _add_midpoint_change(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Accumulate grad L(theta') - grad L(theta) of one micro-batch.

        `.grad` holds grad L(theta) of the micro-batches so far; see `meta.midpoint_change`.
        """
        state = self._step_state
        if state is None or state.skipped:
            return
        change = self._midpoint_change(model, inputs, state.directions, state.eta)
        if self._diagnosing() and not state.change:
            self._log_meta("meta_influence", relative_size(change, self._gradients_of_first()))
        for so_far, more in zip(state.change, change, strict=False):
            so_far.add_(more)
        state.change = state.change or change

    def _finish_gradient(self, model: nn.Module) -> None:
        """Add the remaining terms to the complete, averaged `.grad` at theta."""
        state = self._step_state
        if state is None:
            return
        if state.change:
            self._add_to_gradients(state.change)
        if state.objective_gradient is not None:
            term = second_order_term(
                lambda vectors: self._objective_product(model, vectors, state.signs),
                state.objective_gradient,
                self._gradients(),
                meta_learning_rate=state.eta,
                meta_step=self._direction_rule(),
                state=self._adaptive_state,
                weights=self._trainable() if self.args.meta_per_layer else None,
            )
            size = relative_size(term, self._gradients())
            self._log_meta("meta_second_order", size)
            self._add_to_gradients(term)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._end_step()
        if self.args.deploy == "adapted":
            self.adapt_()
        return output

    def adapt_(self) -> None:
        """Move theta to theta' of the next meta batch, in place (Eq. 3).

        Under `meta_step="effect"` the loss is measured on the first pairs of the data.
        Logs J of that batch before and after. If grad J is not finite, warns and keeps theta.
        """
        pairs = self._first_pairs() if self.args.meta_step == "effect" else {}
        state = self._begin_step(self.model_wrapped, pairs)
        found = {name: values[0] for name, values in self._metrics["train"].items() if values}
        self._metrics["train"].clear()
        ascend_(
            self._trainable(),
            state.directions,
            meta_learning_rate=state.eta,
            seed=self.args.seed,  # bf16 parameters are rounded at random
        )
        if not state.skipped:
            after = self._objective_only(self.model_wrapped)
            effects = {name: found.get(f"meta_{name}") for name in EFFECTS}
            more = {f"deploy_{name}": value for name, value in effects.items() if value is not None}
            before = found["meta_objective"]
            self.log({"deploy_objective_before": before, "deploy_objective_after": after, **more})

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Return to theta before saving or evaluating.

        A streamed epoch can end in the middle of a step. The next micro-batch then looks ahead
        again, from the same theta with the same directions: grad J counts once in Adam's moments.
        """
        state = self._step_state
        if state is not None:
            if state.change:
                self._add_to_gradients(state.change)
                state.change = []
            self._paused = True
        self._return_to_theta()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # -- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        kept = meta_state(self._adaptive_state, self._last_length, is_main=self.args.should_save)
        if kept:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self._step()}"
            save_file(kept, folder / META_STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also load the state of the meta step, so that resuming is exact."""
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / META_STATE_FILE
        if checkpoint is not None and path.is_file():
            self._adaptive_state, self._last_length = read_meta_state(path, self._trainable())

    # -- diagnostics -------------------------------------------------------------------------

    def _diagnosing(self) -> bool:
        """Return True only at the first step and before logging, because diagnostics are costly."""
        every = max(1, int(self.state.logging_steps or 1))
        return self._step() == 0 or (self._step() + 1) % every == 0

    def _log_meta(self, name: str, value: float) -> None:
        super()._log_meta(name, value)
        if name != "meta_influence" or self._said_too_large:
            return
        if words := too_large(value, by_effect=self.args.meta_step == "effect"):
            self._said_too_large = True
            text = "step %d: the meta step changes the gradient by %.2g of its length. %s"
            logger.warning(text, self._step(), value, words)
