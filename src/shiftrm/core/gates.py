"""Per-sample products `<v, grad l_i>` of a whole batch in one backward pass.

Give each sample i a scalar gate s_i = 0 and let every leaf module that owns parameters return
`leaf(x) + s_i * leaf(x; parameters = v)`, without differentiating x. Then `d loss / d s_i` is
`<v, grad l_i>`: the derivative along v of sample i's loss. The forward pass does not compute the
second term: `_Gate` returns `leaf(x)` unchanged, and its backward computes the product from the
gradient g of the output: `s_i.grad += sum(g * leaf(x; v))`, or, for a linear layer with more
outputs than inputs (a language model's head), the cheaper `sum((g v) * x)`.

This needs no second derivative and no forward mode: fused attention, gradient checkpointing, LoRA
and tied weights work. It adds one matrix product per layer to a backward pass and no memory. The
leaves must be affine in their own parameters, and the first dimension of their output must be the
sample. For other policies (mixture of experts) `unsupported` returns the reason, and the caller
takes gradients of single samples instead.

Torch only. The method is ours; docs/benchmarks.md measures it (the hypergradient).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def unsupported(model: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    """Return why gates do not work for these parameters, as a phrase; None if they do."""
    wanted = {id(p) for p in parameters}
    for name, module in model.named_modules():
        if any(id(p) in wanted for p in module.parameters(recurse=False)) and not _affine(module):
            return f"{name or 'the model'} is a {type(module).__name__}"
    return None


def _affine(leaf: nn.Module) -> bool:
    if isinstance(leaf, nn.Embedding):
        return leaf.max_norm is None and not leaf.scale_grad_by_freq
    if isinstance(leaf, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) or _is_conv1d(leaf):
        return True
    # Each model family has its own RMSNorm class: `x_hat * w` or `x_hat * (1 + w)`.
    return type(leaf).__name__.endswith(("RMSNorm", "LayerNorm"))


def _is_conv1d(leaf: nn.Module) -> bool:
    """Whether it is transformers' linear layer with a transposed weight (GPT-2)."""
    return type(leaf).__name__ == "Conv1D"


@dataclass
class Gates:
    """State of the gates of one block.

    Attributes:
        directions: v, by parameter.
        seen: ids of the parameters that forward passes reached through their module.
        open: whether backward passes yield products. Close the gates before differentiating the
            products, which runs through the gates again and would compute unwanted products.
    """

    directions: dict[nn.Parameter, Tensor]
    seen: set[int] = field(default_factory=set)
    open: bool = True

    def unseen(self) -> bool:
        """Whether a parameter was not reached, so that the products are incomplete."""
        return any(id(p) not in self.seen for p in self.directions)


@contextmanager
def gates(
    model: nn.Module, directions: dict[nn.Parameter, Tensor], gate_B: Tensor
) -> Iterator["Gates"]:
    """Install the gates for the forward passes inside the block.

    If activations are checkpointed, the backward pass must be inside it too.

    Args:
        model: its parameters in `directions` must satisfy `unsupported(...) is None`.
        directions: v, by parameter.
        gate_B: zeros that require a gradient, shape [B]; `torch.autograd.grad` returns the products
            as its gradient.

    Yields:
        The state of the gates.
    """
    state = Gates(directions)

    def gate(leaf: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own = {
            name: directions[p]
            for name, p in leaf.named_parameters(recurse=False)
            if p in directions
        }
        if not own or kwargs or len(inputs) != 1 or not isinstance(output, Tensor):
            return None  # called by `leaf_products`, or not a plain layer: unseen
        B = len(gate_B)
        if B > 1 and output.shape[0] == 1:  # position embeddings, the same for all samples
            output = output.expand(B, *output.shape[1:])
        elif B > 1 and output.shape[0] != B:
            return None
        state.seen.update(id(p) for p in leaf.parameters(recurse=False) if p in directions)
        return _Gate.apply(output, gate_B, inputs[0], leaf, own, state)

    owners = [
        m for m in model.modules() if any(p in directions for p in m.parameters(recurse=False))
    ]
    handles = [m.register_forward_hook(gate, with_kwargs=True) for m in owners]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


class _Gate(torch.autograd.Function):
    """The identity on a leaf's output, whose backward also yields the products."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        gate_B: Tensor,
        inputs: Tensor,
        leaf: nn.Module,
        own: dict[str, Tensor],
        state: Gates,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.leaf, ctx.own, ctx.B, ctx.state = leaf, own, len(gate_B), state
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.state.open:
            return gradient, *[None] * 5
        (inputs,) = ctx.saved_tensors
        products = leaf_products(ctx.leaf, inputs, gradient, ctx.own)
        dtype = torch.promote_types(products.dtype, torch.float32)
        return gradient, products.reshape(ctx.B, -1).sum(dim=1, dtype=dtype), *[None] * 4


def leaf_products(
    leaf: nn.Module, inputs: Tensor, gradient: Tensor, own: dict[str, Tensor]
) -> Tensor:
    """Return products of v with the gradient of one leaf's parameters, not summed over features.

    Args:
        leaf: the module.
        inputs: x, its input.
        gradient: derivative of the loss by the leaf's output, shape [B, ..., features].
        own: v by name of the leaf's parameter, without frozen parameters.

    Returns:
        Shape [B, ...]; the sum (in fp32 at least) over all but the first dimension is the product.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if type(leaf) is nn.Linear or _is_conv1d(leaf):
        return _linear_products(leaf, inputs, gradient, own, dtype)
    gradient = gradient.to(dtype)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    if type(leaf) is nn.Embedding:
        moved = F.embedding(inputs, own["weight"])
    else:  # affine: subtract the constant, if any
        zeros = {name: torch.zeros_like(p) for name, p in leaf.named_parameters(recurse=False)}
        moved = functional_call(leaf, {**zeros, **own}, (inputs,))
        if _has_constant(leaf, zeros, inputs):
            moved = moved - functional_call(leaf, zeros, (inputs,))
    products = moved.to(dtype) * gradient
    if isinstance(leaf, nn.Embedding) and leaf.padding_idx is not None:
        # torch gives that row no gradient at any position.
        products = products.masked_fill((inputs == leaf.padding_idx)[..., None], 0.0)
    return products


_CONSTANTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _has_constant(leaf: nn.Module, zeros: dict[str, Tensor], inputs: Tensor) -> bool:
    """Whether the leaf's output is nonzero with all its parameters zero; computed once per leaf."""
    if leaf not in _CONSTANTS:
        found = bool(functional_call(leaf, zeros, (inputs,)).any())
        if not found and not bool(inputs.any()):
            return False  # a zero input tells nothing
        _CONSTANTS[leaf] = found
    return _CONSTANTS[leaf]


def _linear_products(
    leaf: nn.Module,
    inputs: Tensor,
    gradient: Tensor,
    own: dict[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    compute = gradient.dtype  # bf16 under autocast, for matrix products; sums use `dtype`
    if "weight" not in own:
        return gradient * own["bias"]
    v = own["weight"] if isinstance(leaf, nn.Linear) else own["weight"].T  # [out, in]
    v = v.to(compute)
    if v.shape[0] > v.shape[1]:  # the smaller of two intermediates
        products = (gradient @ v) * inputs
    else:
        products = F.linear(inputs.to(compute), v) * gradient
    if "bias" not in own:
        return products
    of_bias = (gradient * own["bias"]).sum(-1, dtype=dtype)
    return products.sum(-1, dtype=dtype) + of_bias
