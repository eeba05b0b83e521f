"""The weighted inner loss f, its gradient, and products of a vector with its derivatives.

With `l_i = -log pi_theta(y_i|x_i)`, `f(theta) = 1/B sum_i w_i l_i(theta)` and a vector v as long as
theta, this module gives, in micro-batches:

    grad f,  the products <v, grad (w_i l_i / B)> of all samples i,  and H v, H the Hessian of f.

Torch only.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from shiftrm.bilevel.gates import UnseenParameters, gates, unsupported
from shiftrm.bilevel.likelihood import Passes, Sequences, math_attention
from shiftrm.errors import UserError
from shiftrm.losses import TokenReduction

logger = logging.getLogger(__name__)


@cache
def say_once(message: str) -> None:
    """Log a line the first time it is said in this process."""
    logger.warning(message)


@dataclass(frozen=True)
class InnerLoss:
    """f at the policy's present parameters.

    Attributes:
        passes: the policy's forward passes.
        parameters: theta, the trainable ones.
        micro_batch_size: rows in one pass; None: all.
        curvature_micro_batch_size: rows in one pass that differentiates twice; None: a quarter.
        relative_step: `||eps v|| / ||theta||` of `finite_difference`; None: by precision.
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
        """The inner loss of a policy by its trainable parameters.

        Raises:
            ValueError: it has none, or a size or step is not positive.
            UserError: one is in half precision, where SGD steps round away.
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
        """f and grad f."""
        total, gradient = 0.0, self._zeros()
        for rows, weights in self._micro_batches(batch, weights_B, self.micro_batch_size):
            loss = -(weights * self.passes(rows)).sum()
            add_into(gradient, torch.autograd.grad(loss, self.parameters, allow_unused=True))
            total += float(loss.detach())
        return total, gradient

    def products(self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]) -> Tensor:
        """`<v, grad (w_i l_i / B)>`, shape [B]."""
        return self._products(batch, weights_B, v, None)

    def exact(
        self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The products and H v, by differentiating the products once more.

        Reverse over reverse. (Reverse over forward would do with fewer matrix products, but the
        tangent of softmax is computed in place, which torch 2.13 then cannot differentiate.)
        """
        size = self.curvature_micro_batch_size
        if size is None:
            size = min(self.micro_batch_size or len(weights_B), max(1, len(weights_B) // 4))
        products, curved = [], self._zeros()
        with math_attention():
            for rows, weights in self._micro_batches(batch, weights_B, size):
                scale = torch.ones_like(weights, requires_grad=True)
                loss = -(scale * weights * self.passes(rows)).sum()
                gradient = torch.autograd.grad(
                    loss, self.parameters, create_graph=True, materialize_grads=True
                )
                *second, product = torch.autograd.grad(
                    _dot(gradient, v), [*self.parameters, scale], allow_unused=True
                )
                add_into(curved, second)
                products.append(product)
        return torch.cat(products), curved

    @torch.no_grad()
    def finite_difference(
        self, batch: Sequences, weights_B: Tensor, v: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The products and H v, from gradients at theta +- eps v: error O(eps^2), plus rounding.

        Both passes run outside autocast: in bf16 the weights do not see steps this small. Leaves
        the parameters changed.
        """
        norm = _norm(v)
        if norm == 0:
            return torch.zeros_like(weights_B), self._zeros()
        default = 1e-5 if self.parameters[0].dtype == torch.float64 else 1e-4
        eps = (self.relative_step or default) * _norm(self.parameters) / norm
        plain = replace(self, passes=replace(self.passes, autocast=None))
        curved = self._zeros()
        products = torch.zeros_like(weights_B)
        for sign in (1.0, -1.0):
            for p, a in zip(self.parameters, v, strict=True):
                p.add_(a, alpha=sign * eps if sign > 0 else -2 * eps)
            gradient = self._zeros()
            # The mean of the products on both sides is the product in the middle, up to O(eps^2):
            # no third pass is needed.
            products += 0.5 * plain._products(batch, weights_B, v, gradient)
            torch._foreach_add_(curved, gradient, alpha=sign / (2 * eps))
            del gradient
        return products, curved

    @torch.enable_grad()
    def _products(
        self,
        batch: Sequences,
        weights_B: Tensor,
        v: Sequence[Tensor],
        gradient: list[Tensor] | None,
    ) -> Tensor:
        """The products; grad f is added to `gradient` where it is given."""
        why = unsupported(self.passes.policy, self.parameters)
        if why is None:
            try:
                return self._gated(batch, weights_B, v, gradient)
            except UnseenParameters:
                why = "some parameters are used outside their module"
        say_once(f"gradients are taken sample by sample: {why}")
        products = []
        for rows, weights in self._micro_batches(batch, weights_B, 1):
            loss = -(weights * self.passes(rows)).sum()
            single = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            products.append(_dot(single, v))
            if gradient is not None:
                add_into(gradient, single)
        return torch.stack(products).to(weights_B.dtype)

    def _gated(
        self,
        batch: Sequences,
        weights_B: Tensor,
        v: Sequence[Tensor],
        gradient: list[Tensor] | None,
    ) -> Tensor:
        directions = dict(zip(self.parameters, v, strict=True))
        wanted = self.parameters if gradient is not None else []
        products = []
        for rows, weights in self._micro_batches(batch, weights_B, self.micro_batch_size):
            gate = torch.zeros_like(weights, requires_grad=True)
            with gates(self.passes.policy, directions, gate) as check:
                loss = -(weights * self.passes(rows)).sum()
                check()
                product, *own = torch.autograd.grad(loss, [gate, *wanted], allow_unused=True)
            products.append(product)
            if gradient is not None:
                add_into(gradient, own)
        return torch.cat(products)

    def _micro_batches(
        self, batch: Sequences, weights_B: Tensor, size: int | None
    ) -> Iterator[tuple[Sequences, Tensor]]:
        """Rows with their weights already divided by the size B of the whole batch."""
        B = len(weights_B)
        for rows in micro_batches(B, size):
            yield batch.rows(rows).to(weights_B.device), weights_B[rows] / B

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.parameters]


def micro_batches(rows: int, size: int | None) -> Iterator[slice]:
    size = size or rows
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def add_into(total: list[Tensor], part: Sequence[Tensor | None]) -> None:
    for t, p in zip(total, part, strict=True):
        if p is not None:
            t.add_(p)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().norm() for t in tensors]).norm())
