"""Hessian-vector products of a loss over any parameters, micro-batch by micro-batch.

A loss that is a sum over micro-batches has a Hessian that is one too, so the products of the
micro-batches (and of the processes) are summed like gradients. Two ways:

- `hessian_vector_product`: reverse over reverse, exact. Needs operations that can be
  differentiated twice: attention runs in its plain form, which keeps its T x T weights.
- `finite_difference_product`: the difference of two gradients. Any operation, any kernel,
  checkpointing, sharded parameters, the memory of a gradient; its error is stated there.

Imports torch only.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shiftrm.core.meta_direction import global_norm, inner_product
from shiftrm.core.objectives import held_signs, recorded_signs
from shiftrm.errors import UserError

Curvature = Literal["exact", "finite_difference"]
"""How a Hessian-vector product is computed; see this module."""

START_RADIUS = 0.01
"""Length of the first trial step of `finite_difference_product`; it is adapted from there."""


def coarsest_type(
    tensors: Iterable[Tensor], *, autocast_type: torch.dtype | None = None
) -> torch.dtype:
    """The float type that rounds most, of a model's parameters and the autocast type.

    Pass *all* parameters: fp32 adapters over a bf16 base compute on bf16 activations. Integer
    parameters are quantised ones; they count as bf16, the type such models compute in.
    """
    types = {t.dtype if t.is_floating_point() else torch.bfloat16 for t in tensors}
    if autocast_type is not None:
        types.add(autocast_type)
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


JUMPING = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh)


def kinks(model: nn.Module) -> str | None:
    """Where the gradient of a model jumps, as a phrase; None where nothing is known to.

    Each ReLU and each choice of experts has its own jump, and a difference of gradients divides
    those that lie between its two ends by their distance: of tiny models in fp32 it was wrong by up
    to four times the true product, where two differentiations, which see no jumps, are exact.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, JUMPING) or kind.endswith(("Router", "Experts", "MoeBlock")):
            return f"{name} is a {kind}, whose gradient jumps"
    return None


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` uses its plain kernel: the fused have no second
    derivative (in any torch up to 2.13)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def hessian_vector_product(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """`H v`, H the Hessian of `function` at the parameters' present values.

    `H v = grad <grad f, v>`, reverse over reverse. Nothing accumulates into `.grad`. Under DDP
    call it inside `no_sync()` and reduce the result.

    Args:
        function: computes the loss of one micro-batch, a scalar, from the parameters; called once,
            under `twice_differentiable`. It may use autocast.
        parameters: leaf tensors that require gradients.
        vectors: v, one tensor a parameter, of any float type.

    Returns:
        One tensor a parameter, in its type; zeros where the loss does not depend on it.

    Raises:
        UserError: an operation of the model cannot be differentiated twice. A custom Function
            that lacks a second derivative without saying so (hand-written kernels such as Liger's)
            cannot be seen: its part is missing. Compare with `finite_difference_product` once.

    Time: about four times that of a gradient (one forward pass, one backward pass that is itself
    recorded, and two through it). Memory: the activations of one micro-batch two to three times,
    with attention's T x T weights per layer and head; lower the micro-batch to cap it.
    """
    return gradient_and_product(function, parameters, vectors)[1]


def gradient_and_product(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient, and `hessian_vector_product`, which see; the gradient comes for nothing."""
    try:
        with twice_differentiable():  # checkpoints run forward once more in the backward passes
            value = function()
            with _autocast_off(value):
                gradients = torch.autograd.grad(
                    value, parameters, create_graph=True, allow_unused=True
                )
                reached = [
                    (g, v)
                    for g, v in zip(gradients, vectors, strict=True)
                    if g is not None and g.requires_grad  # else linear in it: no curvature
                ]
                products: Sequence[Tensor | None] = [None] * len(parameters)
                if reached:
                    slope = inner_product(*zip(*reached, strict=True))
                    _require_second_derivatives(slope)
                    products = torch.autograd.grad(slope, parameters, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        _explain(error)
        raise
    return _filled(gradients, parameters), _filled(products, parameters)


def _filled(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if t is None else t.detach()
        for p, t in zip(parameters, found, strict=True)
    ]


@torch.no_grad()
def finite_difference_product(
    gradient: Callable[[], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    compute_type: torch.dtype = torch.float32,
    radius: float | None = None,
    least_radius: float = 0.0,
    at_theta: Sequence[Tensor] | None = None,
    trials: int = 3,
) -> tuple[list[Tensor], float]:
    """`H v` from gradients at `theta +- radius v / ||v||`; the parameters are theta again after.

    With eps the rounding of the type that the model computes in, a gradient is good to a few eps,
    and the best radius makes it change by about (8 eps)^(1/3) of itself ((8 eps)^(1/2) one-sided):
    truncation and rounding are then alike. The radius is adapted until that is so. Relative error,
    measured on small models: 1e-4 in fp32, 0.1 in bf16 (docs/bf16-meta-step.md).

    `absolute` has a kink, and its signs are those of theta in all gradients: they are
    recorded by one gradient more, at theta, unless `gradient` holds them itself (`held_signs`).
    Of a model with kinks of its own (`kinks`) the product is wrong.

    Args:
        gradient: the gradient at the parameters' present values, one tensor a parameter, freshly
            made or copied at each call, which compute the same in the same order. It may run
            micro-batches, autocast and reductions, and under FSDP2 must `reshard()` before it
            reads the parameters.
        parameters: moved in place and copied back, also when something raises.
        vectors: v, one tensor a parameter.
        compute_type: see `coarsest_type`.
        radius: where to start; pass on the one returned, and the next call needs no trial.
        least_radius: the radius does not go below it.
        at_theta: the gradient at theta if it is at hand. The difference is then one-sided: one
            gradient a trial instead of two, a larger error (0.002 in fp32, 0.2 in bf16).
        trials: radii to try at most.

    Returns:
        The product, and the radius used.
    """
    length = float(global_norm(vectors))
    radius = max(START_RADIUS if radius is None else radius, least_radius)
    if length == 0.0 or not math.isfinite(length):
        return [v * 0.0 for v in vectors], radius
    order = 3 if at_theta is None else 2
    target = (8 * torch.finfo(compute_type).eps) ** (1 / order)
    near = _Near(gradient, parameters, vectors)
    try:
        for trial in range(trials):
            step = radius / length
            forth = near(step)
            back, width = (near(-step), 2 * step) if at_theta is None else (list(at_theta), step)
            difference = [f - b for f, b in zip(forth, back, strict=True)]
            change = relative_size(difference, back)
            fits = target / 2 <= change <= target * 2
            if fits or trial == trials - 1 or (change > target and radius <= least_radius):
                break
            factor = min(max(target / change, 1e-3), 1e3) if change > 0 else 10.0
            radius = max(radius * factor, least_radius)
    finally:
        near.return_to_theta()
    return [d / width for d in difference], radius


def relative_size(change: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """`||change|| / ||base||`; 0 if both vanish, infinite if only the base does."""
    part, whole = float(global_norm(change)), float(global_norm(base))
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole


class _Near:
    """Gradients at theta + step v, with the signs of J's differences as they are at theta."""

    def __init__(
        self,
        gradient: Callable[[], Sequence[Tensor]],
        parameters: Sequence[Tensor],
        vectors: Sequence[Tensor],
    ) -> None:
        self._gradient, self._parameters, self._vectors = gradient, parameters, vectors
        self._theta = [p.detach().clone() for p in parameters]
        self._signs: list[Tensor] | None = None

    def __call__(self, step: float) -> list[Tensor]:
        if self._signs is not None:
            with held_signs(self._signs):
                return self._at(step)
        with recorded_signs() as found:
            result = self._at(step)
        if not found:  # no difference loss, or one whose signs the gradient holds itself
            return result
        with recorded_signs() as at_theta:
            self._at(0.0)
        self._signs = at_theta
        return self(step)

    def _at(self, step: float) -> list[Tensor]:
        for p, original, v in zip(self._parameters, self._theta, self._vectors, strict=True):
            p.copy_(original).add_(v, alpha=step)
        with torch.enable_grad():
            found = self._gradient()
        # Wide, so that the difference of two bf16 gradients is not rounded once more.
        return [g.detach().to(torch.promote_types(g.dtype, torch.float32)) for g in found]

    def return_to_theta(self) -> None:
        for p, original in zip(self._parameters, self._theta, strict=True):
            p.copy_(original)


@contextmanager
def _autocast_off(value: Tensor) -> Iterator[None]:
    """Backward passes run in the types that the forward pass chose."""
    with torch.autocast(device_type=value.device.type, enabled=False):
        yield


def _require_second_derivatives(slope: Tensor) -> None:
    """torch ends the graph at a once-differentiable Function with a node that raises when run; but
    no parameter lies behind it, so that it never runs and its part would silently be missing."""
    seen, waiting = set(), [slope.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise RuntimeError("a custom Function is marked once_differentiable")
        waiting.extend(following for following, _ in node.next_functions)


_NOT_TWICE = (
    "derivative for",  # fused attention
    "once_differentiable",
    "Checkpointing is not compatible with .grad",  # re-entrant checkpointing
)


def _explain(error: Exception) -> None:
    """Raises the error that names the cause, if it is a missing second derivative."""
    text = str(error)
    if any(phrase in text for phrase in _NOT_TWICE):
        raise UserError(
            f"the model cannot be differentiated twice ({text.splitlines()[0][:160]}); use "
            "curvature='finite_difference', or sdpa attention without custom kernels and "
            "non-reentrant checkpointing"
        ) from error
