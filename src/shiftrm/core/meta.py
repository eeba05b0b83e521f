"""The MetaRM step over any parameters: move along grad J, compute grad L there, move back.

Dou et al., arXiv 2405.00438, Algorithm 1. With theta the parameters, J the difference loss on
unlabelled responses (Eq. 2) and L the preference loss (Eq. 1):

    theta' = theta + eta * grad J(theta)                     (Eq. 3, gradient ascent)
    theta <- theta - alpha * grad_{theta'} L(theta')         (Eq. 4, applied to theta)

This module computes grad L(theta'); the caller's optimizer applies it. The paper omits the
derivative of theta' itself; `meta_order="exact"` (ours) adds it: the gradient of
`L(theta + eta d(grad J(theta)))` is `grad L(theta') + eta H_J D^T grad L(theta')`, with H_J the
Hessian of J and D the Jacobian of the direction d.

If weights or activations are bf16, `theta'` rounds back to theta or rounding hides the change of
the gradient; `midpoint_change` then computes grad L(theta') - grad L(theta) directly.
`choose_meta_shift` decides; docs/bf16-meta-step.md has the measurements.

Imports torch only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shiftrm.core.curvature import (
    Curvature,
    coarsest_type,
    finite_difference_product,
    hessian_vector_product,
    relative_size,
)
from shiftrm.core.meta_direction import (
    AdaptiveState,
    MetaStep,
    ascent_direction,
    direction_vjp,
    global_norm,
    meta_directions,
)
from shiftrm.core.meta_layers import per_layer, per_layer_vjp
from shiftrm.core.meta_shift import (
    MetaShift,
    add_unbiased_,
    ascend_,
    choose_meta_shift,
    look_ahead,
    midpoint_change,
    midpoint_change_by_differences,
)
from shiftrm.core.objectives import held_signs, recorded_signs

__all__ = [
    "AdaptiveState",
    "MetaOrder",
    "MetaReport",
    "MetaRule",
    "MetaShift",
    "MetaStep",
    "add_unbiased_",
    "ascend_",
    "ascent_direction",
    "choose_meta_shift",
    "direction_vjp",
    "global_norm",
    "influence",
    "look_ahead",
    "meta_directions",
    "metarm_gradient",
    "midpoint_change",
    "midpoint_change_by_differences",
    "second_order_term",
]

MetaOrder = Literal["first", "exact"]
"""first: grad L(theta'), as in the paper. exact: the gradient through the step."""


@dataclass(frozen=True)
class MetaReport:
    """What one meta step did.

    Attributes:
        objective_before: J at theta.
        objective_after: J at theta' on the same responses; None if not measured.
        gradient_norm: `||grad J(theta)||`; NaN if the step was skipped.
        step_norm: `||theta' - theta||`.
        influence: `||grad L(theta') - grad L(theta)|| / ||grad L(theta)||`; None if not measured.
            Near 0 the meta step has no effect.
        skipped: whether grad J was not finite, so that theta' = theta.
    """

    objective_before: float
    gradient_norm: float
    step_norm: float
    objective_after: float | None = None
    influence: float | None = None
    skipped: bool = False


# -- through the step ------------------------------------------------------------------------


def second_order_term(
    objective_product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    gradients: Sequence[Tensor],
    shifted: Sequence[Tensor],
    *,
    meta_learning_rate: float,
    meta_step: MetaStep,
    state: AdaptiveState | None = None,
    weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return `eta H_J(theta) D^T grad L(theta')`, which `meta_order="exact"` adds.

    Args:
        objective_product: v -> H_J v at theta, summed over the micro-batches and processes of the
            meta batch; uses `hessian_vector_product` or `finite_difference_product`.
        gradients: grad J(theta), from which the direction was made.
        shifted: grad L(theta') over the whole batch of pairs.
        meta_learning_rate: eta. A length that was chosen by its effect counts as a constant.
        meta_step, state: see `direction_vjp`.
        weights: theta, if the direction was made from `per_layer(gradients, weights)`.

    Returns:
        One tensor per parameter.

    Cost: one Hessian-vector product of J. Memory: that of the product, plus D^T v and the result
    (two copies of the trainable parameters), plus grad J, which must be kept until here.
    """
    scaled = gradients if weights is None else per_layer(gradients, weights)
    vectors = direction_vjp(scaled, shifted, meta_step=meta_step, state=state)
    if weights is not None:
        vectors = per_layer_vjp(gradients, weights, vectors)
    return [meta_learning_rate * product for product in objective_product(vectors)]


# -- the whole step --------------------------------------------------------------------------


def influence(shifted: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Return `||grad L(theta') - grad L(theta)|| / ||grad L(theta)||`; 0 if both are zero.

    In bf16 this measures rounding; use `relative_size(change, base)` of the midpoint change.
    """
    return relative_size([s - b for s, b in zip(shifted, base, strict=True)], base)


@dataclass(frozen=True)
class MetaRule:
    """How `metarm_gradient` takes its step.

    Attributes:
        meta_learning_rate: eta >= 0.
        meta_step: see `ascent_direction`.
        meta_order: "first" is the paper's; "exact" adds `second_order_term`.
        meta_shift: see `choose_meta_shift`.
        curvature: method of Hessian products, for "exact" and "midpoint". "finite_difference" needs
            no second derivative; its radius suits the parameters' type, not autocast's.

    Raises:
        ValueError: on construction, an unknown choice.
    """

    meta_learning_rate: float
    meta_step: MetaStep = "sgd"
    meta_order: MetaOrder = "first"
    meta_shift: MetaShift = "in_place"
    curvature: Curvature = "exact"

    def __post_init__(self) -> None:
        for name, choices in (
            ("meta_step", get_args(MetaStep)),
            ("meta_order", get_args(MetaOrder)),
            ("meta_shift", get_args(MetaShift)),
            ("curvature", get_args(Curvature)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {choices}")


def metarm_gradient(
    parameters: Sequence[Tensor],
    objective: Callable[[], Tensor],
    loss: Callable[[], Tensor],
    rule: MetaRule,
    *,
    state: AdaptiveState | None = None,
    diagnose: bool = True,
) -> tuple[list[Tensor], MetaReport]:
    """Return `grad L(theta')` of one MetaRM step; the parameters stay at theta.

    Args:
        parameters: leaf tensors that require gradients; `objective` and `loss` read them.
        objective, loss: compute J and L, scalars, at the parameters' current values.
        state: Adam's moments, for `meta_step="adaptive"`; updated in place.
        diagnose: also measure J after the step and its influence, at the cost of one forward pass
            of J and one gradient of L.

    Returns:
        The gradient of L, one tensor per parameter (zeros if L does not depend on it); a report.

    Raises:
        UserError: see `hessian_vector_product`.
    """
    eta = rule.meta_learning_rate
    with recorded_signs() as signs:
        objective_before, gradients = _value_and_gradient(objective, parameters)
    directions, skipped = meta_directions(gradients, meta_step=rule.meta_step, state=state)
    base = change = objective_after = measured = None
    if diagnose or rule.meta_shift == "midpoint":
        base = _value_and_gradient(loss, parameters)[1]
    if base is not None and rule.meta_shift == "midpoint":
        change = _change(loss, parameters, directions, rule)
        shifted = [b + c for b, c in zip(base, change, strict=True)]
    with look_ahead(parameters, directions, meta_learning_rate=eta):  # Eq. 3
        if change is None:
            _, shifted = _value_and_gradient(loss, parameters)  # Eq. 4, at theta'
        if diagnose:
            with torch.no_grad():
                objective_after = float(objective())
    if base is not None:
        measured = influence(shifted, base) if change is None else relative_size(change, base)
    if rule.meta_order == "exact" and not skipped:
        term = second_order_term(
            lambda vectors: _product(objective, parameters, vectors, rule.curvature, signs),
            gradients,
            shifted,
            meta_learning_rate=eta,
            meta_step=rule.meta_step,
            state=state,
        )
        shifted = [s + t for s, t in zip(shifted, term, strict=True)]
    return shifted, MetaReport(
        objective_before=objective_before,
        objective_after=objective_after,
        gradient_norm=math.nan if skipped else float(global_norm(gradients)),
        step_norm=eta * float(global_norm(directions)),
        influence=measured,
        skipped=skipped,
    )


def _change(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    rule: MetaRule,
) -> list[Tensor]:
    """Return `grad L(theta') - grad L(theta)`."""
    eta = rule.meta_learning_rate
    if rule.curvature == "exact":
        return midpoint_change(loss, parameters, directions, meta_learning_rate=eta)
    return midpoint_change_by_differences(
        lambda: _value_and_gradient(loss, parameters)[1],
        parameters,
        directions,
        meta_learning_rate=eta,
        compute_type=coarsest_type(parameters),
    )[0]


def _product(
    objective: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    curvature: Curvature,
    signs: Sequence[Tensor],
) -> list[Tensor]:
    """Return `H_J v` at theta."""
    if curvature == "exact":
        return hessian_vector_product(objective, parameters, vectors)

    def gradient() -> list[Tensor]:
        with held_signs(signs):
            return _value_and_gradient(objective, parameters)[1]

    return finite_difference_product(
        gradient, parameters, vectors, compute_type=coarsest_type(parameters)
    )[0]


def _value_and_gradient(
    function: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    value = function()
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    return float(value.detach()), list(gradients)
