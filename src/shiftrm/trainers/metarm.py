"""MetaRM as a drop-in for `trl.RewardTrainer`: preference pairs and unlabelled response groups."""

import functools
import logging
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import RewardConfig

from shiftrm.data.groups import check_group
from shiftrm.errors import UserError, suggest
from shiftrm.losses import difference_loss
from shiftrm.meta import (
    AdaptiveState,
    MetaStep,
    all_finite,
    ascend_,
    ascent_direction,
    global_norm,
    influence,
    look_ahead,
)
from shiftrm.rendering import encode
from shiftrm.scoring import pad_right, sequence_rewards
from shiftrm.trainers.reward import RewardTrainer

logger = logging.getLogger(__name__)

META_STATE_FILE = "meta_state.safetensors"
"""Beside a checkpoint's optimizer state: Adam's moments of grad J (meta_step "adaptive")."""

PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 to the letter; eta = alpha is said by meta_learning_rate=None.
    "paper": {"meta_step": "sgd", "meta_learning_rate": None, "deploy": "base"},
    # Ours: a step of fixed length, and the shifted parameters are what is deployed.
    "scale_free": {"meta_step": "normalized", "meta_learning_rate": 0.5, "deploy": "adapted"},
    # Ours: the other reading of the paper's text, an Adam optimizer for the meta process.
    "adaptive": {"meta_step": "adaptive", "meta_learning_rate": None, "deploy": "base"},
}


