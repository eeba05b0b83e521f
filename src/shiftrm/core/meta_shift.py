"""Parameters at theta' and back (Eq. 3), and the change of a gradient where theta' rounds away.

In fp32 the parameters move in place. Where weights or activations are bf16, `theta'` rounds back to
theta or the change of the gradient drowns in rounding; `midpoint_change` computes that change
itself. docs/bf16-meta-step.md has the measurements. Imports torch only.
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
    """Inside, the parameters are theta' (Eq. 3); outside they are theta again, bit for bit.

    The originals are cloned and copied back, also when an exception is raised inside: adding and
    then subtracting would leave rounding behind in about 7 % of fp32 entries.

    Args:
        parameters: changed in place.
        directions: from `ascent_direction`, one a parameter.
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
    """theta <- theta + eta * direction, in place (Eq. 3).

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
    """tensors += changes. In bf16 the sum is rounded up or down at random, right on average.

    Rounding to the nearest would drop every change below half a unit in the last place. Other
    types are added plainly.

    Args:
        tensors: changed in place.
        changes: fp32 keeps them exact.
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
        # bf16 is the upper half of fp32: a random lower half carries over in proportion.
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
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- theta' where numbers are rounded coarsely -----------------------------------------------


def choose_meta_shift(
    parameters: Iterable[Tensor], *, autocast_type: torch.dtype | None = None
) -> MetaShift:
    """ "in_place" if everything is computed in fp32 or wider, else "midpoint".

    Args:
        parameters: all of the model's, frozen ones included.
        autocast_type: the type of autocast, or of FSDP2's mixed precision, if one is on: fp32
            weights are rounded to it before use, and the step with them.
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
    """`grad L(theta') - grad L(theta)`, not by subtracting one gradient from another.

    The difference is `eta * integral of H_L(theta + t eta d) d over t in [0, 1]`, here by the
    midpoint rule: `eta H_L(theta + eta d / 2) d`, in exact arithmetic wrong by order eta^3.
    Rounding is relative to the difference, not to the gradient, so it holds where `eta d` is far
    below the resolution of the weights: the midpoint then rounds to theta, an error of order eta^2.

    Where the change is more than `largest_influence` of the gradient, the midpoint rule is coarse
    and rounding small beside the change: there the gradients are subtracted after all.

    Args:
        loss: L of one micro-batch, scaled as its gradient is; called once, or three times where
            the change is large. The changes of micro-batches are summed.
        parameters: leaf tensors that require gradients; theta again afterwards.
        directions: d, one a parameter, of any float type.
        meta_learning_rate: eta.
        largest_influence: see above; infinity is the midpoint rule always.

    Returns:
        One tensor a parameter, in fp32 or wider: bf16 would round it off when it is accumulated.

    Raises:
        UserError: as `hessian_vector_product`, which see for time and memory.

    Ours; any differentiable use of the parameters will do (LoRA, tied weights, experts).
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

    The curvature is the difference of gradients at both sides of the midpoint, as far apart as
    `compute_type` needs and no nearer than theta and theta': where these are far enough apart it is
    `grad L(theta') - grad L(theta)` itself.

    Args and returns: as `finite_difference_product`; `gradient` is that of L.
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
