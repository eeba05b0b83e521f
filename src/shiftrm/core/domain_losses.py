"""Losses that a reward model meta-trained over domains is compared with, as pure functions.

Notation as in `losses`; `G` domains, whose preference pairs are pooled. Torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftrm.core.losses import preference_policy_loss

__all__ = [
    "direct_preference_loss",
    "domain_means",
    "group_dro_weights",
    "likelihood_and_preference_loss",
]


def likelihood_and_preference_loss(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, *, alpha: float = 0.1
) -> Tensor:
    """Return the loss of the stage `cpl` in the public repository of the OODPL paper.

    `L = -log pi(y|x) / |y| - alpha log sigmoid(log pi(y|x) - log pi(y'|x))` for the preferred y:
    the likelihood as the mean over tokens, the preference of the sums over tokens. It trains a
    policy on the pairs of all domains; there is no reward model and no inner loop.

    Args:
        chosen, rejected: log pi of the preferred and the other responses, sums over their tokens,
            shape [B].
        chosen_tokens: the number of tokens of the preferred responses, shape [B].
        alpha: weight of the preference, >= 0.

    Returns:
        Losses in nats, shape [B].

    Raises:
        ValueError: shapes differ, a response without tokens, or a negative alpha.

    Source: github.com/jiachenwestlake/OODPL, `cl_loss` and `compute_loss` of tuner/cpl/
    cpl_trainer.py, with its documented `cl_alpha` of 0.1. Left out: the optional R-drop term
    (`reg_alpha`), which is zero without dropout. Theirs is the mean over all tokens of a batch;
    the documented batch is one pair, where the two agree.
    """
    if chosen.shape != chosen_tokens.shape:
        raise ValueError(f"shapes differ: {tuple(chosen.shape)}, {tuple(chosen_tokens.shape)}")
    if bool((chosen_tokens < 1).any()):
        raise ValueError("a preferred response has no token")
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it must not be negative")
    return -chosen / chosen_tokens + alpha * preference_policy_loss(chosen, rejected)


def direct_preference_loss(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """Return DPO's loss, `-log sigmoid(beta (u_w - u_l))` with `u = log pi(y|x) - log pi_ref(y|x)`.

    Args:
        policy_B2: log pi of the preferred and the other response, sums over tokens, shape [B, 2].
        reference_B2: the same of the reference policy, a constant.
        beta: strength of the implicit KL penalty, > 0.

    Returns:
        Losses in nats, shape [B].

    Raises:
        ValueError: shapes differ, or beta is not positive.

    Source: Rafailov et al., arXiv 2305.18290, Eq. 7.
    """
    if policy_B2.shape != reference_B2.shape or policy_B2.shape[1:] != (2,):
        raise ValueError(
            f"expected two tensors of shape [B, 2], got {tuple(policy_B2.shape)} and "
            f"{tuple(reference_B2.shape)}"
        )
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; it must be a positive number")
    u_B2 = policy_B2 - reference_B2
    return -F.logsigmoid(beta * (u_B2[:, 0] - u_B2[:, 1]))  # Eq. 7


def domain_means(losses_B: Tensor, domains_B: Tensor, *, count: int) -> Tensor:
    """Return the mean loss of every domain, shape [G]; NaN for a domain without a row.

    Args:
        losses_B: losses of single rows, shape [B].
        domains_B: the domain of every row, 0..G-1, shape [B].
        count: G.
    """
    if losses_B.shape != domains_B.shape:
        raise ValueError(f"shapes differ: {tuple(losses_B.shape)}, {tuple(domains_B.shape)}")
    sums_G = losses_B.new_zeros(count).index_add(0, domains_B, losses_B)
    return sums_G / torch.bincount(domains_B, minlength=count)


def group_dro_weights(weights_G: Tensor, losses_G: Tensor, *, step_size: float) -> Tensor:
    """Return the next weights of the domains by exponentiated gradient ascent on their losses.

    `q_g <- q_g exp(eta L_g) / sum_h q_h exp(eta L_h)`; the model then descends on `sum_g q_g L_g`,
    the weights held constant. The saddle point minimises the loss of the worst domain.

    Args:
        weights_G: q, on the simplex, shape [G].
        losses_G: mean losses of the domains in the batch, shape [G]; NaN keeps a domain's share
            relative to the others as if its loss were 0. No gradient is taken through them.
        step_size: eta, > 0.

    Returns:
        q, shape [G], without gradient.

    Raises:
        ValueError: shapes differ, or the step size is not positive.

    Source: Sagawa et al., arXiv 1911.08731, Algorithm 1, without the generalisation adjustment.
    There every step draws one group; ours takes all domains of a batch at once, as their code.
    """
    if weights_G.shape != losses_G.shape:
        raise ValueError(f"shapes differ: {tuple(weights_G.shape)}, {tuple(losses_G.shape)}")
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size is {step_size}; it must be a positive number")
    losses_G = losses_G.detach().nan_to_num(0.0)
    return torch.softmax(weights_G.log() + step_size * losses_G, dim=0)
