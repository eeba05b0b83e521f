"""The equations of PPO for language models, as pure functions on tensors.

Tensors of shape [B, T] or [B, A] hold a number for each token of `ppo_rows.Rows`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftrm.models.sampling import Sample
from shiftrm.policies.ppo_passes import vocabulary_of
from shiftrm.policies.ppo_rows import Rows

_SLICE = 2**23
"""Most logits copied to fp32 at once."""


def token_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_coefficient: float,
) -> Tensor:
    """Return token rewards: the KL penalty on each, plus the score on the last response token.

    `r_t = -c (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t is last] * score`

    Args:
        scores_B: score of each whole response, shape [B].
        logprobs_BT, ref_logprobs_BT: of the sampled tokens, before the update, shape [B, T].
        mask_BT: True at response tokens, at least one a row, shape [B, T].
        kl_coefficient: c, reward per nat.

    Returns:
        Shape [B, T], 0 where the mask is False.

    Source: Ziegler et al., arXiv 1909.08593, Eq. 2, by token as in Ouyang et al., arXiv 2203.02155.
    """
    penalty_BT = -kl_coefficient * (logprobs_BT - ref_logprobs_BT)
    rewards_BT = penalty_BT.masked_fill(~mask_BT, 0.0)
    last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


def clipped_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_ratio: float,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, to be minimised: `-mean_t min(rho_t A_t, clip(rho_t, 1-e, 1+e) A_t)`.

    Args:
        logprobs_BT: of the policy being trained, shape [B, T]; the old ones are constants.
        mask_BT: True at response tokens; the mean runs over all tokens of the batch.
        clip_ratio: e.
        tokens: number of response tokens of the whole batch, if these rows are a part of it; the
            losses of the parts then add up to that of the batch. By default the rows are the batch.

    Returns:
        The loss, and the share of tokens whose ratio lies outside the clip range; both scalars.

    Source: Schulman et al., arXiv 1707.06347, Eq. 7 (negated), mean over tokens.
    """
    ratio_BT = (logprobs_BT - old_logprobs_BT).masked_fill(~mask_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)  # Eq. 7
    outside_BT = (ratio_BT.detach() - 1).abs() > clip_ratio
    return (
        masked_mean(loss_BT, mask_BT, tokens),
        masked_mean(outside_BT.to(loss_BT.dtype), mask_BT, tokens),
    )


