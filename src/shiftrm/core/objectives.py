"""Meta objectives, which a MetaRM step increases on unlabelled responses, by name.

An objective is a function `(rewards_BK, *, mask) -> J_B` on the rewards of K responses to each of B
prompts. `mask` [B, K] is True where a response exists. J [B] is differentiable in the rewards, and
the step follows the gradient of its mean. Column k is the k-th response of the group in its file;
`difference` ignores that order, the `ordered` objectives read it as best first. To add an
objective, register it here, or set `meta_objective` to `package.module:function`.

For |x| use `absolute`, so that finite differences of gradients do not cross its kink.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from shiftrm.registry import Registry


class Objective(Protocol):
    """The signature of a meta objective; see the module docstring."""

    def __call__(self, rewards_BK: Tensor, *, mask: Tensor) -> Tensor: ...


OBJECTIVES = Registry[Objective]("meta objective")

SPREAD = ("difference",)
"""Objectives that rise when all differences are multiplied by a number above 1. Others may know an
order and shrink differences first, so a step by its effect is measured by their change
(`core.meta_effect.growth`)."""


@OBJECTIVES.register("difference")
def difference_loss(rewards_BK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return how well rewards separate the responses to one prompt (J, Eq. 2); higher is better.

    `J = 2/K^2 * sum_{i<j} sigmoid(|r_i - r_j|)`, maximised by gradient ascent. It lies between
    `(K-1)/(2K)` (all equal) and `(K-1)/K` (all far apart). Where two rewards are equal, the
    derivative of |.| is 0, so no NaN occurs and no gradient separates them.

    Args:
        rewards_BK: rewards of K responses to each of B prompts, shape [B, K].
        mask: True where a response exists, shape [B, K], for groups of unequal size; K in the
            formula is then each group's number of responses. Default: all exist.

    Returns:
        J per group, shape [B], dimensionless.

    Raises:
        ValueError: not two-dimensional, a mask of another shape, or a group with fewer than two
            responses.

    Source: Dou et al., arXiv 2405.00438, Eq. 2. Groups of unequal size and `held_signs` are ours;
    with a full mask the value is the paper's.
    """
    difference, exists, size_B = pair_differences(rewards_BK, mask)
    discrimination = torch.sigmoid(absolute(difference)) * exists
    return 2.0 / size_B**2 * discrimination.sum(dim=1)  # Eq. 2


@OBJECTIVES.register("ordered")
def ordered_likelihood(rewards_BK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return how well rewards reproduce a known order, the responses given best first.

    `J = mean over pairs i < j of log sigmoid(r_i - r_j)`; higher is better, and 0 is the supremum.
    In a group `[better, worse]` it is minus the Bradley-Terry loss. The order of the responses in
    the group file is the statement: only groups that something has sorted may be given.

    Arguments, result and errors as in `difference_loss`.

    Source: the Bradley-Terry likelihood, as in Eq. 1 of arXiv 2405.00438; as a meta objective ours.
    """
    difference, exists, size_B = pair_differences(rewards_BK, mask)
    pairs_B = size_B * (size_B - 1) / 2
    return (logsigmoid(difference) * exists).sum(dim=1) / pairs_B


@OBJECTIVES.register("ordered_difference")
def ordered_difference(rewards_BK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return J of Eq. 2 with the signs of a known order, the responses given best first.

    `J = 2/K^2 * sum_{i<j} sigmoid(r_i - r_j)`. It is a control: Eq. 2 uses `|r_i - r_j|`, that is,
    the order that the model itself believes in. With groups sorted by the true reward, comparing
    the two shows what wrong signs cost. They agree where the model orders a group correctly.

    Arguments, result and errors as in `difference_loss`. Ours.
    """
    difference, exists, size_B = pair_differences(rewards_BK, mask)
    return 2.0 / size_B**2 * (torch.sigmoid(difference) * exists).sum(dim=1)


def pair_differences(rewards_BK: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `r_i - r_j` of all pairs i < j, which of them exist, and each group's size.

    Shapes [B, K(K-1)/2] twice, and [B], in the type of the rewards.

    Raises:
        ValueError: see `difference_loss`.
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
        raise ValueError("a group needs at least two responses; one has no pair")

    K = rewards_BK.shape[1]
    i, j = torch.triu_indices(K, K, offset=1, device=rewards_BK.device)
    # Fill before the difference, so that padding (even inf or NaN) cannot reach the gradient.
    rewards_BK = rewards_BK.masked_fill(~mask, 0.0)
    difference = rewards_BK[:, i] - rewards_BK[:, j]
    return difference, mask[:, i] & mask[:, j], size_B.to(rewards_BK.dtype)


def absolute(x: Tensor) -> Tensor:
    """Return `|x|`, with derivative 0 at 0. Inside `held_signs` it uses the recorded signs."""
    return _signs(x.detach()) * x


# The signs that `absolute` records, and those that it replays, one tensor per call.
_signs_found: ContextVar[list[Tensor] | None] = ContextVar("signs_found", default=None)
_signs_held: ContextVar[Iterator[Tensor] | None] = ContextVar("signs_held", default=None)


@contextmanager
def recorded_signs() -> Iterator[list[Tensor]]:
    """Collect the signs of all `absolute` calls inside the block, one tensor per call."""
    found: list[Tensor] = []
    token = _signs_found.set(found)
    try:
        yield found
    finally:
        _signs_found.reset(token)


@contextmanager
def held_signs(signs: Sequence[Tensor]) -> Iterator[None]:
    """Make the n-th call of `absolute` inside the block use the n-th of these signs.

    J has a kink wherever two rewards are equal. With the signs at theta held, J is smooth near
    theta and has the same derivatives at theta. Finite differences of gradients need this: a step
    across a kink would divide the jump of the gradient by the step length.

    Args:
        signs: from `recorded_signs`, of the same calls.

    Raises:
        RuntimeError: the calls differ from those that were recorded.
    """
    token = _signs_held.set(iter(signs))
    try:
        yield
    finally:
        _signs_held.reset(token)


def _signs(difference: Tensor) -> Tensor:
    held = _signs_held.get()
    if held is not None:
        signs = next(held, None)
        if signs is None or signs.shape != difference.shape:
            raise RuntimeError("absolute is called differently than when its signs were recorded")
        return signs
    signs = difference.sign()
    found = _signs_found.get()
    if found is not None:
        found.append(signs)
    return signs
