"""Move parameters to theta' and back (Eq. 3), or compute the change of a gradient without it.

In fp32 the parameters move in place. If weights or activations are bf16, `theta'` rounds back to
theta or rounding hides the change of the gradient; `midpoint_change` computes that change directly.
docs/bf16-meta-step.md has the measurements. Imports torch only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from shiftrm.core.curvature import (
    coarsest_type,
    finite_difference_product,
    gradient_and_product,
    relative_size,
)
from shiftrm.core.meta_direction import global_norm

MetaShift = Literal["in_place", "midpoint"]
"""in_place: parameters move to theta'. midpoint: grad L(theta) plus `midpoint_change`."""


# -- theta' in place -------------------------------------------------------------------------


@contextmanager
def look_ahead(
    parameters: Sequence[Tensor], directions: Sequence[Tensor], *, meta_learning_rate: float
) -> Iterator[None]:
    """Set the parameters to theta' (Eq. 3) inside the block, and restore theta bit for bit.

    The originals are cloned and copied back, also after an exception: adding and then subtracting
    would change about 7 % of fp32 entries by rounding.

    Args:
        parameters: changed in place.
        directions: from `ascent_direction`, one per parameter.
        meta_learning_rate: eta.
    """
    originals = [p.detach().clone() for p in parameters]
    try:
        ascend_(parameters, directions, meta_learning_rate=meta_learning_rate)
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)


@torch.no_grad()
def ascend_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    meta_learning_rate: float,
    seed: int | None = None,
) -> None:
    """Compute theta <- theta + eta * direction in place (Eq. 3).

    With a seed, bf16 parameters are rounded at random (`add_unbiased_`), so that a step far below
    their resolution still moves them by the right amount on average. Use it to deploy theta'.
    """
    if seed is not None:
        add_unbiased_(parameters, [meta_learning_rate * _wide(d) for d in directions], seed=seed)
        return
    for p, direction in zip(parameters, directions, strict=True):
        p.add_(direction, alpha=meta_learning_rate)  # Eq. 3


@torch.no_grad()
def add_unbiased_(tensors: Sequence[Tensor], changes: Sequence[Tensor], *, seed: int) -> None:
    """Add changes to tensors in place, with unbiased random rounding in bf16.

    Rounding to nearest would drop every change below half a unit in the last place. Other types use
    plain addition.

    Args:
        tensors: changed in place.
        changes: pass fp32 to keep them exact.
        seed: the same on every process that holds the same tensors.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for tensor, change in zip(tensors, changes, strict=True):
        if tensor.dtype != torch.bfloat16:
            tensor.add_(change.to(tensor.dtype))
            continue
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        total = tensor.float().add_(change)
        # bf16 is the upper half of fp32: a random lower half carries with the right probability.
        noise = torch.randint(
            0,
            1 << 16,
            total.shape,
            dtype=torch.int32,
            device=total.device,
            generator=generators[tensor.device],
        )
        rounded = (total.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
        tensor.copy_(torch.where(total.isfinite(), rounded, total))


def _wide(tensor: Tensor) -> Tensor:
    """Cast to fp32, or keep a wider type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- theta' where numbers are rounded coarsely -----------------------------------------------


def choose_meta_shift(
    parameters: Iterable[Tensor], *, autocast_type: torch.dtype | None = None
) -> MetaShift:
    """Return "in_place" if everything is computed in fp32 or wider, else "midpoint".

    Args:
        parameters: all parameters of the model, including frozen ones.
        autocast_type: the type of autocast or of FSDP2's mixed precision, if on: fp32 weights, and
            the step with them, are rounded to it before use.
    """
    coarsest = coarsest_type(parameters, autocast_type=autocast_type)
    return "in_place" if torch.finfo(coarsest).eps <= torch.finfo(torch.float32).eps else "midpoint"


def midpoint_change(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    meta_learning_rate: float,
    largest_influence: float = 0.5,
) -> list[Tensor]:
    """Return `grad L(theta') - grad L(theta)` without subtracting gradients.

    The difference is `eta * integral of H_L(theta + t eta d) d over t in [0, 1]`, computed by the
    midpoint rule: `eta H_L(theta + eta d / 2) d`, with an error of order eta^3 in exact arithmetic.
    Rounding is relative to the difference, not to the gradient, so this also works when `eta d` is
    far below the resolution of the weights: the midpoint then rounds to theta, an error of order
    eta^2.

    If the change exceeds `largest_influence` of the gradient, the midpoint rule is inaccurate and
    rounding is small relative to the change, so the gradients are subtracted.

    Args:
        loss: L of one micro-batch, scaled as its gradient is; called once, or three times if the
            change is large. The changes of micro-batches are summed.
        parameters: leaf tensors that require gradients; restored to theta.
        directions: d, one per parameter, of any float type.
        meta_learning_rate: eta.
        largest_influence: see above; infinity always uses the midpoint rule.

    Returns:
        One tensor per parameter, in fp32 or wider: accumulating in bf16 would round it away.

    Raises:
        UserError: as `hessian_vector_product`, which also states time and memory.

    Ours. Works for any differentiable use of the parameters (LoRA, tied weights, experts).
    """
    with look_ahead(parameters, directions, meta_learning_rate=meta_learning_rate / 2):
        gradients, products = gradient_and_product(loss, parameters, directions)
    change = [meta_learning_rate * _wide(product) for product in products]
    if relative_size(change, gradients) <= largest_influence:
        return change
    before = _gradient(loss, parameters)
    with look_ahead(parameters, directions, meta_learning_rate=meta_learning_rate):
        after = _gradient(loss, parameters)
    return [_wide(a) - _wide(b) for a, b in zip(after, before, strict=True)]


def midpoint_change_by_differences(
    gradient: Callable[[], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    meta_learning_rate: float,
    compute_type: torch.dtype,
    radius: float | None = None,
) -> tuple[list[Tensor], float]:
    """`midpoint_change` for models that cannot be differentiated twice, or are sharded.

    The curvature is the difference of gradients on both sides of the midpoint, as far apart as
    `compute_type` needs and at least as far as theta and theta'. If these are far enough apart, the
    result is `grad L(theta') - grad L(theta)` itself.

    Arguments and result as in `finite_difference_product`, with the gradient of L.
    """
    half = meta_learning_rate * float(global_norm(directions)) / 2
    with look_ahead(parameters, directions, meta_learning_rate=meta_learning_rate / 2):
        products, radius = finite_difference_product(
            gradient,
            parameters,
            directions,
            compute_type=compute_type,
            radius=radius,
            least_radius=half,
        )
    return [meta_learning_rate * product for product in products], radius


def _gradient(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(), parameters, materialize_grads=True)