def clipped_value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    value_clip: float | None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The critic's loss: `mean_t 1/2 max((V - R)^2, (clip(V, V_old +- c) - R)^2)`, a scalar.

    Args:
        values_BT: of the critic being trained, shape [B, T]; the old ones are constants.
        returns_BT: targets, from `gae`.
        value_clip: c, in units of reward; None is the plain squared error.
        tokens: as in `clipped_policy_loss`.

    Source: the PPO code of OpenAI's baselines, as Ziegler et al. used it; not in the PPO paper.
    """
    error_BT = (values_BT - returns_BT) ** 2
    if value_clip is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip, value_clip)
        error_BT = torch.maximum(error_BT, (near_BT - returns_BT) ** 2)
    return 0.5 * masked_mean(error_BT, mask_BT, tokens)


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over positions where the mask is True, a scalar; the others may hold anything.

    With `count`, the number of positions in the whole batch, return this part's share of its mean.
    """
    return x.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over positions where the mask is True, a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and population variance 1 over the mask; 0 elsewhere.

    Values that are all equal become 0. Source: common PPO practice; not in the PPO paper.
    """
    centred = (x - masked_mean(x, mask)).masked_fill(~mask, 0.0)
    return centred * torch.rsqrt(masked_variance(x, mask) + 1e-8)


@dataclass
class KLController:
    """The KL penalty's coefficient, steered so that the policy stays at a given KL.

    `c <- c * exp(rate * e + damping * (e - e_before))`, `e = clip((KL - target) / target, -1, 1)`.
    Without a target, c is constant.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2, which multiplies by `1 + 0.1 e` with e
    clipped at 0.2. Ours is in log space throughout, so that up and down steps undo each other, is
    clipped at 1, and has a damping term: the policy answers to a new coefficient only some steps
    later, so that the plain rule swings around its target (and overshoots it at the start).

    Attributes:
        coefficient: c, reward per nat.
        target: sequence KL to the reference, in nats; None for a constant coefficient.
        rate: largest change of log c in one update at constant KL.
        damping: change of log c when the relative error changes by 1.
    """

    coefficient: float
    target: float | None = None
    rate: float = 0.1
    damping: float = 0.0
    _before: float | None = None

    def update(self, kl: float) -> float:
        """Adjust to the measured KL (nats a sequence) and return the new coefficient."""
        if self.target is not None:
            error = max(-1.0, min(1.0, (kl - self.target) / self.target))
            change = 0.0 if self._before is None else error - self._before
            self.coefficient *= math.exp(self.rate * error + self.damping * change)
            self._before = error
        return self.coefficient


@torch.no_grad()
def policy_logprobs(
    model: Any, samples: Sequence[Sample], *, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens under a model, without temperature, top-p or penalty.

    Args:
        model: a causal language model of transformers, in eval mode.
        samples: prompts may be of unequal length.

    Returns:
        Log-probabilities (0 off the mask) and the mask of response tokens, both shape [B, A].
        Where prompts are of unequal length the responses start in different columns.
    """
    rows = Rows.pack(samples, device=next(model.parameters()).device)
    logprobs = torch.cat([chunk.logprobs(model) for chunk in rows.chunks(batch_size)])
    return logprobs, rows.response_mask


@torch.no_grad()
def exact_token_kl(
    policy: Any, reference: Any, samples: Sequence[Sample], *, batch_size: int = 64
) -> Tensor:
    """Sequence KL by sample: the sum over its states of the KL over the whole vocabulary.

    `sum_t KL(pi(.|s_t) || pi_ref(.|s_t))`. Its expectation over samples of the unmodified policy is
    the sequence KL (chain rule), as for the usual `sum_t log pi/pi_ref` (k1), with less variance
    and never negative. Along samples drawn otherwise (temperature, top-p, penalties) it is the KL
    over the states that those visit; k1 along them is not an estimate and may be negative.

    Args:
        batch_size: rows in one pass at most; fewer where their logits are many.

    Returns:
        Nats, shape [B].
    """
    rows = Rows.pack(samples, device=next(policy.parameters()).device)
    kl: list[Tensor] = []
    for chunk in rows.portions(batch_size, vocabulary_of(policy)):
        kl_N, _ = kl_and_entropy(chunk.logits(policy), chunk.logits(reference))
        kl.append(chunk.spread(kl_N).sum(1))
    return torch.cat(kl)


@torch.no_grad()
def kl_and_entropy(logits_NV: Tensor, ref_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL to the reference and entropy at each state, exactly over the vocabulary; in fp32 or more.

    `KL_t = sum_v pi_v (log pi_v - log pi_ref_v)`, `H_t = -sum_v pi_v log pi_v`.

    Args:
        logits_NV, ref_logits_NV: of policy and reference, any precision, shape [N, V].

    Returns:
        Nats, shape [N] each, at least 0; NaN where a logit is.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    kl, entropy = [], []
    size = max(1, _SLICE // logits_NV.shape[-1])  # of states: the copies in fp32 stay small
    for start in range(0, len(logits_NV), size):
        log_p = logits_NV[start : start + size].to(dtype).log_softmax(-1)
        log_q = ref_logits_NV[start : start + size].to(dtype).log_softmax(-1)
        p = log_p.exp()
        never = p == 0  # where log p may be -inf
        entropy.append(-(p * log_p).masked_fill(never, 0.0).sum(-1))
        kl.append((p * (log_p - log_q)).masked_fill(never, 0.0).sum(-1))
    return torch.cat(kl).clamp(min=0.0), torch.cat(entropy).clamp(min=0.0)
