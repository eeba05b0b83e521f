"""The MetaRM step over any parameters: look ahead along grad J, differentiate, come back.

Dou et al., arXiv 2405.00438, Algorithm 1, first order. With theta the parameters, J the difference
loss on unlabelled responses (Eq. 2) and L the preference loss (Eq. 1):

    theta' = theta + eta * grad J(theta)                     (Eq. 3, gradient ascent)
    theta <- theta - alpha * grad_{theta'} L(theta')         (Eq. 4, applied to theta)

This module yields grad L(theta'); the optimizer that applies it is the caller's. What it leaves
out, as the paper does, is the derivative of theta' itself: the exact gradient of
`L(theta + eta grad J(theta))` is `(I + eta H_J) grad L(theta')`, with H_J the Hessian of J.

Imports torch only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MetaStep = Literal["sgd", "normalized", "adaptive"]
"""How grad J becomes a direction; see `ascent_direction`."""


@dataclass
class AdaptiveState:
    """Adam's moments of grad J, carried from one meta step to the next."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it by name, to be saved; `from_tensors` reads it back."""
        named = {"steps": torch.tensor(self.steps)}
        for kind, moments in (("first", self.first), ("second", self.second)):
            named |= {f"{kind}.{i}": m for i, m in enumerate(moments)}
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "AdaptiveState":
        """The state that `tensors` gave."""
        count = (len(named) - 1) // 2
        return cls(
            steps=int(named["steps"]),
            first=[named[f"first.{i}"] for i in range(count)],
            second=[named[f"second.{i}"] for i in range(count)],
        )


@dataclass(frozen=True)
class MetaReport:
    """What one meta step did.

    Attributes:
        objective_before: J at theta.
        objective_after: J at theta' on the same responses; None if not measured.
        gradient_norm: `||grad J(theta)||`; NaN if the step was skipped.
        step_norm: `||theta' - theta||`.
        influence: `||grad L(theta') - grad L(theta)|| / ||grad L(theta)||`; None if not measured.
            Near 0 the meta step changes nothing, whatever else was configured.
        skipped: grad J was not finite, so theta' = theta.
    """

    objective_before: float
    gradient_norm: float
    step_norm: float
    objective_after: float | None = None
    influence: float | None = None
    skipped: bool = False


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries together, a scalar in at least fp32.

    Of sharded tensors (DTensor) it is the norm over all shards; every process must then call it.
    """
    if not tensors:
        return torch.zeros(())
    norms = [t.to(torch.promote_types(t.dtype, torch.float32)).norm() for t in tensors]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()


def ascent_direction(
    gradients: Sequence[Tensor], *, meta_step: MetaStep, state: AdaptiveState | None = None
) -> list[Tensor]:
    """The direction that is multiplied with eta in Eq. 3.

    Args:
        gradients: grad J, one tensor a parameter, of any shapes.
        meta_step: "sgd" is the paper's plain gradient. "normalized" is `g / ||g||` over all
            parameters together, so that eta is the length of the step whatever the scale of the
            rewards (as in SAM; ours). "adaptive" is Adam's bias-corrected `m / (sqrt(v) + eps)`,
            which is what an implementation with an Adam optimizer for the meta process would do
            (the paper's text does not say so; ours).
        state: Adam's moments, updated in place; required for "adaptive".

    Returns:
        One tensor a parameter. All zero if the gradient is zero.

    Raises:
        ValueError: unknown rule, or "adaptive" without a state.
    """
    if meta_step == "sgd":
        return list(gradients)
    if meta_step == "normalized":
        norm = global_norm(gradients)
        scale = torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm))
        return [g * scale.to(g.dtype) for g in gradients]
    if meta_step == "adaptive":
        if state is None:
            raise ValueError("meta_step='adaptive' needs an AdaptiveState")
        return _adam_direction(gradients, state)
    raise ValueError(f"meta_step is {meta_step!r}; expected one of {get_args(MetaStep)}")


def meta_directions(
    gradients: Sequence[Tensor], *, meta_step: MetaStep, state: AdaptiveState | None = None
) -> tuple[list[Tensor], bool]:
    """`ascent_direction`, or zeros and True if the gradient is not finite: a skipped meta step.

    A skipped step leaves Adam's moments as they were.
    """
    if not math.isfinite(float(global_norm(gradients))):
        return [torch.zeros_like(g) for g in gradients], True
    return ascent_direction(gradients, meta_step=meta_step, state=state), False


@torch.no_grad()
def _adam_direction(gradients: Sequence[Tensor], state: AdaptiveState) -> list[Tensor]:
    if not state.first:
        state.first = [torch.zeros_like(g) for g in gradients]
        state.second = [torch.zeros_like(g) for g in gradients]
    state.steps += 1
    beta1, beta2 = state.betas
    correction1 = 1.0 - beta1**state.steps
    correction2 = 1.0 - beta2**state.steps
    directions = []
    for g, m, v in zip(gradients, state.first, state.second, strict=True):
        m.mul_(beta1).add_(g, alpha=1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        directions.append((m / correction1) / ((v / correction2).sqrt() + state.eps))
    return directions


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
    parameters: Sequence[Tensor], directions: Sequence[Tensor], *, meta_learning_rate: float
) -> None:
    """theta <- theta + eta * direction, in place (Eq. 3)."""
    for p, direction in zip(parameters, directions, strict=True):
        p.add_(direction, alpha=meta_learning_rate)  # Eq. 3


def influence(shifted: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """`||grad L(theta') - grad L(theta)|| / ||grad L(theta)||`; 0 if both gradients vanish."""
    change = float(global_norm([s - b for s, b in zip(shifted, base, strict=True)]))
    size = float(global_norm(base))
    if size == 0.0:
        return 0.0 if change == 0.0 else math.inf
    return change / size


def metarm_gradient(
    parameters: Sequence[Tensor],
    objective: Callable[[], Tensor],
    loss: Callable[[], Tensor],
    *,
    meta_learning_rate: float,
    meta_step: MetaStep = "sgd",
    state: AdaptiveState | None = None,
    diagnose: bool = True,
) -> tuple[list[Tensor], MetaReport]:
    """One first-order MetaRM step: `grad L(theta')`, with the parameters left at theta.

    Args:
        parameters: leaf tensors that require gradients; `objective` and `loss` read them.
        objective: computes J, a scalar, at the parameters' present values.
        loss: computes L, a scalar, likewise.
        meta_learning_rate: eta >= 0.
        meta_step, state: see `ascent_direction`.
        diagnose: also measure J after the step and its influence, for one more forward pass of J
            and one more gradient of L.

    Returns:
        The gradient of L at theta', one tensor a parameter (zeros where L does not depend on it),
        and a report.
    """
    objective_before, gradients = _value_and_gradient(objective, parameters)
    directions, skipped = meta_directions(gradients, meta_step=meta_step, state=state)
    base = _value_and_gradient(loss, parameters)[1] if diagnose else None
    objective_after = None
    with look_ahead(parameters, directions, meta_learning_rate=meta_learning_rate):  # Eq. 3
        _, shifted = _value_and_gradient(loss, parameters)  # Eq. 4, at theta'
        if diagnose:
            with torch.no_grad():
                objective_after = float(objective())
    report = MetaReport(
        objective_before=objective_before,
        objective_after=objective_after,
        gradient_norm=math.nan if skipped else float(global_norm(gradients)),
        step_norm=meta_learning_rate * float(global_norm(directions)),
        influence=None if base is None else influence(shifted, base),
        skipped=skipped,
    )
    return shifted, report


def _value_and_gradient(
    function: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    value = function()
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return float(value.detach()), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]
