"""What a causal language model predicts at chosen tokens, without logits for the others.

Logits are the largest tensor of a pass: a row of 300 tokens has 15 million at a vocabulary of
49,152. Only the states that predict a response token go through the LM head, and with gradient in
chunks whose logits the backward pass computes again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftrm.core.likelihood import unwrapped

LOGITS_IN_CHUNK = 2**24
"""Most logits of one chunk (64 MiB in fp32); a pass with fewer keeps them for its backward pass."""


class Predictions(NamedTuple):
    """The predictions at N states.

    Attributes:
        states: logits of shape [N, V], or without them the LM head's inputs, shape [N, H].
        vocabulary: V.
        head: maps states to logits as the model does; None where they are logits.
    """

    states: Tensor
    vocabulary: int
    head: Callable[[Tensor], Tensor] | None = None

    def chunks(self) -> list[slice]:
        """Return consecutive parts with at most `LOGITS_IN_CHUNK` logits, at least one state."""
        size = max(1, LOGITS_IN_CHUNK // self.vocabulary)
        return [slice(start, start + size) for start in range(0, len(self.states), size)]

    def logprobs(self, tokens_N: Tensor) -> Tensor:
        """Return the log-probability of one token at each state, in fp32 or more, shape [N].

        If there are several chunks, only their states are kept for the backward pass.
        """

        def one(some: Tensor, tokens: Tensor) -> Tensor:
            return chosen(some if self.head is None else self.head(some), tokens)

        chunks = self.chunks()
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [one(self.states[chunk], tokens_N[chunk]) for chunk in chunks]
        else:
            recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            parts = [recomputed(one, self.states[chunk], tokens_N[chunk]) for chunk in chunks]
        return torch.cat(parts)


def chosen(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return log-probabilities of tokens from logits, in fp32 or more, shape [N]."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV.gather(-1, tokens_N[:, None])[:, 0] - logits_NV.logsumexp(dim=-1)


def vocabulary_of(model: Any) -> int:
    """Number of logits per token of a causal language model."""
    inner: Any = unwrapped(model)
    return int(inner.config.get_text_config().vocab_size)


def logits_at(model: Any, inputs: Mapping[str, Tensor], places_N: Tensor) -> Tensor:
    """Return the model's own logits at some tokens only, shape [N, V].

    The states are selected in front of the LM head, inside the model's forward pass. So whatever
    wraps the model (DDP, FSDP, PEFT) or follows the head (soft-capping, scaling) does its work.

    Args:
        inputs: of the forward pass; `input_ids` has shape [B, L].
        places_N: indices into the B * L tokens.
    """
    with _before_head(model, inputs, places_N, lambda states_NH: states_NH) as found:
        logits: Tensor = model(**inputs, use_cache=False).logits
    L = inputs["input_ids"].shape[1]
    return logits[0] if found else logits[:, -L:].flatten(0, 1)[places_N]


def predictions_at(model: nn.Module, inputs: Mapping[str, Tensor], places_N: Tensor) -> Predictions:
    """Return the model's predictions at some tokens, without their logits where they are many.

    Args:
        model: a whole model on this process, bare or with adapters; the head is applied outside its
            forward pass.
        inputs, places_N: as for `logits_at`.
    """
    V = vocabulary_of(model)
    head = known_head(model) if len(places_N) * V > LOGITS_IN_CHUNK else None
    if head is None:
        return Predictions(logits_at(model, inputs, places_N), V)
    with _before_head(model, inputs, places_N, lambda states_NH: states_NH[:1]) as found:
        model(**inputs, use_cache=False)
    return Predictions(found[0], V, head)


@contextmanager
def _before_head(
    model: Any,
    inputs: Mapping[str, Tensor],
    places_N: Tensor,
    passed: Callable[[Tensor], Tensor],
) -> Iterator[list[Tensor]]:
    """Select the head's inputs, [N, H], collect them, and give the head `passed` of them.

    Nothing is collected where the model has no head, or one that does not read [B, L, H]. An
    adapter may put tokens of its own in front of the L.
    """
    B, L = inputs["input_ids"].shape
    inner: Any = unwrapped(model)
    head, found = inner.get_output_embeddings(), []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3 or args[0].shape[0] != B or args[0].shape[1] < L:
            return None
        found.append(args[0][:, -L:].flatten(0, 1)[places_N])
        return (passed(found[-1])[None], *args[1:])

    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def known_head(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function from the LM head's inputs to the model's logits; None if it is not known.

    It is the head, and the scaling and soft-capping that the configuration names. A small pass,
    once per model, compares it with the model's own logits. A head with an adapter is not known:
    what it computes changes when the adapter is switched off.
    """
    inner: Any = unwrapped(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    scale, cap = _after_head(inner.config.get_text_config())

    def project(states: Tensor) -> Tensor:
        logits: Tensor = head(states)
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else (logits / cap).tanh() * cap

    if inner not in _KNOWN:
        _KNOWN[inner] = _agrees(model, project)
    return project if _KNOWN[inner] else None


def _after_head(config: Any) -> tuple[float, float | None]:
    """Return the factor and the bound of a model's logits, from its text configuration."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= 1.0 if (factor := getattr(config, name, None)) is None else factor
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, getattr(config, "logits_soft_cap", None) if cap is None else cap


@torch.no_grad()
def _agrees(model: Any, project: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of the head's inputs gives the model's logits, also for large ones."""
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
    places = torch.tensor([1], device=device)

    def spread(states: Tensor) -> Tensor:  # none, usual, and as large as to reach a bound
        return torch.cat([states * 0, states, states * 256])

    with (
        torch.autocast(device.type, enabled=False),
        _before_head(model, inputs, places, spread) as found,
    ):
        theirs = model(**inputs, use_cache=False).logits
        if not found:
            return False
        ours = project(spread(found[0]))
    near = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    return ours.shape == theirs[0].shape and torch.allclose(ours, theirs[0], rtol=near, atol=near)
