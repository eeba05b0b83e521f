"""Blind sheets for human raters: order of items, and positions of responses.

Prompts are drawn as for any judge (`judges.comparing.draw`). `report/sheet.py` renders a sheet, and
`people/answers.py` reads the answers.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shiftrm.measure.judges.comparing import Comparison, Outcome
from shiftrm.models.rendering import Text

Side = Literal["A", "B"]
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "lose")
"""Outcomes for our response."""


@dataclass(frozen=True)
class Item:
    """A pair as shown to a rater: the prompt's turns (role, text) and two responses."""

    turns: tuple[tuple[str, str], ...]
    a: str
    b: str


@dataclass(frozen=True)
class Sheet:
    """A sheet for one rater.

    Attributes:
        id: from the shown content only, so it does not reveal whose response is whose. It begins
            with a letter, so that no spreadsheet reads it as a number.
        items: as shown, in order.
    """

    id: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Placement:
    """An item in the key: its pair, and the label of our response."""

    pair: int
    ours: Side


def pair_id(pair: Comparison) -> str:
    """Return the id of a prompt with two responses: the start of the SHA-256 of their JSON."""
    text = json.dumps([pair.prompt, pair.ours, pair.theirs], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def distinct(pairs: Sequence[Comparison]) -> list[Comparison]:
    """Return the distinct pairs."""
    return list({pair_id(pair): pair for pair in pairs}.values())


def place(count: int, *, raters: int, seed: int) -> list[list[Placement]]:
    """Draw the order and the positions of every rater's sheet.

    Our response is A in half of the items (up to rounding), so that a preference for the first
    response cancels. Every second rater sees each pair swapped, in another order.

    Args:
        count: pairs; every rater gets all of them.
        seed: keep it from the raters.

    Returns:
        One list of placements per rater.
    """
    sheets: list[list[Placement]] = []
    ours_first: dict[int, bool] = {}
    for rater in range(raters):
        rng = random.Random(f"place {seed} {rater}")
        if rater % 2 == 0:
            half = [i % 2 == 0 for i in range(count)]
            rng.shuffle(half)
            if count % 2 and rng.random() < 0.5:
                half = [not first for first in half]
            ours_first = dict(enumerate(half))
        else:
            ours_first = {pair: not first for pair, first in ours_first.items()}
        order = list(range(count))
        rng.shuffle(order)
        sheets.append([Placement(pair, "A" if ours_first[pair] else "B") for pair in order])
    return sheets


def make_sheet(
    pairs: Sequence[Comparison], placements: Sequence[Placement], *, rater: int
) -> Sheet:
    """Return a rater's sheet, which depends only on the texts and their positions."""
    items = []
    for placement in placements:
        pair = pairs[placement.pair]
        ours, theirs = shown_text(pair.ours), shown_text(pair.theirs)
        first, second = (ours, theirs) if placement.ours == "A" else (theirs, ours)
        items.append(Item(shown_turns(pair.prompt), first, second))
    shown = json.dumps([rater, [[item.turns, item.a, item.b] for item in items]])
    return Sheet("s" + hashlib.sha256(shown.encode()).hexdigest()[:12], tuple(items))


def shown_turns(text: Text) -> tuple[tuple[str, str], ...]:
    """Return a prompt as turns of (role, text); a string is one turn without a role."""
    if isinstance(text, str):
        return (("", _shown(text)),)
    return tuple((_shown(str(message.get("role", ""))), _content(message)) for message in text)


def shown_text(text: Text) -> str:
    """Return a response as one text."""
    return "\n\n".join(shown for _, shown in shown_turns(text))


def _content(message: dict[str, Any]) -> str:
    """Return the text of a chat message, with non-text parts and tool calls as JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [
        part
        if isinstance(part, str)
        else str(part["text"])
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else json.dumps(part, ensure_ascii=False)
        for part in [*parts, message.get("tool_calls")]
        if part
    ]
    return _shown("\n".join(texts))


UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _shown(text: str) -> str:
    """Strip whitespace, which could reveal the sampler, and replace unprintable text by U+FFFD."""
    return UNSHOWABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
