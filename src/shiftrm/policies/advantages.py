"""Advantage estimators of PPO, selected by `PPOConfig.advantage`.

An estimator is a function `(rewards_BT, values_BT, mask_BT, *, gamma, lam, group_size)` returning
advantages and returns (the critic's targets), both of shape [B, T]. Rewards contain the KL penalty
of each token and the score of the response on its last token. Rows come in groups of `group_size`
responses to one prompt. The mask is True at response tokens, one unbroken run per row; the other
positions may hold anything, on input and on output. To add an estimator, register it here, or name
your own function as `package.module:function`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shiftrm.errors import UserError
from shiftrm.registry import Registry

__all__ = ["ADVANTAGES", "Advantage", "estimate", "gae", "leave_one_out", "reward_to_go"]

Advantage = Callable[..., tuple[Tensor, Tensor]]

ADVANTAGES: Registry[Advantage] = Registry("advantage")


def estimate(
    name: str,
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Call the estimator of this name and check the shape of its results.

    Raises:
        UserError: unknown estimator, or it does not return two tensors of shape [B, T].
    """
    function = ADVANTAGES.get(name)
    found = function(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, group_size=group_size)
    shapes = [getattr(part, "shape", None) for part in found] if isinstance(found, tuple) else []
    if shapes != [rewards_BT.shape] * 2:
        raise UserError(
            f"advantage {name!r}: must return (advantages, returns), both of shape "
            f"{tuple(rewards_BT.shape)} like the rewards"
        )
    return found


@ADVANTAGES.register("gae")
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along each response.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lam A_{t+1}`, `R_t = A_t + V_t`,
    with `V = A = 0` after the last response token.

    Args:
        rewards_BT: reward of each token, shape [B, T].
        values_BT: value of the state before each token, shape [B, T].
        mask_BT: True at response tokens, shape [B, T].
        gamma: discount per token.
        lam: 1 is Monte Carlo, 0 is one-step.
        group_size: not used.

    Returns:
        Advantages and returns, shape [B, T], 0 where the mask is False.

    Source: Schulman et al., arXiv 1506.02438, Eq. 16. Ours: a response cut off by the length
    limit ends like any other, since the reward model scored it as it stands.
    """
    mask_BT = mask_BT.to(rewards_BT.dtype)
    # Filled, not multiplied by the mask: padding may hold NaN, and 0 * NaN is NaN.
    rewards_BT = rewards_BT.masked_fill(mask_BT == 0, 0.0)
    values_BT = values_BT.masked_fill(mask_BT == 0, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT)
    advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = mask_BT[:, t] * (delta_B + gamma * lam * advantage_B)  # Eq. 16
        advantages_BT[:, t] = advantage_B
        next_value_B = values_BT[:, t]
    return advantages_BT, advantages_BT + values_BT


@ADVANTAGES.register("reward_to_go")
def reward_to_go(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Discounted sum of the rewards from each token on, without a critic: `A_t = R_t`.

    `R_t = r_t + gamma R_{t+1}`. Values, `lam` and `group_size` are not used.

    Source: Williams, Machine Learning 8 (1992), REINFORCE.
    """
    returns_BT, _ = gae(rewards_BT, torch.zeros_like(values_BT), mask_BT, gamma=gamma, lam=1.0)
    return returns_BT, returns_BT


@ADVANTAGES.register("leave_one_out")
def leave_one_out(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """A response's return minus the mean return of the other responses to its prompt, per token.

    `A_it = R_i - 1/(K-1) sum_{j != i} R_j`, with `R_i = sum_t gamma^t r_it`. Values and `lam` are
    not used.

    Raises:
        UserError: one response per prompt, so there are no others.

    Source: Ahmadian et al., arXiv 2402.14740 (RLOO). Ours: the PPO loss around it.
    """
    if group_size < 2:
        raise UserError("advantage 'leave_one_out' needs rollouts_per_prompt of at least 2")
    returns_BT, _ = reward_to_go(rewards_BT, values_BT, mask_BT, gamma=gamma)
    first_B = mask_BT.int().argmax(dim=1)
    returns_GK = returns_BT.gather(1, first_B[:, None]).view(-1, group_size)
    others_GK = (returns_GK.sum(dim=1, keepdim=True) - returns_GK) / (group_size - 1)
    advantages_BT = (returns_GK - others_GK).view(-1, 1).expand_as(returns_BT)
    return advantages_BT.masked_fill(~mask_BT, 0.0), returns_BT
