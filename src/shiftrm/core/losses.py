"""The losses of reward modelling, as pure functions on tensors (torch only).

Notation: `B` pairs or groups in a batch, `K` responses in a group, `T` tokens, `V` words in the
vocabulary. Every loss returns per-example values of shape [B]; the caller takes the mean.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftrm.core.objectives import difference_loss

__all__ = [
    "TokenReduction",
    "bradley_terry_loss",
    "difference_loss",
    "effective_sample_size",
    "off_policy_weights",
    "preference_policy_loss",
    "response_log_likelihood",
    "reward_model_loss",
    "reward_weighted_loss",
    "reward_weights",
    "sum_to_zero_penalty",
    "text_regularisation",
]

TokenReduction = Literal["sum", "mean"]
"""How to reduce token log-probabilities per response; see `response_log_likelihood`."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of the preferred response (Eq. 1).

    `L = -log sigmoid(r(x, y_w) - r(x, y_l) - margin)`, computed without overflow for large
    differences.

    Args:
        chosen: rewards of the preferred responses, shape [B], any float type.
        rejected: rewards of the other responses, shape [B].
        margin: by how much the preferred one should be better, shape [B] (Llama 2's extension, as
            in TRL; not in the MetaRM papers). Default: none.

    Returns:
        Losses in nats, shape [B].

    Raises:
        ValueError: shapes differ.

    Source: Dou et al., arXiv 2405.00438, Eq. 1; the caller's mean is its expectation.
    """
    _require_same_shape(chosen=chosen, rejected=rejected, margin=margin)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)  # Eq. 1


def reward_model_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    centring: float | None = None,
) -> Tensor:
    """Return the loss of each pair as reward training and its evaluation define it, shape [B].

    `weight (bradley_terry_loss + centring (chosen + rejected)^2)`.

    Args:
        chosen, rejected, margin: see `bradley_terry_loss`.
        weight: of each pair, shape [B]. Default: 1.
        centring: `center_rewards_coefficient`. Default: none.

    Source: the second term is Eisenstein et al., arXiv 2312.09244, Eq. 2, as in TRL.
    """
    losses = bradley_terry_loss(chosen, rejected, margin=margin)  # Eq. 1
    if centring is not None:
        losses = losses + centring * (chosen + rejected).pow(2)
    return losses if weight is None else losses * weight


def response_log_likelihood(
    logits_BTV: Tensor,
    input_ids_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    reduction: TokenReduction = "sum",
) -> Tensor:
    """Return log pi(y|x), the log-probability of the response's tokens given all before them.

    Args:
        logits_BTV: a causal language model's logits, shape [B, T, V]; those at t predict t + 1.
            Computations use at least fp32.
        input_ids_BT: the tokens, shape [B, T].
        response_mask_BT: True at the tokens of y, shape [B, T]. Token 0 never counts, because no
            logits predict it.
        reduction: "sum" follows the papers, where log pi(y|x) refers to the whole response. "mean"
            (ours) divides by the number of response tokens, so that long responses do not weigh
            more than short ones.

    Returns:
        Log-likelihoods in nats, shape [B].

    Raises:
        ValueError: shapes do not match, or a row has no response token.
    """
    _require_same_shape(input_ids=input_ids_BT, response_mask=response_mask_BT)
    if logits_BTV.shape[:2] != input_ids_BT.shape:
        raise ValueError(
            f"logits {tuple(logits_BTV.shape)} do not fit tokens {tuple(input_ids_BT.shape)}"
        )
    if reduction not in get_args(TokenReduction):
        raise ValueError(f"reduction is {reduction!r}; expected one of {get_args(TokenReduction)}")
    # Shift tokens left, onto the logits that predict them; the last logits predict nothing.
    # Slicing the logits instead would copy them.
    mask = F.pad(response_mask_BT[:, 1:].bool(), (0, 1), value=False)
    targets = F.pad(input_ids_BT[:, 1:], (0, 1), value=0).masked_fill(~mask, 0)
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} has no response token after its first token")
    logits = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    token = -F.cross_entropy(logits, targets.flatten(), reduction="none").view(mask.shape)
    total = token.masked_fill(~mask, 0.0).sum(dim=1)
    return total if reduction == "sum" else total / mask.sum(dim=1)


def effective_sample_size(weights: Tensor) -> float:
    """Return `(sum w)^2 / sum w^2` of weights [B]: B if all are equal, 1 if only one is nonzero."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def off_policy_weights(
    policy_B2: Tensor, reference_B2: Tensor, *, alpha: float, scale: float
) -> Tensor:
    """Return importance weights that make the pairs count as if the policy had written them.

    `w = exp(m (u_c + u_l))` with `u = log pi_t(y|x) - log(a pi_t(y|x) + (1 - a) pi_0(y|x))`, the
    logarithm of the relative density ratio, which is at most log(1/a).

    Args:
        policy_B2: log pi_t of the chosen and the rejected response, today's policy, shape [B, 2].
        reference_B2: log pi_0, the policy that wrote the pairs, shape [B, 2].
        alpha: a in (0, 1]; at 1 all weights are 1.
        scale: m >= 0; below 1 it brings the weights of whole responses, whose logarithms add up
            over tokens, closer together.

    Returns:
        Weights with mean 1, shape [B]: only their ratios matter to the minimiser, and with mean 1
        the learning rate keeps its meaning.

    Raises:
        ValueError: shapes differ, or a value outside its range.

    Source: Ackermann et al., arXiv 2507.15507 (a = 0.1; m = 0.001 to 0.01). The mean of 1 is ours.
    """
    _require_same_shape(policy=policy_B2, reference=reference_B2)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in (0, 1]")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be at least 0")
    a = torch.tensor(alpha, dtype=policy_B2.dtype, device=policy_B2.device)
    mixture_B2 = torch.logaddexp(a.log() + policy_B2, torch.log1p(-a) + reference_B2)
    u_B2 = policy_B2 - mixture_B2
    return len(u_B2) * torch.softmax(scale * u_B2.sum(dim=1), dim=0)  # exp(m (u_c + u_l))


