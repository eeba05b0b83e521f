"""The weighted inner loss f, its gradient, and products of a vector with its derivatives.

With `l_i = -log pi_theta(y_i|x_i)`, `f(theta) = 1/B sum_i w_i l_i(theta)` and a vector v as long as
theta, this module computes, in micro-batches:

    grad f,  the products <v, grad (w_i l_i / B)> of all samples i,  and H v, H the Hessian of f.

Torch only.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from shiftrm.core.curvature import twice_differentiable
from shiftrm.core.gates import Gates, gates, unsupported
from shiftrm.core.likelihood import Passes, Sequences, micro_batches, torch_attention
from shiftrm.core.losses import TokenReduction
from shiftrm.errors import UserError

logger = logging.getLogger(__name__)


@cache
def say_once(message: str) -> None:
    """Log a message once per process."""
    logger.warning(message)


@dataclass(frozen=True)
class InnerLoss:
    """f at the policy's current parameters.

    Attributes:
        passes: the policy's forward passes.
        parameters: theta, the trainable parameters.
        micro_batch_size: rows per pass; None means all.
        curvature_micro_batch_size: rows per pass that differentiates twice; None means a quarter.
        relative_step: `||eps v|| / ||theta||` of `finite_difference`; None chooses by precision.
    """

    passes: Passes
    parameters: list[nn.Parameter]
    micro_batch_size: int | None = None
    curvature_micro_batch_size: int | None = None
    relative_step: float | None = None

    @classmethod
    def of(
        cls,
        policy: nn.Module,
        *,
        reduction: TokenReduction = "sum",
        micro_batch_size: int | None = None,
        curvature_micro_batch_size: int | None = None,
        relative_step: float | None = None,
    ) -> "InnerLoss":
        """Return the inner loss of a policy as a function of its trainable parameters.

        Raises:
            ValueError: no trainable parameters, or a size or step is not positive.
            UserError: a parameter is in half precision, where SGD steps round away.
        """
        parameters = [p for p in policy.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("the policy has no trainable parameter")
        half = [p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            raise UserError(
                f"the policy's trainable parameters are {str(half[0]).removeprefix('torch.')}, in "
                "which inner steps round away: load it in float32 (or train LoRA adapters in "
                "float32) and use torch.autocast for speed"
            )
        for name, size in (
            ("micro_batch_size", micro_batch_size),
            ("curvature_micro_batch_size", curvature_micro_batch_size),
            ("finite_difference_step", relative_step),
        ):
            if size is not None and not size > 0:
                raise ValueError(f"{name} is {size}; it must be positive")
        return cls(
            Passes.of(policy, reduction=reduction),
            parameters,
            micro_batch_size,
            curvature_micro_batch_size,
            relative_step,
        )

    def gradient(self, batch: Sequences, weights_B: Tensor) -> tuple[float, list[Tensor]]:
        """Return f and grad f."""
        total, gradient = 0.0, self._zeros()
        for rows in micro_batches(batch.lengths, self.micro_batch_size):
            weights = weights_B[rows] / len(weights_B)
            loss = -(weights * self.passes(batch.rows(rows))).sum()
            add_into(gradient, torch.autograd.grad(loss, self.parameters, allow_unused=True))
            total += float(loss.detach())
        return total, gradient

    def products(self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]) -> Tensor:
        """Return `<v, grad (w_i l_i / B)>`, shape [B]."""
        return self._products(batch, weights_B, v, None)

    def exact(
        self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the products and H v: `H v = grad sum_i <v, grad (w_i l_i / B)>`.

        Differentiates the products, which gates compute without grad f: one matrix product per
        layer less than differentiating `<v, grad f>`, and no gradient-sized graph. (Reverse over
        forward has the same cost, but torch 2.13 computes the tangent of softmax in place and then
        cannot differentiate it.)
        """
        size = self.curvature_micro_batch_size
        if size is None:
            size = max(1, (self.micro_batch_size or len(weights_B)) // 4)
        curved = self._zeros()

        def by_gates(loss: Tensor, gate: Tensor, state: Gates) -> Tensor:
            [product] = torch.autograd.grad(loss, [gate], create_graph=True)
            state.open = False
            add_into(curved, self._gradients(product.sum()))
            return product.detach()

        def by_gradients(rows: Sequences, weights: Tensor) -> Tensor:
            scale = torch.ones_like(weights, requires_grad=True)
            loss = -(scale * weights * self.passes(rows)).sum()
            gradient = torch.autograd.grad(
                loss, self.parameters, create_graph=True, materialize_grads=True
            )
            *second, product = torch.autograd.grad(
                _dot(gradient, v), [*self.parameters, scale], allow_unused=True
            )
            add_into(curved, second)
            return product

        with twice_differentiable(), torch_attention(self.passes.policy):
            return self._over(batch, weights_B, v, by_gates, size, by_gradients, size), curved

    @torch.no_grad()
    def finite_difference(
        self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the products and H v from gradients at theta +- eps v; error O(eps^2) + rounding.

        Both passes run outside autocast: bf16 would round steps this small away. Leaves the
        parameters changed.
        """
        norm = _norm(v)
        if norm == 0:
            return torch.zeros_like(weights_B), self._zeros()
        default = 1e-5 if self.parameters[0].dtype == torch.float64 else 1e-4
        # All parameters may be 0 (LoRA's B alone at the start): steps are then relative to 1.
        eps = (self.relative_step or default) * (_norm(self.parameters) or 1.0) / norm
        plain = replace(self, passes=replace(self.passes, autocast=None))
        curved = self._zeros()
        products = torch.zeros_like(weights_B)
        for sign in (1.0, -1.0):
            for p, a in zip(self.parameters, v, strict=True):
                p.add_(a, alpha=sign * eps if sign > 0 else -2 * eps)
            gradient = self._zeros()
            # The mean of the products on both sides equals the product in the middle up to
            # O(eps^2), so no third pass is needed.
            products += 0.5 * plain._products(batch, weights_B, v, gradient)
            torch._foreach_add_(curved, gradient, alpha=sign / (2 * eps))
            del gradient
        return products, curved

    def _products(
        self,
        batch: Sequences,
        weights_B: Tensor,
        v: Sequence[Tensor],
        gradient: list[Tensor] | None,
    ) -> Tensor:
        """Return the products; add grad f to `gradient` if given."""

        def by_gates(loss: Tensor, gate: Tensor, state: Gates) -> Tensor:
            wanted = self.parameters if gradient is not None else []
            product, *own = torch.autograd.grad(loss, [gate, *wanted], allow_unused=True)
            if gradient is not None:
                add_into(gradient, own)
            return product

        def of_one_sample(rows: Sequences, weights: Tensor) -> Tensor:
            own = self._gradients(-(weights * self.passes(rows)).sum())
            if gradient is not None:
                add_into(gradient, own)
            return _dot(own, v)[None].to(weights.dtype)

        return self._over(batch, weights_B, v, by_gates, self.micro_batch_size, of_one_sample, 1)

    @torch.enable_grad()
    def _over(
        self,
        batch: Sequences,
        weights_B: Tensor,
        v: Sequence[Tensor],
        by_gates: Callable[[Tensor, Tensor, Gates], Tensor],
        size: int | None,
        without: Callable[[Sequences, Tensor], Tensor],
        size_without: int | None,
    ) -> Tensor:
        """Return the products of all micro-batches, by gates where they work."""
        products = torch.empty_like(weights_B)
        scaled = weights_B / len(weights_B)
        why = unsupported(self.passes.policy, self.parameters)
        directions = dict(zip(self.parameters, v, strict=True))
        for number, rows in enumerate(micro_batches(batch.lengths, size) if why is None else ()):
            gate = torch.zeros_like(scaled[rows], requires_grad=True)
            with gates(self.passes.policy, directions, gate) as state:
                loss = -(scaled[rows] * self.passes(batch.rows(rows))).sum()
                if state.unseen():
                    why = "a parameter is used outside its module"
                    if number:  # earlier sums lack its share
                        raise RuntimeError(f"{why} in some batches only")
                    break
                products[rows] = by_gates(loss, gate, state)
        if why is not None:
            say_once(f"gradients are taken without gates: {why}")
            for rows in micro_batches(batch.lengths, size_without):
                products[rows] = without(batch.rows(rows), scaled[rows])
        return products

    def _gradients(self, value: Tensor) -> list[Tensor]:
        gradient = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        return list(gradient)

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.parameters]


def add_into(total: list[Tensor], part: Sequence[Tensor | None]) -> None:
    found = [(t, p) for t, p in zip(total, part, strict=True) if p is not None]
    if found:
        torch._foreach_add_(*map(list, zip(*found, strict=True)))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().norm() for t in tensors]).norm())
