"""The settings of a PPO run, with help, default and check of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.models.sampling import PAPER_SAMPLING, SamplingConfig
from shiftrm.policies.advantages import ADVANTAGES
from shiftrm.policies.shaping import SHAPINGS


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run. `PPOConfig.preset("paper")` gives MetaRM's."""

    steps: int = _option(100, "PPO steps (batches of roll-outs)")
    prompts_per_step: int = _option(16, "prompts drawn for one step")
    rollouts_per_prompt: int = _option(16, "responses sampled per prompt")
    epochs: int = _option(1, "passes over one batch of roll-outs")
    minibatch_size: int = _option(64, "sequences in one optimizer step, over all processes")
    micro_batch_size: int | None = _option(
        None, "sequences in one backward pass of a process; changes memory only; None: all at once"
    )
    learning_rate: float = _option(5e-7, "constant learning rate of the policy")
    critic_learning_rate: float = _option(1.5e-6, "constant learning rate of the critic")
    kl_coefficient: float = _option(0.05, "initial KL penalty per token, in reward per nat")
    kl_target: float | None = _option(None, "target sequence KL in nats; None: fixed coefficient")
    kl_rate: float = _option(0.2, "largest change of log kl_coefficient per step")
    kl_damping: float = _option(1.0, "damping of changes of the KL; 0: none")
    reward_mean: float | None = _option(None, "subtracted from every reward")
    reward_std: float | None = _option(None, "every reward is then divided by it")
    reward_shaping: str = _option(
        "none",
        "or log_sigmoid, par, clip, package.module:function (see policies.shaping); raw rewards "
        "are then shaped, and reward_mean and reward_std do not apply",
    )
    reward_whitening: str = _option(
        "none", "'batch': then whitened over the batch to mean 0, variance 1"
    )
    reward_clip: float | None = _option(
        None, "rewards are then clipped to +- this; not with reward_shaping"
    )
    truncation_penalty: float = _option(
        0.0, "then subtracted for responses cut off by the length limit"
    )
    advantage: str = _option(
        "gae", "or reward_to_go, leave_one_out, package.module:function (see policies.advantages)"
    )
    gamma: float = _option(1.0, "discount per token")
    gae_lambda: float = _option(0.95, "lambda of advantage=gae: 1 Monte Carlo, 0 one-step")
    clip_ratio: float = _option(0.2, "probability ratios are clipped to 1 +- this")
    value_clip: float | None = _option(0.2, "values are clipped to the old ones +- this; None: off")
    max_grad_norm: float = _option(1.0, "gradient norm clip, of policy and critic each")
    whiten_advantages: bool = _option(
        True, "whiten advantages over the batch to mean 0, variance 1"
    )
    forward_batch_size: int = _option(
        256, "sequences sampled at once and in one pass without gradient; changes the draws"
    )
    sampling: SamplingConfig = field(
        default_factory=SamplingConfig, metadata={"help": "how responses are sampled"}
    )
    gradient_checkpointing: bool = _option(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    bf16: bool = _option(False, "passes in bf16 on fp32 weights; log-probs and losses in fp32")
    save_steps: int = _option(20, "steps between checkpoints")
    seed: int = _option(0, "seed of prompts, samples and minibatches")

    def __post_init__(self) -> None:
        at_least_one = ("steps", "prompts_per_step", "rollouts_per_prompt", "epochs")
        for name in (*at_least_one, "minibatch_size", "forward_batch_size", "save_steps"):
            self._require(name, "must be at least 1", lambda v: v >= 1)
        self._require(
            "micro_batch_size", "must be at least 1, or None", lambda v: v is None or v >= 1
        )
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm", "clip_ratio"):
            self._require(name, "must be above 0", lambda v: v > 0)
        for name in ("kl_target", "reward_std", "reward_clip", "value_clip"):
            self._require(name, "must be above 0, or None", lambda v: v is None or v > 0)
        for name in ("kl_coefficient", "kl_rate", "kl_damping", "truncation_penalty"):
            self._require(name, "must not be negative", lambda v: v >= 0)
        for name in ("gamma", "gae_lambda"):
            self._require(name, "must lie in [0, 1]", lambda v: 0 <= v <= 1)
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option.name} is {value}; it must be finite")
        if self.reward_whitening not in ("none", "batch"):
            raise UserError(
                f"reward_whitening is {self.reward_whitening!r}; it must be 'none' or 'batch'"
            )
        ADVANTAGES.get(self.advantage)
        SHAPINGS.get(self.reward_shaping)
        if self.reward_shaping != "none" and self.reward_clip is not None:
            raise UserError(
                f"reward_clip is {self.reward_clip}; it is for standardised rewards, and those of "
                f"reward_shaping={self.reward_shaping} have a scale of their own: leave out one"
            )
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise UserError("kl_coefficient is 0; to reach kl_target it must start above 0")

    def _require(self, name: str, rule: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise UserError(f"{name} is {value}; it {rule}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PPOConfig":
        """A named configuration: "paper" (Dou et al., arXiv 2405.00438).

        The paper gives learning rates, roll-outs, sampling, KL coefficient and a clip value (taken
        to be the reward's); other settings keep the defaults of this class. With a
        `reward_shaping` its clip does not apply: most shaped rewards would lie at it.

        Raises:
            UserError: unknown preset or field; the message suggests the nearest name.
        """
        if name not in _PRESETS:
            raise UserError(f"unknown preset {name!r}{suggest(name, list(_PRESETS))}")
        known = [option.name for option in fields(cls)]
        for key in overrides:
            if key not in known:
                raise UserError(f"unknown PPO setting {key!r}{suggest(key, known)}")
        values = dict(_PRESETS[name])
        if overrides.get("reward_shaping", "none") != "none":
            values.pop("reward_clip", None)
        return cls(**{**values, **overrides})


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sampling": PAPER_SAMPLING,
        "rollouts_per_prompt": 16,
        "learning_rate": 5e-7,
        "critic_learning_rate": 1.5e-6,
        "kl_coefficient": 0.05,
        "reward_clip": 0.8,
    }
}
