"""The losses of reward modelling, as pure functions on tensors (torch only).

Notation is METHODS.md's: `B` pairs or groups in a batch, `K` responses in a group. Every loss
returns per-example values of shape [B]; the caller takes the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the preferred response (the papers' vanilla loss, Eq. 1).

    `L = -log sigmoid(r(x, y_w) - r(x, y_l) - margin)`, computed as softplus of the negated
    difference, so that differences of 1e4 give 0 and 1e4 rather than 0 and inf.

    Args:
        chosen: rewards of the preferred responses, shape [B], any float type.
        rejected: rewards of the other responses, shape [B].
        margin: how much better the preferred one should be, shape [B] (Llama 2's extension, as in
            TRL; not in the MetaRM papers). Default: none.

    Returns:
        Losses in nats, shape [B].

    Raises:
        ValueError: shapes differ.

    Source: Dou et al., arXiv 2405.00438, Eq. 1, whose expectation is the mean of this.
    """
    _require_same_shape(chosen=chosen, rejected=rejected, margin=margin)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)  # Eq. 1


def difference_loss(rewards_BK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """How well rewards tell the responses to one prompt apart (J, Eq. 2). High is discriminating.

    `J = 2/K^2 * sum_{i<j} sigmoid(|r_i - r_j|)`. It is maximised, by gradient ascent. It runs from
    `(K-1)/(2K)` (all equal) to `(K-1)/K` (all far apart). Where two rewards are equal the
    derivative of |.| is taken as 0, so there is no NaN, and no gradient to part them either.

    Args:
        rewards_BK: rewards of K responses to each of B prompts, shape [B, K].
        mask: True where a response exists, shape [B, K], for groups of unequal size; K in the
            formula is then each group's own number of responses. Default: all exist.

    Returns:
        J per group, shape [B], dimensionless.

    Raises:
        ValueError: not two-dimensional, mask of another shape, or a group with fewer than two
            responses (it has no pair to tell apart).

    Source: Dou et al., arXiv 2405.00438, Eq. 2. Ragged groups are ours; with a full mask the value
    is the paper's.
    """
    if rewards_BK.dim() != 2:
        raise ValueError(f"rewards must have shape [B, K], got {tuple(rewards_BK.shape)}")
    if mask is None:
        mask = torch.ones_like(rewards_BK, dtype=torch.bool)
    elif mask.shape != rewards_BK.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and rewards {tuple(rewards_BK.shape)} differ")
    mask = mask.bool()
    size_B = mask.sum(dim=1)
    if bool((size_B < 2).any()):
        raise ValueError("a group needs at least two responses: nothing to tell apart in one")

    K = rewards_BK.shape[1]
    i, j = torch.triu_indices(K, K, offset=1, device=rewards_BK.device)
    # Filled before the difference, so that padding (inf or NaN, even) cannot reach the gradient.
    rewards_BK = rewards_BK.masked_fill(~mask, 0.0)
    discrimination = torch.sigmoid((rewards_BK[:, i] - rewards_BK[:, j]).abs())
    discrimination = discrimination * (mask[:, i] & mask[:, j])
    return 2.0 / size_B.to(rewards_BK.dtype) ** 2 * discrimination.sum(dim=1)  # Eq. 2


def _require_same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
