"""Reward shaping of PPO, selected by `PPOConfig.reward_shaping`.

A shaping function `(rewards_B, references_BR) -> shaped_B` maps the reward of each response to the
score that PPO maximises. `references_BR` holds the rewards of `REFERENCES` responses of the
reference policy to the same prompt. Rewards are as the reward model gives them: `reward_mean` and
`reward_std` do not apply. To add a function, register it here, or name your own as
`package.module:function`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shiftrm.errors import UserError
from shiftrm.registry import Registry

__all__ = ["REFERENCES", "SHAPINGS", "Shaping", "shape"]

Shaping = Callable[[Tensor, Tensor], Tensor]

SHAPINGS: Registry[Shaping] = Registry("reward shaping")

REFERENCES = 8
"""Responses of the reference policy per prompt that a shaping function compares with."""


def shape(name: str, rewards_B: Tensor, references_BR: Tensor) -> Tensor:
    """Call the shaping function of this name and check its result.

    Raises:
        UserError: unknown function, or its result does not have the shape of the rewards.
    """
    shaped = SHAPINGS.get(name)(rewards_B, references_BR)
    if not isinstance(shaped, Tensor) or shaped.shape != rewards_B.shape:
        raise UserError(
            f"reward shaping {name!r}: must return a tensor of shape {tuple(rewards_B.shape)} like "
            "the rewards"
        )
    return shaped


@SHAPINGS.register("none")
def none(rewards_B: Tensor, references_BR: Tensor) -> Tensor:
    """Return the rewards. PPO then samples no references."""
    return rewards_B


@SHAPINGS.register("log_sigmoid")
def log_sigmoid(rewards_B: Tensor, references_BR: Tensor, *, quantile: float = 0.85) -> Tensor:
    """Return `log sigmoid(r - q)`, q a quantile of the reference rewards of the prompt.

    Large rewards gain little more; responses below the reference are pushed hardest.

    Source: Wang et al., arXiv 2402.00742, with their 85th percentile.
    """
    return torch.nn.functional.logsigmoid(rewards_B - references_BR.quantile(quantile, dim=1))


@SHAPINGS.register("par")
def par(rewards_B: Tensor, references_BR: Tensor) -> Tensor:
    """Return the mean over the references of `sigmoid(r - r_ref)`, between 0 and 1.

    Source: Fu et al., arXiv 2502.18770 (preference as reward).
    """
    return torch.sigmoid(rewards_B[:, None] - references_BR).mean(dim=1)


@SHAPINGS.register("clip")
def clip(rewards_B: Tensor, references_BR: Tensor) -> Tensor:
    """Limit rewards to the range of the reference rewards of the prompt. Ours."""
    low_B, high_B = references_BR.aminmax(dim=1)
    return rewards_B.clamp(low_B, high_B)
