"""Settings and presets of MetaRM training."""

from dataclasses import dataclass, field
from typing import Any, get_args

from shiftrm.core.curvature import Curvature
from shiftrm.core.meta import MetaOrder, MetaShift, MetaStep
from shiftrm.core.objectives import OBJECTIVES
from shiftrm.errors import UserError, suggest
from shiftrm.trainers.reward_config import RewardConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as published; meta_learning_rate=None means eta = alpha.
    "paper": {"meta_step": "sgd", "meta_learning_rate": None, "deploy": "base"},
    # Ours: a step of fixed length; the shifted parameters are deployed.
    "scale_free": {"meta_step": "normalized", "meta_learning_rate": 0.5, "deploy": "adapted"},
    # Ours: another reading of the paper, with an Adam optimizer for the meta process.
    "adaptive": {"meta_step": "adaptive", "meta_learning_rate": None, "deploy": "base"},
}


@dataclass
class MetaRMConfig(RewardConfig):
    """`RewardConfig` with the meta step; the preset fills in fields left at None."""

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

    meta_objective: str = field(
        default="difference",
        metadata={
            "help": "J, which the meta step raises on unlabelled groups: difference (Eq. 2), "
            "another name in shiftrm.core.objectives, or package.module:function."
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
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.eta_is_alpha = self.meta_learning_rate is None  # the paper's
        if self.meta_learning_rate is None:
            self.meta_learning_rate = self.learning_rate
        _require_choice("meta_step", self.meta_step, list(get_args(MetaStep)))
        OBJECTIVES.get(self.meta_objective)
        _require_choice("meta_order", self.meta_order, list(get_args(MetaOrder)))
        _require_choice("meta_shift", self.meta_shift, ["auto", *get_args(MetaShift)])
        if self.meta_curvature is not None:
            _require_choice("meta_curvature", self.meta_curvature, list(get_args(Curvature)))
        _require_choice("deploy", self.deploy, ["base", "adapted"])
        if self.meta_learning_rate is not None and self.meta_learning_rate < 0:
            raise UserError(f"meta_learning_rate is {self.meta_learning_rate}; it must be >= 0")
        if self.meta_batch_size is not None and self.meta_batch_size < 1:
            raise UserError(f"meta_batch_size is {self.meta_batch_size}; it must be at least 1")

    def fit_lora(self) -> None:
        """As `RewardConfig.fit_lora`; also update eta where it equals alpha."""
        super().fit_lora()
        if self.eta_is_alpha:
            self.meta_learning_rate = self.learning_rate


def _require_choice(name: str, value: str | None, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}{suggest(str(value), choices)}")