def sum_to_zero_penalty(
    rewards_B2: Tensor,
    *,
    mean: Tensor | float,
    pairs: float,
    coefficient: float,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Return each pair's share of the batch-wise sum-to-zero penalty, `lambda B rbar^2`.

    rbar is the mean of all 2B rewards of an optimizer step of B pairs. The square does not split
    into pairs, so a pair's share is its tangent at the step's mean m, `lambda B (2 m s - m^2)` with
    s the mean reward of the pair. The mean of the shares over the step's pairs has the penalty's
    value and gradient if m is rbar, however the step is cut into micro-batches.

    Args:
        rewards_B2: rewards of chosen and rejected responses, shape [B, 2].
        mean: m, the mean reward of the whole step; a constant.
        pairs: B, the pairs of the whole step.
        coefficient: lambda.
        weight: of each pair, shape [B]. A pair of weight 2 counts as two: B in the penalty is then
            the sum of the step's weights, and m must be the weighted mean; `pairs` stays a count,
            because the mean of the shares is still over the pairs.

    Returns:
        Shape [B].

    Source: Hong et al., arXiv 2505.07271 (lambda = 1e-3). Their code takes B and the mean of the
    micro-batch of one process; ours are those of the optimizer step.
    """
    pair_B = rewards_B2.mean(dim=1)
    return coefficient * pairs * weight * (2 * mean * pair_B - mean**2)  # lambda B rbar^2


def text_regularisation(
    reward_loss: Tensor,
    log_likelihood: Tensor,
    *,
    alpha: float,
    beta: float,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Return the reward loss with a loss that keeps the hidden states able to write text.

    `(1 - alpha) L + alpha (-log sigmoid(beta log pi(y_w|x)))`: DPO's loss of the chosen response
    alone, without a reference.

    Args:
        reward_loss: L, the Bradley-Terry loss of each pair, shape [B].
        log_likelihood: log pi(y_w|x) of the chosen response by a language-model head on the reward
            model's hidden states, summed over its tokens, shape [B].
        alpha, beta: the weight of the text, in [0, 1], and its temperature, > 0.
        weight: of each pair, shape [B], a factor that L already has.

    Source: Yang et al., arXiv 2406.10216, "SFT regularisation" (alpha = 0.01, beta = 0.1).
    """
    _require_same_shape(reward_loss=reward_loss, log_likelihood=log_likelihood)
    text = -F.logsigmoid(beta * log_likelihood) * weight
    return (1 - alpha) * reward_loss + alpha * text


def reward_weights(rewards: Tensor, *, beta: float, normalize: bool = False) -> Tensor:
    """Return the weights R of reward-weighted likelihood: `exp(r / beta)`.

    Args:
        rewards: r_phi(x, y) of a batch, shape [B], any float type.
        beta: temperature in units of reward, > 0; smaller values favour the best examples more.
        normalize: divide by the batch mean, so that the weights' mean is 1 and a constant added to
            all rewards changes nothing. Computed as B * softmax(r / beta), which subtracts the
            largest reward first, so it cannot overflow.

    Returns:
        Weights, dimensionless, shape [B]; differentiable in the rewards.

    Raises:
        ValueError: beta is not positive, rewards have another shape, or a weight is not finite (the
            message names the example). In fp32, `exp` overflows beyond r/beta = 88.

    Source: Jia, arXiv 2402.14760, R_t of Proposition 1. The normalised variant is ours.
    """
    _require_positive(beta=beta)
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards must have shape [B], got {tuple(rewards.shape)}")
    if normalize:
        weights = len(rewards) * torch.softmax(rewards / beta, dim=0)
        # One bad reward makes every weight NaN; name the bad reward.
        bad = ~torch.isfinite(rewards if not bool(torch.isfinite(weights).all()) else weights)
    else:
        weights = torch.exp(rewards / beta)  # Proposition 1's R_t
        bad = ~torch.isfinite(weights)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        reward = float(rewards[index])
        cause = (
            "use normalised weights or a larger beta"
            if abs(reward) < float("inf")
            else "the reward model's output is not finite"
        )
        raise ValueError(
            f"example {index}: its weight exp(r/beta) is not finite (reward {reward:g}, "
            f"beta {beta:g}); {cause}"
        )
    return weights


def reward_weighted_loss(
    log_likelihood: Tensor, rewards: Tensor, *, beta: float, normalize: bool = False
) -> Tensor:
    """Return the reward-weighted negative log-likelihood, the inner loss of the bilevel method.

    `l = -R log pi_theta(y|x)` with `R = exp(r_phi(x, y) / beta)`. Its minimiser over many examples
    is the optimum `pi_ref(y|x) exp(r/beta)` of the KL-regularised objective, if the data was drawn
    from pi_ref.

    Args:
        log_likelihood: log pi_theta(y|x), shape [B], from `response_log_likelihood`.
        rewards: r_phi(x, y), shape [B].
        beta, normalize: see `reward_weights`.

    Returns:
        Losses, shape [B]; differentiable in both tensors.

    Raises:
        ValueError: shapes differ, or as `reward_weights`.

    Source: Jia, arXiv 2402.14760 (R is Proposition 1's R_t); the inner loss is the mean of this
    over the batch.
    """
    _require_same_shape(log_likelihood=log_likelihood, rewards=rewards)
    return -reward_weights(rewards, beta=beta, normalize=normalize) * log_likelihood


def preference_policy_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return `l_PL = -log sigmoid(A)`, the outer loss of a policy on preference pairs.

    `A = log pi(y|x) - log pi(y'|x)` for the preferred y. Unlike DPO, it has neither a temperature
    nor a reference policy.

    Args:
        chosen: log pi(y|x) of the preferred responses, shape [B].
        rejected: log pi(y'|x) of the others, shape [B].

    Returns:
        Losses in nats, shape [B].

    Raises:
        ValueError: shapes differ.

    Source: Jia, arXiv 2402.14760, A_k of Proposition 1.
    """
    _require_same_shape(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be a positive number")


def _require_same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
