"""The three rules that turn grad J into a step direction, and their derivatives.

`d` is the direction that Eq. 3 of Dou et al., arXiv 2405.00438, multiplies by eta. The paper uses
grad J itself; the other two rules are ours. Imports torch only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MetaStep = Literal["sgd", "normalized", "adaptive"]
"""How to turn grad J into a direction; see `ascent_direction`."""


@dataclass
class AdaptiveState:
    """Adam's moments of grad J, carried from one meta step to the next."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return all state by name for saving; `from_tensors` reads it back."""
        named = {"steps": torch.tensor(self.steps)}
        for kind, moments in (("first", self.first), ("second", self.second)):
            named |= {f"{kind}.{i}": m for i, m in enumerate(moments)}
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "AdaptiveState":
        """Return the state that `tensors` saved."""
        count = (len(named) - 1) // 2
        return cls(
            steps=int(named["steps"]),
            first=[named[f"first.{i}"] for i in range(count)],
            second=[named[f"second.{i}"] for i in range(count)],
        )


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries together, a scalar in at least fp32.

    For sharded tensors (DTensor) it is the norm over all shards; every process must call it.
    """
    if not tensors:
        return torch.zeros(())
    norms = [_whole(t.to(torch.promote_types(t.dtype, torch.float32)).norm()) for t in tensors]
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()


def ascent_direction(
    gradients: Sequence[Tensor], *, meta_step: MetaStep, state: AdaptiveState | None = None
) -> list[Tensor]:
    """Return the direction that Eq. 3 multiplies by eta.

    Args:
        gradients: grad J, one tensor per parameter, of any shapes.
        meta_step: "sgd" is the paper's plain gradient. "normalized" is `g / ||g||` over all
            parameters together, so that eta is the length of the step at any scale of the rewards
            (as in SAM; ours). "adaptive" is Adam's bias-corrected `m / (sqrt(v) + eps)`, as an Adam
            optimizer for the meta process would do (ours; not in the paper).
        state: Adam's moments, updated in place; required for "adaptive".

    Returns:
        One tensor per parameter; all zero if the gradient is zero.

    Raises:
        ValueError: unknown rule, or "adaptive" without a state.
    """
    if meta_step == "sgd":
        return list(gradients)
    if meta_step == "normalized":
        scale = _reciprocal(global_norm(gradients))
        return [g * scale.to(g.dtype) for g in gradients]
    if meta_step == "adaptive":
        return _adam_direction(gradients, _require(state))
    raise ValueError(f"meta_step is {meta_step!r}; expected one of {get_args(MetaStep)}")


def meta_directions(
    gradients: Sequence[Tensor], *, meta_step: MetaStep, state: AdaptiveState | None = None
) -> tuple[list[Tensor], bool]:
    """Return `ascent_direction` and False, or zeros and True if the gradient is not finite.

    Such a skipped step does not change Adam's moments.
    """
    if not math.isfinite(float(global_norm(gradients))):
        return [torch.zeros_like(g) for g in gradients], True
    return ascent_direction(gradients, meta_step=meta_step, state=state), False


@torch.no_grad()
def direction_vjp(
    gradients: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    meta_step: MetaStep,
    state: AdaptiveState | None = None,
) -> list[Tensor]:
    """Return `D^T v`, with D the Jacobian of `ascent_direction` at grad J.

    With `g` the gradient and `d` the direction:
    - "sgd": D is the identity, so the result is v.
    - "normalized": `D = (I - d d^T) / ||g||`, over all parameters together.
    - "adaptive": D is diagonal. Adam's moments of earlier steps are constants. Where the second
      moment is zero, J has never depended on the entry, and its Hessian's column is zero too: the
      result there is 0, not the formula's 1/eps.

    Where the rule has no derivative (g = 0 under "normalized") the result is 0: there is no step.

    Args:
        gradients: grad J, as given to `ascent_direction`.
        vectors: v, one tensor per parameter.
        meta_step: the rule.
        state: Adam's moments *after* `ascent_direction` processed this gradient; not changed.

    Returns:
        One tensor per parameter, in the wider type of g and v.

    Raises:
        ValueError: unknown rule, or "adaptive" without a state.

    The derivative is ours; the paper is first-order.
    """
    if meta_step == "sgd":
        return list(vectors)
    if meta_step == "normalized":
        scale = _reciprocal(global_norm(gradients))
        along = scale * inner_product(gradients, vectors)  # <d, v>
        return [
            (v - g * (scale * along).to(g.dtype)) * scale.to(v.dtype)
            for g, v in zip(gradients, vectors, strict=True)
        ]
    if meta_step == "adaptive":
        return _adam_vjp(gradients, vectors, _require(state))
    raise ValueError(f"meta_step is {meta_step!r}; expected one of {get_args(MetaStep)}")


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product over all tensors, a differentiable scalar in at least fp32."""
    parts = []
    for a, b in zip(left, right, strict=True):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        parts.append(_whole((a.to(dtype) * b.to(dtype)).sum()))
    if not parts:
        return torch.zeros(())
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def _whole(scalar: Tensor) -> Tensor:
    return scalar.full_tensor() if isinstance(scalar, DTensor) else scalar


def _reciprocal(norm: Tensor) -> Tensor:
    """Return 1 / norm, or 0 for 0."""
    return torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm))


def _require(state: AdaptiveState | None) -> AdaptiveState:
    if state is None:
        raise ValueError("meta_step='adaptive' needs an AdaptiveState")
    return state


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


def _adam_vjp(
    gradients: Sequence[Tensor], vectors: Sequence[Tensor], state: AdaptiveState
) -> list[Tensor]:
    beta1, beta2 = state.betas
    correction1 = 1.0 - beta1**state.steps
    correction2 = 1.0 - beta2**state.steps
    results = []
    for g, v, m, second in zip(gradients, vectors, state.first, state.second, strict=True):
        root = (second / correction2).sqrt()
        size = root + state.eps
        through_first = (1.0 - beta1) / correction1 / size
        # d root / d g = (1 - beta2) g / (correction2 root)
        through_root = (1.0 - beta2) / correction2 * g / root * (m / correction1) / size**2
        results.append(v * torch.where(root > 0, through_first - through_root, 0.0))
    return results
