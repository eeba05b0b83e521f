"""Check a model on the first batch: noise, pooling, whether prefixes can be shared."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from shiftrm.models.prefix import SharedRows, pack, separate
from shiftrm.models.probes import require_own_reward, sharing_obstacle
from shiftrm.models.rewards import model_config
from shiftrm.models.rope import context_limit, frequency_limit
from shiftrm.trainers.collator import shared_rows
from shiftrm.trainers.noise import require_no_noise

__all__ = ["first_obstacle", "inspect_model", "longest_rows"]

USUAL_LENGTH = 1024
"""Tokens in the longest test pair if the configuration names no greater length."""

NOT_LENGTHS = ("size", "dim", "embd", "inner", "heads", "layers", "token", "max_position", "theta")
"""Parts of the names of configuration numbers that are not text lengths."""


def inspect_model(model: nn.Module, inputs: Mapping[str, Tensor], *, quiet: bool) -> None:
    """Refuse a model that would train silently to a wrong result.

    Args:
        inputs: a batch of `PairCollator` or of TRL's collator.
        quiet: whether training must be free of noise.

    Raises:
        UserError: see `require_own_reward` and `require_no_noise`.
    """
    require_own_reward(model)
    if quiet:
        if "segment_ids" in inputs:
            ids, mask = separate(shared_rows(inputs).take([0]), pad_token_id=0)
        else:
            ids, mask = inputs["input_ids"][:2], inputs["attention_mask"][:2]
        require_no_noise(model, ids, mask)


def first_obstacle(model: nn.Module, rows: SharedRows, *, max_length: int | None) -> str | None:
    """Return why the model cannot share prefixes, from this batch and a pair of maximal length."""
    longest = longest_rows(model_config(model), rows, max_length)
    # Always run both: every process must make the same number of passes.
    short, long = sharing_obstacle(model, rows), sharing_obstacle(model, longest)
    return short or long


def longest_rows(config: Any, rows: SharedRows, max_length: int | None) -> SharedRows:
    """Return a pair of maximal length from the batch's tokens, to expose attention windows.

    It has at most 1,024 tokens, or `max_length` if the configuration names a length beyond 1,024
    (a window, the keys that a token attends to, the context of rotary positions).
    """
    text = config.get_text_config()
    named = [n for n in _lengths(text.to_dict()) if n >= USUAL_LENGTH]
    usual = USUAL_LENGTH if not named else max(USUAL_LENGTH, 2 * max(named))
    limits = (max_length, context_limit(config), frequency_limit(config), usual)
    L = max(4, min(limit for limit in limits if limit))
    tokens = rows.input_ids[rows.segment_ids >= 0].tolist()
    tokens = (tokens * (L // len(tokens) + 1))[:L]
    P = 3 * L // 4
    # The second sequence's two tokens are far from the prefix in the row but follow it in position.
    pair = [tokens, [*tokens[:P], tokens[0], tokens[-1]]]
    longest = pack([pair], pad_token_id=0)
    return SharedRows(*(tensor.to(rows.input_ids.device) for tensor in longest))


def _lengths(options: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of a configuration that may be text lengths, in tokens."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and ("window" in name or not any(word in name for word in NOT_LENGTHS))
        ):
            yield value
