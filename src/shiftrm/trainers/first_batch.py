"""What a trainer finds out with its first batch: noise, pooling, whether prefixes can be shared."""

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
"""How far one looks where the configuration names no length beyond it."""

NOT_LENGTHS = ("size", "dim", "embd", "inner", "heads", "layers", "token", "max_position", "theta")
"""Parts of the names of numbers in a configuration that are no lengths of text."""


def inspect_model(model: nn.Module, inputs: Mapping[str, Tensor], *, quiet: bool) -> None:
    """Refuse what would train, but not to what it seems to.

    Args:
        inputs: a batch of `PairCollator` or of TRL's collator.
        quiet: training is meant to be without noise.

    Raises:
        UserError: as `require_own_reward` and `require_no_noise`.
    """
    require_own_reward(model)
    if quiet:
        if "segment_ids" in inputs:
            ids, mask = separate(shared_rows(inputs).take([0]), pad_token_id=0)
        else:
            ids, mask = inputs["input_ids"][:2], inputs["attention_mask"][:2]
        require_no_noise(model, ids, mask)


def first_obstacle(model: nn.Module, rows: SharedRows, *, max_length: int | None) -> str | None:
    """Why the model cannot share prefixes, by this batch and by a pair as long as pairs may get."""
    longest = longest_rows(model_config(model), rows, max_length)
    # Both in any case: processes must make as many passes as each other.
    short, long = sharing_obstacle(model, rows), sharing_obstacle(model, longest)
    return short or long


def longest_rows(config: Any, rows: SharedRows, max_length: int | None) -> SharedRows:
    """A pair as long as pairs may get, of the batch's tokens: windows show only at length.

    Up to 1,024 tokens; up to `max_length` where the configuration names a length beyond that (a
    window, the keys that a token attends to, a context that rotary positions were made for).
    """
    text = config.get_text_config()
    named = [n for n in _lengths(text.to_dict()) if n >= USUAL_LENGTH]
    usual = USUAL_LENGTH if not named else max(USUAL_LENGTH, 2 * max(named))
    limits = (max_length, context_limit(config), frequency_limit(config), usual)
    L = max(4, min(limit for limit in limits if limit))
    tokens = rows.input_ids[rows.segment_ids >= 0].tolist()
    tokens = (tokens * (L // len(tokens) + 1))[:L]
    P = 3 * L // 4
    # The second one's two tokens stand far from the prefix in the row, but next to it in fact.
    pair = [tokens, [*tokens[:P], tokens[0], tokens[-1]]]
    longest = pack([pair], pad_token_id=0)
    return SharedRows(*(tensor.to(rows.input_ids.device) for tensor in longest))


def _lengths(options: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of a configuration that may be lengths of text, in tokens."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and ("window" in name or not any(word in name for word in NOT_LENGTHS))
        ):
            yield value
