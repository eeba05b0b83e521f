"""A model's context limit, and rotary frequencies that depend on the batch.

With longrope and dynamic NTK scaling, a short sequence is rotated like the longest one of its
batch, so its reward would depend on the other rows.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shiftrm.errors import UserError

COUNT_FROM_PAD = frozenset(
    {"camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
     "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)  # fmt: skip
"""Encoders that number positions from the pad token's id on, so that the first ones stay unused."""


def context_limit(config: Any) -> int | None:
    """Return the maximum sequence length of a model's configuration, in tokens; None if not set."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or getattr(text, "model_type", "") not in COUNT_FROM_PAD:
        return positions
    return int(positions) - (1 + (text.pad_token_id or 0))


class LengthLimit(NamedTuple):
    """The most tokens of a text, whose limit that is, and what to do if no text is short enough."""

    tokens: int | None
    reason: str
    advice: str


def length_limit(config: Any, max_length: int | None) -> LengthLimit:
    """Return the smaller one of a model's context and `max_length`."""
    context = context_limit(config)
    if context is not None and (max_length is None or max_length > context):
        reason = f"longer than the model's context of {context} tokens"
        return LengthLimit(context, reason, "shorten the texts")
    reason = f"longer than max_length={max_length} tokens"
    return LengthLimit(max_length, reason, "raise max_length")


def frequency_limit(config: Any) -> int | None:
    """Return the length in tokens up to which frequencies are fixed; None if they never change."""
    limits = [limit for limit, _ in _changing(config)]
    return min(limits) if limits else None


def frequency_class(config: Any, length: int) -> tuple[int, ...]:
    """Return a class; sequences of one class may share a batch: each is rotated as if alone."""
    return tuple(
        0 if length <= limit else length if by_length else 1
        for limit, by_length in _changing(config)
    )


def require_fixed_frequencies(config: Any, length: int) -> None:
    """Reject texts whose token probabilities would depend on the final length of the text.

    Raises:
        UserError: `length` is beyond `frequency_limit`.
    """
    limit = frequency_limit(config)
    if limit is not None and length > limit:
        raise UserError(
            f"prompt and response may have {length} tokens, but beyond {limit} this policy rotates "
            "positions by the longest text of a batch, so log-probabilities would depend on it; "
            "use shorter prompts, a smaller max_new_tokens or another rope_type"
        )


def _changing(config: Any) -> Iterator[tuple[int, bool]]:
    """Yield, for each set of frequencies, the length beyond which it changes, and whether it then
    changes with every further token."""
    text = config.get_text_config()
    for options in _parameters(getattr(text, "rope_parameters", None)):
        kind = str(options.get("rope_type", ""))
        if "dynamic" in kind:
            yield text.max_position_embeddings, True
        elif kind == "longrope":
            original = options.get("original_max_position_embeddings")
            yield original or text.max_position_embeddings, False


def _parameters(options: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the set of rotary parameters, or one set for each kind of layer."""
    if not isinstance(options, Mapping):
        return
    if "rope_type" in options:
        yield options
        return
    for inner in options.values():
        yield from _parameters(inner)


def forget_longest(model: nn.Module) -> None:
    """Reset the frequencies: dynamic NTK scaling keeps those of the longest sequence so far."""
    for module in model.modules():
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            first = getattr(module, f"{prefix}original_inv_freq", None)
            if isinstance(first, torch.Tensor):
                now = getattr(module, f"{prefix}inv_freq")
                # A copy: longrope writes into the buffer in use.
                again = first.to(now.device, copy=True)
                module.register_buffer(f"{prefix}inv_freq", again, persistent=False)
                setattr(module, name, module.original_max_seq_len)
