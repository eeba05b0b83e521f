"""Hessian-vector products of a loss over any parameters, micro-batch by micro-batch.

The Hessian of a sum over micro-batches is the sum of their Hessians, so the products of
micro-batches (and of processes) are summed like gradients. There are two methods:

- `hessian_vector_product`: exact, reverse over reverse. It needs operations that can be
  differentiated twice: attention runs in its plain form, which keeps its T x T weights.
- `finite_difference_product`: the difference of two gradients. It works with any operation and
  kernel, checkpointing and sharded parameters, and needs the memory of a gradient. Its docstring
  states its error.

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
"""How to compute a Hessian-vector product; see the module docstring."""

START_RADIUS = 0.01
"""Initial trial radius of `finite_difference_product`, which then adapts it."""

TRIALS = 3
"""Maximum number of radii that it tries."""


def coarsest_type(
    tensors: Iterable[Tensor], *, autocast_type: torch.dtype | None = None
) -> torch.dtype:
    """Return the least precise float type among a model's parameters and the autocast type.

    Pass *all* parameters: fp32 adapters over a bf16 base compute on bf16 activations. Integer
    (quantised) parameters count as bf16, the type such models compute in.
    """
    types = {t.dtype if t.is_floating_point() else torch.bfloat16 for t in tensors}
    if autocast_type is not None:
        types.add(autocast_type)
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


JUMPING = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh)


def kinks(model: nn.Module) -> str | None:
    """Describe in a phrase where the model's gradient is discontinuous; None if nowhere known.

    The gradient jumps at each ReLU and each choice of experts. A finite difference divides the
    jumps between its two ends by their distance: on tiny fp32 models its error was up to four times
    the true product. Double differentiation does not see the jumps and is exact.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, JUMPING) or kind.endswith(("Router", "Experts", "MoeBlock")):
            return f"{name} is a {kind}, whose gradient jumps"
    return None


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Make `scaled_dot_product_attention` use its plain kernel inside the block: the fused kernels
    have no second derivative (in any torch up to 2.13)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def hessian_vector_product(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return `H v`, with H the Hessian of `function` at the parameters' current values.

    `H v = grad <grad f, v>`, reverse over reverse. Nothing accumulates into `.grad`. Under DDP
    call it inside `no_sync()` and reduce the result.

    Args:
        function: computes the scalar loss of one micro-batch from the parameters. Called once,
            under `twice_differentiable`. May use autocast.
        parameters: leaf tensors that require gradients.
        vectors: v, one tensor per parameter, of any float type.

    Returns:
        One tensor per parameter, in its type; zeros where the loss does not depend on it.

    Raises:
        UserError: an operation of the model cannot be differentiated twice. A custom Function that
            lacks a second derivative but does not raise (hand-written kernels such as Liger's) is
            not detected: its part is missing. Compare with `finite_difference_product` once.

    Time: about four times that of a gradient (one forward pass, one recorded backward pass, and two
    passes through it). Memory: two to three times the activations of one micro-batch, plus
    attention's T x T weights per layer and head; use smaller micro-batches to reduce it.
    """
    return gradient_and_product(function, parameters, vectors)[1]


def gradient_and_product(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient, at no extra cost, and the `hessian_vector_product`."""
    try:
        with twice_differentiable():  # checkpoints rerun forward in the backward passes
            value = function()
            with _autocast_off(value):
                gradients = torch.autograd.grad(
                    value, parameters, create_graph=True, materialize_grads=True
                )
                pairs = zip(gradients, vectors, strict=True)
                reached = [(g, v) for g, v in pairs if g.requires_grad]  # else L is linear in it
                products: Sequence[Tensor] = [torch.zeros_like(p) for p in parameters]
                if reached:
                    slope = inner_product(*zip(*reached, strict=True))
                    _require_second_derivatives(slope)
                    products = torch.autograd.grad(slope, parameters, materialize_grads=True)
    except (RuntimeError, NotImplementedError) as error:
        _explain(error)
        raise
    return [g.detach() for g in gradients], [p.detach() for p in products]


@torch.no_grad()
def finite_difference_product(
    gradient: Callable[[], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    compute_type: torch.dtype = torch.float32,
    radius: float | None = None,
    least_radius: float = 0.0,
) -> tuple[list[Tensor], float]:
    """Return `H v` from gradients at `theta +- radius v / ||v||`, with the parameters restored.

    With eps the rounding error of the compute type, a gradient is accurate to a few eps. The best
    radius changes it by a fraction of about (8 eps)^(1/3), which balances truncation and rounding;
    up to `TRIALS` radii are tried to reach it. Relative error, measured on small models: 1e-4 in
    fp32, 0.1 in bf16 (docs/bf16-meta-step.md).

    `absolute` has a kink, so all gradients use its signs at theta. One extra gradient at theta
    records them, unless `gradient` holds them itself (`held_signs`). For a model that has `kinks`,
    the product is wrong.

    Args:
        gradient: returns the gradient at the parameters' current values, one tensor per parameter,
            new or copied at each call; every call computes the same in the same order. It may run
            micro-batches, autocast and reductions. Under FSDP2 it must `reshard()` before it reads
            the parameters.
        parameters: moved in place and restored, also after an exception.
        vectors: v, one tensor per parameter.
        compute_type: see `coarsest_type`.
        radius: the initial radius. Pass the returned radius to the next call to avoid trials.
        least_radius: lower bound of the radius.

    Returns:
        The product and the radius used.
    """
    length = float(global_norm(vectors))
    radius = max(START_RADIUS if radius is None else radius, least_radius)
    if length == 0.0 or not math.isfinite(length):
        return [v * 0.0 for v in vectors], radius
    target = (8 * torch.finfo(compute_type).eps) ** (1 / 3)
    near = _Near(gradient, parameters, vectors)
    try:
        for trial in range(TRIALS):
            step = radius / length
            forth, back = near(step), near(-step)
            difference = [f - b for f, b in zip(forth, back, strict=True)]
            change = relative_size(difference, back)
            fits = target / 2 <= change <= target * 2
            if fits or trial == TRIALS - 1 or (change > target and radius <= least_radius):
                break
            factor = min(max(target / change, 1e-3), 1e3) if change > 0 else 10.0
            radius = max(radius * factor, least_radius)
    finally:
        near.return_to_theta()
    return [d / (2 * step) for d in difference], radius


def relative_size(change: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Return `||change|| / ||base||`; 0 if both are zero, infinite if only the base is."""
    part, whole = float(global_norm(change)), float(global_norm(base))
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole


class _Near:
    """Gradients at theta + step v, with the signs of J's differences fixed at theta."""

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
        if not found:  # no difference loss, or the gradient holds the signs itself
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
        # Widen, so that the difference of two bf16 gradients is not rounded again.
        return [g.detach().to(torch.promote_types(g.dtype, torch.float32)) for g in found]

    def return_to_theta(self) -> None:
        for p, original in zip(self._parameters, self._theta, strict=True):
            p.copy_(original)


@contextmanager
def _autocast_off(value: Tensor) -> Iterator[None]:
    """Turn autocast off: backward passes use the types that the forward pass chose."""
    with torch.autocast(device_type=value.device.type, enabled=False):
        yield


def _require_second_derivatives(slope: Tensor) -> None:
    """Raise if the graph of `slope` contains a once-differentiable Function.

    torch ends the graph there with a node that raises when run. No parameter is behind the node, so
    it never runs and its part would be missing without an error.
    """
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
    """Raise a UserError that names the cause, if it is a missing second derivative."""
    text = str(error)
    if any(phrase in text for phrase in _NOT_TWICE):
        raise UserError(
            f"the model cannot be differentiated twice ({text.splitlines()[0][:160]}); use "
            "curvature='finite_difference', or sdpa attention without custom kernels and "
            "non-reentrant checkpointing"
        ) from error
