"""How many tokens the rows of a run's data sets have, before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiftrm.files import Row

__all__ = ["Lengths", "Spelling", "lengths_of", "spelling_of"]

FEW = 64
"""Prompts that are tokenised."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row of each data set: the mean, and the most that reach a model."""

    mean: dict[str, float]
    longest: dict[str, float]


@dataclass(frozen=True)
class Spelling:
    """How text becomes tokens: so many a character, and so many a row around it.

    The defaults are a guess for a tokenizer that is not on this machine.
    """

    per_character: float = 0.25
    per_row: float = 0.0


def spelling_of(model: str, prompts: Sequence[Row]) -> Spelling:
    """Measure it on the first prompts, with the tokenizer in the model's folder."""
    from transformers import AutoTokenizer

    from shiftrm.models.rendering import encode_prompt

    some = [row["prompt"] for row in prompts[:FEW]]
    characters = sum(map(_characters, some))
    if not characters:
        return Spelling()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        plain = sum(len(tokenizer(text)["input_ids"]) for text in _texts(some))
        rendered = sum(len(encode_prompt(tokenizer, prompt)) for prompt in some)
    except Exception:  # none there, or it gets its template later
        return Spelling()
    return Spelling(plain / characters, max(0.0, (rendered - plain) / len(some)))


def lengths_of(
    rows: Mapping[str, Sequence[Row]], most: Mapping[str, int | None], spelling: Spelling
) -> Lengths:
    """Return the lengths of all rows of each data set.

    Args:
        most: tokens by data set above which a row is dropped; of a pair, of prompt and one response
            each.
    """
    mean, longest = {}, {}
    for name, found in rows.items():
        tokens = [spelling.per_row + spelling.per_character * _characters(row) for row in found]
        limit = most.get(name)
        kept = [t for t, row in zip(tokens, found, strict=True) if _fits(row, limit, spelling)]
        mean[name] = sum(tokens) / max(1, len(tokens))
        longest[name] = max(kept or tokens, default=0.0)
        if limit is not None and not kept:
            longest[name] = min(longest[name], 2.0 * limit)
    return Lengths(mean, longest)


def _fits(row: Row, limit: int | None, spelling: Spelling) -> bool:
    if limit is None:
        return True
    sides = [row[side] for side in ("chosen", "rejected") if side in row]
    rest = _characters({key: row[key] for key in row if key not in ("chosen", "rejected")})
    longer = rest + max(map(_characters, sides), default=0)
    return spelling.per_row + spelling.per_character * longer <= limit


def _characters(value: Any) -> int:
    return sum(map(len, _texts(value)))


def _texts(value: Any) -> list[str]:
    """All texts of a row, without the roles of messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, part in value.items() if key != "role" for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []
