"""A policy's log-likelihoods of responses: batches, padding, kernels and modes.

`losses.response_log_likelihood` is the formula; this module runs the forward passes of a causal
language model for it. Torch only.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.core.curvature import kinks
from shiftrm.core.losses import TokenReduction, response_log_likelihood
from shiftrm.errors import UserError


class Sequences(NamedTuple):
    """Token ids and masks of prompts with responses, padded on the right.

    Attributes:
        input_ids: tokens, shape [B, T].
        attention_mask: 1 at real tokens, 0 at padding, shape [B, T].
        response_mask: 1 at the tokens of the response, shape [B, T].
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens in each row, shape [B]."""
        return self.attention_mask.sum(dim=1)

    def rows(self, chosen: Tensor) -> "Sequences":
        """Return the chosen rows, without columns that are padding in all of them."""
        T = int(self.lengths[chosen].max())
        return Sequences(*(tensor[:, :T][chosen] for tensor in self))

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(*(tensor.to(device) for tensor in self))

    def check(self, name: str) -> None:
        """Raise ValueError if shapes differ, padding is on the left, or a row has no response."""
        shapes = {tuple(tensor.shape) for tensor in self}
        if len(shapes) > 1 or self.input_ids.dim() != 2 or self.input_ids.numel() == 0:
            raise ValueError(
                f"{name}: input_ids, attention_mask and response_mask must share one shape [B, T]; "
                f"got {[tuple(tensor.shape) for tensor in self]}"
            )
        check_right_padding(self.attention_mask, name)
        empty = ~(self.response_mask[:, 1:].bool() & self.attention_mask[:, 1:].bool()).any(dim=1)
        if bool(empty.any()):
            raise ValueError(f"{name}, example {int(empty.nonzero()[0])}: it has no response token")


def check_right_padding(attention_mask: Tensor, name: str) -> None:
    """Raise ValueError for left padding: positions count from column 0."""
    mask = attention_mask.bool()
    wrong = ~mask[:, 0] | (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if bool(wrong.any()):
        raise ValueError(
            f"{name}, example {int(wrong.nonzero()[0])}: pad on the right (attention_mask must be "
            "ones, then zeros)"
        )


def micro_batches(lengths: Tensor, size: int | None) -> list[Tensor]:
    """Return the row indices of each micro-batch, sorted by length to reduce padding."""
    if size is None or size >= len(lengths):
        return [torch.arange(len(lengths), device=lengths.device)]
    return list(lengths.argsort(stable=True).split(size))


def join(first: Sequences, second: Sequences) -> Sequences:
    """Concatenate the rows, padded to the longer length; shape [B1 + B2, T]."""
    T = max(first.input_ids.shape[1], second.input_ids.shape[1])
    padded = [[F.pad(tensor, (0, T - tensor.shape[1])) for tensor in s] for s in (first, second)]
    return Sequences(*(torch.cat(pair) for pair in zip(*padded, strict=True)))


@dataclass(frozen=True)
class Passes:
    """How to run forward passes of one policy; made once by `Passes.of`.

    Attributes:
        policy: a causal language model, full or PEFT.
        reduction: see `response_log_likelihood`.
        autocast: see `ambient_autocast`.
        keeps_logits: whether the model can compute logits at the last positions only.
    """

    policy: nn.Module
    reduction: TokenReduction
    autocast: torch.dtype | None
    keeps_logits: bool

    @classmethod
    def of(cls, policy: nn.Module, *, reduction: TokenReduction) -> "Passes":
        return cls(
            policy,
            reduction,
            ambient_autocast(policy),
            "logits_to_keep" in inspect.signature(unwrapped(policy).forward).parameters,
        )

    def __call__(self, sequences: Sequences) -> Tensor:
        """Return log pi(y|x) of each row, shape [B], in fp32 (fp64 for an fp64 policy)."""
        device = next(self.policy.parameters()).device
        ids, attention_mask, response_mask = sequences.to(device)
        response_mask = response_mask.bool() & attention_mask.bool()
        options: dict[str, Any] = {}
        if self.keeps_logits:
            # Compute logits only from the token before the earliest response: with long prompts
            # and a large vocabulary, the prompts' logits take most of the memory.
            first = int(response_mask[:, 1:].any(dim=0).int().argmax())
            keep = ids.shape[1] - first
            options["logits_to_keep"] = keep
            response_mask = response_mask[:, -keep:]
        with autocast_to(self.autocast, self.policy):
            logits = self.policy(
                input_ids=ids, attention_mask=attention_mask, use_cache=False, **options
            ).logits
        return response_log_likelihood(
            logits, ids[:, -logits.shape[1] :], response_mask, reduction=self.reduction
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside DDP and PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model


def ambient_autocast(model: nn.Module) -> torch.dtype | None:
    """Return the caller's autocast type on the model's device; None without autocast."""
    device_type = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextmanager
def autocast_to(dtype: torch.dtype | None, model: nn.Module) -> Iterator[None]:
    """Autocast to `dtype` (None: no autocast) inside the block, whatever the caller's setting.

    The cache of cast weights is off, because it would outlive a change of the weights.
    """
    device_type = next(model.parameters()).device.type
    if dtype is None:
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
            yield


def attention_kernel(model: nn.Module) -> str:
    """Return the name of the model's attention implementation, "eager" if it has none."""
    config = getattr(unwrapped(model), "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


@contextmanager
def torch_attention(policy: nn.Module) -> Iterator[None]:
    """Replace attention kernels from outside torch (flash, flex) by torch's inside the block.

    Those kernels have no second derivative; torch's have one in their math form. transformers reads
    the name in the configuration at every forward pass, also for the mask.
    """
    plain = "sdpa" if getattr(unwrapped(policy), "_supports_sdpa", True) else "eager"
    configs = {id(c): c for m in policy.modules() if (c := getattr(m, "config", None)) is not None}
    kernels = [(c, getattr(c, "_attn_implementation", None)) for c in configs.values()]
    try:
        for config, kernel in kernels:
            if kernel not in (None, "eager", "sdpa"):
                config._attn_implementation = plain
        yield
    finally:
        for config, kernel in kernels:  # a model first: setting it also sets its parts
            if getattr(config, "_attn_implementation", None) != kernel:
                config._attn_implementation = kernel


def require_plain_checkpointing(model: nn.Module, name: str) -> None:
    """Raise UserError for reentrant checkpointing, which supports only `.backward()`.

    Non-reentrant checkpointing, transformers' default, also supports second derivatives.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise UserError(
                    f"the {name} checkpoints activations with use_reentrant=True, which gives no "
                    f"gradients of chosen tensors: enable it with use_reentrant=False"
                )


def require_smooth(policy: nn.Module) -> None:
    """Raise UserError if differences of gradients would be wrong for this policy.

    Mixture of experts is allowed in fp64, whose steps are too short to change many choices.
    """
    jumps = kinks(policy)
    if jumps is None or ("ReLU" not in jumps and next(policy.parameters()).dtype == torch.float64):
        return
    raise UserError(
        f"the policy's {jumps}: curvature='finite_difference' would be wrong; use curvature='exact'"
    )


def require_symmetric_hessian(policy: nn.Module, batches: Iterable[Sequences]) -> None:
    """Raise UserError if torch's gradient is not the gradient of any function.

    `nn.Embedding(padding_idx=...)` drops the gradient of the pad token's row. If the head shares
    the weights, the row still gets the head's part, and a finite difference of such gradients along
    lam is not the product that the chain rule needs. (Differentiating twice is exact.)
    """
    owners: dict[int, int] = {}
    for module in policy.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    for module in policy.modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        if not module.weight.requires_grad or owners[id(module.weight)] == 1:
            continue
        if any(
            bool(((b.input_ids == module.padding_idx) & b.attention_mask.bool()).any())
            for b in batches
        ):
            raise UserError(
                "the policy has tied embeddings and reads its pad token inside sequences, where "
                "torch drops a part of the gradient: curvature='finite_difference' would be wrong; "
                "set policy.get_input_embeddings().padding_idx = None, or use curvature='exact'"
            )


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block; gradient checkpointing still works.

    transformers checkpoints a layer only if the layer's own `training` flag is on; dropout follows
    the flags of its submodules, which stay off.
    """
    with ExitStack() as restore:
        for module in (m for model in models for m in model.modules()):
            restore.callback(setattr, module, "training", module.training)
            # Some (OPT) apply dropout in the layer itself: these run without checkpointing.
            dropout = getattr(module, "dropout", 0.0)
            own_dropout = isinstance(dropout, float) and dropout > 0
            module.training = getattr(module, "gradient_checkpointing", False) and not own_dropout
        yield
