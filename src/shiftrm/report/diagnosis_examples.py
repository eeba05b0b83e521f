"""Example rows for a page: smallest and largest reward differences, and wrong orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shiftrm.files import Row
from shiftrm.measure.diagnosis.diagnosis import ScoredFile
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredResponse, distinct
from shiftrm.report.diagnosis_tables import short
from shiftrm.report.samples import RESPONSE_LIMIT

EXAMPLES = 2  # examples of each kind
RESPONSES = 6  # responses shown per group


@dataclass(frozen=True)
class Shown:
    """A response as text, with the line below it."""

    text: str
    note: str


@dataclass(frozen=True)
class ShownRow:
    """A prompt with its responses, the best first."""

    why: str
    prompt: str
    responses: tuple[Shown, ...]
    left_out: int


def examples(file: ScoredFile, rows: Sequence[Row]) -> list[ShownRow]:
    """Return groups with the smallest and largest spread, or the worst and closest pairs.

    Args:
        file: rewards of the rows.
        rows: in the same order.
    """
    if file.kind == "pairs":
        return _of_pairs(file, rows)
    single = [distinct(group) for group in file.groups]
    comparable = [i for i, group in enumerate(single) if len(group.responses) > 1]
    order = sorted(comparable, key=lambda i: _deviation(single[i]))
    smallest = order[:EXAMPLES]
    largest = [i for i in reversed(order[-EXAMPLES:]) if i not in smallest]
    return [
        _of_group(why, single[i], file.groups[i], rows[i])
        for why, indices in (("smallest spread", smallest), ("largest spread", largest))
        for i in indices
    ]


def _deviation(group: ScoredGroup) -> float:
    return float(np.std([response.reward for response in group.responses]))


def _of_group(why: str, single: ScoredGroup, whole: ScoredGroup, row: Row) -> ShownRow:
    first: dict[Any, int] = {}
    for i, response in enumerate(whole.responses):
        first.setdefault(response.key if response.key is not None else ("none", i), i)
    order = sorted(first.values(), key=lambda i: -whole.responses[i].reward)
    shown = [Shown(as_text(row["responses"][i]), _note(whole.responses[i])) for i in order]
    deviation = short(_deviation(single), 3)
    return ShownRow(
        f"{why}: standard deviation {deviation}",
        as_text(row.get("prompt")),
        tuple(shown[:RESPONSES]),
        len(whole.responses) - len(shown[:RESPONSES]),
    )


def _of_pairs(file: ScoredFile, rows: Sequence[Row]) -> list[ShownRow]:
    margins = [pair.chosen.reward - pair.rejected.reward for pair in file.pairs]
    different = [i for i, p in enumerate(file.pairs) if len(distinct(p.as_group()).responses) > 1]
    wrong = [i for i in sorted(different, key=lambda i: margins[i])[:EXAMPLES] if margins[i] < 0]
    close = sorted((i for i in different if i not in wrong), key=lambda i: abs(margins[i]))
    return [
        ShownRow(
            f"{why}: chosen - rejected = {short(margins[i], 3, sign=True)}",
            as_text(rows[i].get("prompt")),
            (
                Shown(as_text(rows[i]["chosen"]), f"chosen · {_note(file.pairs[i].chosen)}"),
                Shown(as_text(rows[i]["rejected"]), f"rejected · {_note(file.pairs[i].rejected)}"),
            ),
            0,
        )
        for why, indices in (("surest mistake", wrong), ("closest call", close[:EXAMPLES]))
        for i in indices
    ]


def _note(response: ScoredResponse) -> str:
    cut = "" if response.finished else " · cut off"
    return f"reward {short(response.reward, 3, sign=True)} · {response.length} tokens{cut}"


def as_text(text: Any) -> str:
    """Return a string, or messages as `role: content` lines, truncated for the page."""
    if isinstance(text, list):
        text = "\n\n".join(f"{m.get('role')}: {_content(m.get('content'))}" for m in text)
    shown = text if isinstance(text, str) else ""
    return shown if len(shown) <= RESPONSE_LIMIT else shown[:RESPONSE_LIMIT] + " …"


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
