"""The settings of `shiftrm sft` and `shiftrm optimise`: TRL's and PPO's, with additions."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trl

from shiftrm.errors import UserError, suggest
from shiftrm.models.sampling import SamplingConfig
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.refused import refused
from shiftrm.trainers.machine import fit_machine

__all__ = [
    "DPOConfig",
    "GRPOConfig",
    "PPOSettings",
    "RLOOConfig",
    "SFTConfig",
    "ppo_config",
    "refused",
]

KL_SAMPLES = "responses of the final policy on which its KL to the reference is measured; 0: none"
LONGEST_PROMPT = "prompts of more tokens are dropped and counted"

SFTConfig = trl.SFTConfig

DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
"""The losses of TRL, which rejects other names only at the first step."""


def _check_loss(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UserError(f"loss_type is {name!r}{suggest(name, list(known))}")


def _check_sampling(args: Any) -> None:
    """Check values that transformers rejects only at the first step, or never."""
    if not args.temperature > 0:
        raise UserError(f"temperature is {args.temperature}; it must be above 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p is {args.top_p}; it must be above 0 and at most 1")


@dataclass
class DPOConfig(trl.DPOConfig):
    """`trl.DPOConfig` with the settings of the KL measurement after training."""

    kl_samples: int = field(default=64, metadata={"help": KL_SAMPLES})
    max_completion_length: int = field(
        default=256, metadata={"help": "longest response, in tokens, when the KL is measured"}
    )

    def __post_init__(self) -> None:
        fit_machine(self)
        super().__post_init__()
        for name in self.loss_type:
            _check_loss(name, DPO_LOSSES)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be above 0, or nothing is learnt")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5"
            )


@dataclass
class RLOOConfig(trl.RLOOConfig):
    """`trl.RLOOConfig` with the additions of this command."""

    kl_samples: int = field(default=64, metadata={"help": KL_SAMPLES})
    max_prompt_length: int | None = field(default=None, metadata={"help": LONGEST_PROMPT})

    def __post_init__(self) -> None:
        fit_machine(self)
        super().__post_init__()
        _check_sampling(self)


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """`trl.GRPOConfig` with the additions of this command."""

    kl_samples: int = field(default=64, metadata={"help": KL_SAMPLES})
    max_prompt_length: int | None = field(default=None, metadata={"help": LONGEST_PROMPT})

    def __post_init__(self) -> None:
        fit_machine(self)
        super().__post_init__()
        _check_sampling(self)
        _check_loss(self.loss_type, GRPO_LOSSES)


@dataclass
class _PPOCommand:
    """Settings of the PPO command besides `PPOConfig`."""

    preset: str | None = field(default=None, metadata={"help": "'paper': MetaRM's settings"})
    report_to: str | list[str] = field(
        default="none", metadata={"help": "tensorboard, wandb, ...: also log steps there"}
    )
    run_name: str | None = field(default=None, metadata={"help": "name of the run for report_to"})
    kl_samples: int = field(default=64, metadata={"help": KL_SAMPLES})
    max_prompt_length: int | None = field(default=None, metadata={"help": LONGEST_PROMPT})


def _flat(*classes: Any) -> list[tuple[str, Any, Any]]:
    """Return the fields of several dataclasses, without those that are dataclasses."""
    found = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for option in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(hints[option.name]):
                copy: Any = field(default=option.default, metadata=option.metadata)
                found.append((option.name, hints[option.name], copy))
    return found


PPOSettings = dataclasses.make_dataclass(
    "PPOSettings", _flat(PPOConfig, SamplingConfig, _PPOCommand)
)
"""All settings of `shiftrm optimise ppo` in a flat list; `ppo_config` makes a `PPOConfig`."""


def ppo_config(given: Mapping[str, Any]) -> PPOConfig:
    """Make a `PPOConfig` from given values, on top of the preset if there is one.

    Args:
        given: values by field of `PPOSettings`; others are ignored.

    Raises:
        UserError: an unknown preset, or a value that the configuration refuses.
    """
    sampling = {f.name for f in dataclasses.fields(SamplingConfig)}
    own = {f.name for f in dataclasses.fields(PPOConfig)}
    preset = given.get("preset")
    try:
        drawn = {key: value for key, value in given.items() if key in sampling}
        changed = {key: value for key, value in given.items() if key in own}
        base = PPOConfig(**changed) if preset is None else PPOConfig.preset(preset, **changed)
        return dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, **drawn))
    except TypeError as error:
        raise UserError(f"PPO settings: {error}") from None