@dataclass
class MetaRMConfig(RewardConfig):
    """`trl.RewardConfig` and the meta step. Fields left at None are filled in by the preset."""

    preset: str = field(
        default="paper",
        metadata={"help": "paper (Algorithm 1), scale_free or adaptive; fills the fields below."},
    )
    meta_step: str | None = field(
        default=None,
        metadata={"help": "How grad J becomes a step: sgd, normalized or adaptive (Adam)."},
    )
    meta_learning_rate: float | None = field(
        default=None,
        metadata={"help": "eta of Eq. 3. Default of paper and adaptive: the learning rate."},
    )
    meta_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Groups per optimizer step, over all processes. Default: as many as pairs."
        },
    )
    deploy: str | None = field(
        default=None,
        metadata={
            "help": "What train() leaves in the model: base (theta, as Algorithm 1 returns) or "
            "adapted (one further ascent step)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("preset", self.preset, list(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.meta_learning_rate is None:
            self.meta_learning_rate = self.learning_rate  # the paper: eta = alpha
        _require_choice("meta_step", self.meta_step, list(get_args(MetaStep)))
        _require_choice("deploy", self.deploy, ["base", "adapted"])
        if self.meta_learning_rate < 0:
            raise UserError(f"meta_learning_rate is {self.meta_learning_rate}; it must be >= 0")
        if self.meta_batch_size is not None and self.meta_batch_size < 1:
            raise UserError(f"meta_batch_size is {self.meta_batch_size}; it must be at least 1")


def _require_choice(name: str, value: str | None, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}{suggest(str(value), choices)}")


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
        *,
        meta_dataset: Dataset | Sequence[dict[str, Any]],
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else MetaRMConfig("metarm-output")
        if not args.disable_dropout:
            raise UserError(
                "disable_dropout=False: MetaRM compares gradients at theta and theta', so dropout "
                "is off during both; leave disable_dropout at True"
            )
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "MetaRMTrainer runs on one process or under DDP; with DeepSpeed or FSDP the "
                "parameters are sharded while the meta step moves them, which is not supported yet"
            )
        switch_off_dropout(self.model)
        self._groups = _encode_groups(meta_dataset, self.processing_class, args.max_length)
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
        first = self._shift is None
        base_gradient = None
        if first:
            directions = self._meta_directions(model)
            if self._diagnosing():
                base_gradient = self._base_gradient(model, inputs)
            self._look_ahead(directions)
            if self._diagnosing():
                self._metrics["train"]["meta_objective_after"].append(self._objective_only(model))
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._return_to_theta()
            raise
        if base_gradient is not None:
            self._record_influence(base_gradient)
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
        """One further ascent in place: theta becomes theta' for the next meta batch (Eq. 3)."""
        directions = self._meta_directions(self.model_wrapped)
        self._metrics["train"].clear()
        ascend_(self._trainable(), directions, meta_learning_rate=self.args.meta_learning_rate)

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
        metrics = self._metrics["train"]
        finite = all_finite(gradients)
        metrics["meta_skipped"].append(0.0 if finite else 1.0)
        if not finite:
            logger.warning("step %d: grad J is not finite; meta step skipped", self._step())
            return [torch.zeros_like(g) for g in gradients]
        metrics["meta_objective"].append(objective)
        metrics["meta_gradient_norm"].append(float(global_norm(gradients)))
        return ascent_direction(
            gradients, meta_step=self.args.meta_step, state=self._adaptive_state
        )

    def _objective_gradient(self, model: nn.Module) -> tuple[float, list[Tensor]]:
        """J and its gradient over the global meta batch, in micro-batches.

        Backward runs into `.grad`, which is empty at this point, and is averaged over processes
        by hand: under gradient accumulation DDP itself would not synchronise here.
        """
        groups = self._meta_batch()
        total = 0.0
        model.train()  # as for the pairs; dropout is switched off
        with _unsynchronised(model):
            for micro_batch in self._micro_batches(groups):
                with self.compute_loss_context_manager():
                    objective = self._objective(model, micro_batch).sum() / len(groups)
                objective.backward()
                total += float(objective.detach())
        gradients = self._take_gradients()
        if self.accelerator.num_processes > 1:
            gradients = [self.accelerator.reduce(g, reduction="mean") for g in gradients]
        return total, gradients

    def _objective(self, model: nn.Module, groups: Sequence[list[list[int]]]) -> Tensor:
        """J of each group (Eq. 2), shape [B]."""
        K = max(len(group) for group in groups)
        ids, mask = pad_right(
            [sequence for group in groups for sequence in group],
            pad_token_id=self.processing_class.pad_token_id,
            device=self.args.device,
        )
        rewards = sequence_rewards(model, ids, mask)
        exists = torch.tensor(
            [[k < len(group) for k in range(K)] for group in groups], device=rewards.device
        )
        rewards_BK = rewards.new_zeros(exists.shape).masked_scatter(exists, rewards)
        return difference_loss(rewards_BK, mask=exists)  # Eq. 2

    def _micro_batches(self, groups: list[list[list[int]]]) -> list[list[list[list[int]]]]:
        size = self.args.per_device_train_batch_size
        return [groups[i : i + size] for i in range(0, len(groups), size)]

    def _meta_batch(self) -> list[list[list[int]]]:
        """This process's groups of the present step: a function of seed and step alone.

        So a resumed run draws what a straight one would, and the global random state is untouched.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        m, n = self.meta_batch_size, len(self._groups)
        chosen = []
        for position in range(self._step() * m, (self._step() + 1) * m):
            epoch, place = divmod(position, n)
            chosen.append(self._groups[_permutation(n, self.args.seed, epoch)[place]])
        return chosen[rank::world]

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
        with _unsynchronised(model), self.compute_loss_context_manager():
            loss, _ = self._pair_loss(model, self._prepare_inputs(inputs))
            (loss / self.current_gradient_accumulation_steps).backward()
        return self._take_gradients()

    def _record_influence(self, base: list[Tensor]) -> None:
        shifted = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainable()]
        self._metrics["train"]["meta_influence"].append(influence(shifted, base))

    @torch.no_grad()
    def _objective_only(self, model: nn.Module) -> float:
        groups = self._meta_batch()
        with self.compute_loss_context_manager():
            values = [self._objective(model, part).sum() for part in self._micro_batches(groups)]
        return float(sum(values)) / len(groups)

    # -- small helpers -----------------------------------------------------------------------

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _take_gradients(self) -> list[Tensor]:
        """The parameters' gradients, which are then cleared; zeros where there is none."""
        parameters = self._trainable()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return gradients

    def _step(self) -> int:
        return int(self.state.global_step)


def _unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside leave DDP's gradients local to the process."""
    no_sync: Any = getattr(model, "no_sync", nullcontext)
    return no_sync()


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _encode_groups(
    groups: Dataset | Sequence[dict[str, Any]], tokenizer: Any, max_length: int | None
) -> list[list[list[int]]]:
    """Token ids of every response of every group; over-long responses are dropped and counted."""
    encoded: list[list[list[int]]] = []
    dropped = small = 0
    for index, row in enumerate(groups):
        check_group(row, f"meta_dataset, row {index}")
        finished = row.get("finished") or [True] * len(row["responses"])
        sequences = [
            encode(tokenizer, row["prompt"], response, finished=done)
            for response, done in zip(row["responses"], finished, strict=True)
        ]
        kept = [s for s in sequences if max_length is None or len(s) <= max_length]
        dropped += len(sequences) - len(kept)
        if len(kept) >= 2:
            encoded.append(kept)
        else:
            small += 1
    if dropped:
        logger.warning(
            "meta data: dropped %d responses longer than max_length=%s tokens, and %d groups left "
            "with fewer than two; %d groups left",
            dropped,
            max_length,
            small,
            len(encoded),
        )
    if not encoded:
        raise UserError("meta_dataset has no group with two responses within max_length")
    return encoded


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, also those that attention layers keep as plain numbers.

    TRL's `disable_dropout` reaches `nn.Dropout` modules only; `attention_dropout` of Llama-like
    models is a float passed to the attention function whenever the module is in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
