"""Settings of reward-model and MetaRM training that TRL lacks or sets to other defaults."""

import math
from dataclasses import dataclass, field
from typing import Any, get_args

import trl

from shiftrm.core.curvature import Curvature
from shiftrm.core.meta import MetaOrder, MetaShift, MetaStep
from shiftrm.core.objectives import OBJECTIVES
from shiftrm.errors import UserError, suggest
from shiftrm.trainers.machine import fit_machine

LEARNING_RATE = 1e-5
"""The default if all weights are trained. InstructGPT's 6B reward model used 9e-6, Llama 2's 1e-5
(5e-6 at 70B), TRL's example 1e-5. TRL's default of 1e-4 is what its example uses for LoRA."""

LEARNING_RATE_LORA = 1e-4


@dataclass
class RewardConfig(trl.RewardConfig):
    """`trl.RewardConfig` with fields for how pairs are computed.

    TRL's fields keep their meaning. Three defaults depend on the machine and the way of training.
    `bf16` is on if the accelerator supports it; without an accelerator `use_cpu` is on.
    `RewardTrainer` also takes a plain `trl.RewardConfig` unchanged; prefixes are then shared.

    Attributes:
        learning_rate_given, checkpointing_given: whether they were set; if not, the trainer decides
            once the model is known.

    Raises:
        UserError: `max_steps` is 0.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Learning rate of AdamW. Default: {LEARNING_RATE:g} if all weights are "
            f"trained, {LEARNING_RATE_LORA:g} with LoRA."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, more time. "
            "Default: only if they would not fit the free memory."
        },
    )
    shared_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Compute the tokens that a pair (or group) has in common once. If the first "
            "batch shows that the model does not support it, a warning is logged and nothing is "
            "shared."
        },
    )

    max_tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "Bound on the tokens of one forward and backward pass, to bound its memory: a "
            "batch is cut into passes, with equal results. Default: a batch is one pass."
        },
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_pass is not None and self.max_tokens_per_pass < 1:
            raise UserError(
                f"max_tokens_per_pass is {self.max_tokens_per_pass}; it must be at least 1"
            )
        if self.max_steps == 0:
            raise UserError(
                "max_steps is 0; give at least 1, or leave it out to train num_train_epochs"
            )
        self.learning_rate_given = self.learning_rate is not None
        self.checkpointing_given = (
            self.gradient_checkpointing is not None or self.activation_checkpointing is not None
        )
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        fit_machine(self)
        super().__post_init__()

    def fit_lora(self) -> None:
        """Use the learning rate for adapters, unless one was given."""
        if not self.learning_rate_given:
            self.learning_rate = LEARNING_RATE_LORA


PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as published; meta_learning_rate=None means eta = alpha.
    "paper": {"meta_step": "sgd", "meta_learning_rate": None, "deploy": "base"},
    # Ours: a step of fixed length; the shifted parameters are deployed.
    "scale_free": {"meta_step": "normalized", "meta_learning_rate": 0.5, "deploy": "adapted"},
    # Ours: the length is chosen at each step by what the step does; see core.meta_effect.
    "by_effect": {"meta_step": "effect", "meta_learning_rate": None, "deploy": "adapted"},
    # Ours: another reading of the paper, with an Adam optimizer for the meta process.
    "adaptive": {"meta_step": "adaptive", "meta_learning_rate": None, "deploy": "base"},
}


@dataclass
class MetaRMConfig(RewardConfig):
    """`RewardConfig` with the meta step; the preset fills in fields left at None."""

    preset: str = field(
        default="paper",
        metadata={
            "help": "paper (Algorithm 1), by_effect, scale_free or adaptive; fills the fields "
            "below."
        },
    )
    meta_step: str | None = field(
        default=None,
        metadata={
            "help": "How grad J becomes a step: sgd, normalized, adaptive (Adam), or effect "
            "(normalized, as long as meta_effect and meta_loss_rise allow)."
        },
    )
    meta_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "eta of Eq. 3. Default of paper and adaptive: the learning rate. Not used with "
            "meta_step=effect."
        },
    )
    meta_effect: float = field(
        default=1.5,
        metadata={
            "help": "With meta_step=effect: the factor by which a step widens the reward "
            "differences (rms) of the meta batch."
        },
    )
    meta_loss_rise: float = field(
        default=0.1,
        metadata={
            "help": "With meta_step=effect: by which share a step may raise the loss on the "
            "step's first pairs; it is shortened until it does not."
        },
    )
    meta_per_layer: bool = field(
        default=False,
        metadata={
            "help": "With meta_step normalized or effect: divide the step among the layers by the "
            "size of their weights. Otherwise the score head takes nearly all of it."
        },
    )
    meta_direction: str = field(
        default="gradient",
        metadata={
            "help": "gradient, or random: a control whose step is as long in every layer, but "
            "points anywhere."
        },
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

    meta_objective: str = field(
        default="difference",
        metadata={
            "help": "J, which the meta step raises on groups: difference (Eq. 2; no labels), "
            "ordered or ordered_difference (both take each group's responses best first), or "
            "package.module:function."
        },
    )
    meta_order: str = field(
        default="first",
        metadata={
            "help": "first: grad L at theta' (Eq. 4, the paper's). exact: the gradient through the "
            "step, for one Hessian-vector product of J more."
        },
    )
    meta_shift: str = field(
        default="auto",
        metadata={
            "help": "in_place: the parameters move to theta'. midpoint: grad L(theta') - grad "
            "L(theta) is computed itself, where theta' would round away; several times slower. "
            "auto: in_place if what is trained is in fp32, else midpoint."
        },
    )
    meta_curvature: str | None = field(
        default=None,
        metadata={
            "help": "How Hessian-vector products (midpoint, exact) are made: exact differentiates "
            "twice, with plain attention and its memory; finite_difference takes any attention, "
            "checkpointing and FSDP2. Default: exact, but finite_difference under FSDP2."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("preset", self.preset, list(PRESETS))
        self.eta_given = self.meta_learning_rate is not None
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.eta_is_alpha = self.meta_learning_rate is None  # the paper's
        if self.meta_learning_rate is None:
            self.meta_learning_rate = self.learning_rate
        _require_choice("meta_step", self.meta_step, [*get_args(MetaStep), "effect"])
        OBJECTIVES.get(self.meta_objective)
        _require_choice("meta_order", self.meta_order, list(get_args(MetaOrder)))
        _require_choice("meta_shift", self.meta_shift, ["auto", *get_args(MetaShift)])
        if self.meta_curvature is not None:
            _require_choice("meta_curvature", self.meta_curvature, list(get_args(Curvature)))
        _require_choice("deploy", self.deploy, ["base", "adapted"])
        for name in ("meta_learning_rate", "meta_effect", "meta_loss_rise"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number")
        if self.meta_learning_rate is not None and self.meta_learning_rate < 0:
            raise UserError(f"meta_learning_rate is {self.meta_learning_rate}; it must be >= 0")
        if self.meta_batch_size is not None and self.meta_batch_size < 1:
            raise UserError(f"meta_batch_size is {self.meta_batch_size}; it must be at least 1")
        self._check_step()

    def _check_step(self) -> None:
        _require_choice("meta_direction", self.meta_direction, ["gradient", "random"])
        if self.meta_effect <= 1:
            raise UserError(
                f"meta_effect is {self.meta_effect}; it must be above 1, the factor by which "
                "reward differences grow"
            )
        if self.meta_loss_rise <= 0:
            raise UserError(
                f"meta_loss_rise is {self.meta_loss_rise}; it must be above 0 (0.1 allows 10 %)"
            )
        if self.meta_per_layer and self.meta_step not in ("normalized", "effect"):
            raise UserError(
                f"meta_per_layer: meta_step={self.meta_step} has no length to divide among layers; "
                "use normalized or effect"
            )
        if self.meta_direction == "random" and self.meta_order == "exact":
            raise UserError(
                "meta_direction='random' has no derivative; use it with meta_order='first'"
            )

    def fit_lora(self) -> None:
        """As `RewardConfig.fit_lora`; also update eta where it equals alpha."""
        super().fit_lora()
        if self.eta_is_alpha:
            self.meta_learning_rate = self.learning_rate


def _require_choice(name: str, value: str | None, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}{suggest(str(value), choices)}")


def check_metarm(args: Any) -> None:
    """Raise UserError for arguments with which MetaRM would not compute what it says."""
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
    if args.neftune_noise_alpha:
        raise UserError(
            "neftune_noise_alpha: noise in the embeddings differs between the two gradients that "
            "MetaRM compares; leave it out"
        )
    if args.deploy == "adapted" and args.load_best_model_at_end:
        raise UserError(
            "load_best_model_at_end chooses a checkpoint by its evaluation, and deploy='adapted' "
            "would then move it one step away; set deploy='base' or leave the choice out"
        )
    if args.fp16:
        raise UserError(
            "fp16=True: the gradient of J would need loss scaling of its own; use bf16=True"
        )
