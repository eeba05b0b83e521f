"""Preference pairs: TRL's preference rows, standard or conversational, checked when read."""

from pathlib import Path
from typing import Any

from shiftrm.data.groups import check_prompt
from shiftrm.data.loaded import no_text
from shiftrm.data.sources import read_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import check_template_options, check_text, is_conversational

FINISHED = ("chosen_finished", "rejected_finished")
"""Optional columns: False where a length limit cut the response off."""

WEIGHT = "weight"
"""An optional column: the factor of the pair's loss; 1 if missing."""

LARGEST_MARGIN = 1e9
"""In units of reward. Beyond it, sums of losses approach the largest fp32 number."""

COLUMNS = (
    *("prompt", "chosen", "rejected", "margin", WEIGHT, *FINISHED),
    *("tools", "chat_template_kwargs"),
)
"""The columns that training reads."""


def read_pairs(path: str | Path) -> list[Row]:
    """Read preference pairs `{"prompt"?, "chosen", "rejected", "margin"?}` of a file or hub name.

    A row may also hold `weight` (a factor of its loss, at least 0), `chosen_finished` and
    `rejected_finished`, and any other columns.

    Args:
        path: any source that `sources.iterate_rows` reads.

    Raises:
        UserError: missing or malformed file, a missing column, a pair whose sides are equal or
            empty, or a row of a different kind than the first (text and chats mixed, a margin,
            `weight` or `chosen_finished` on some rows only); the message names file and line or
            row.
    """
    kinds: dict[str, tuple[str, str]] = {}

    def check(row: Row, where: str) -> None:
        check_pair(row, where)
        found = {c: kind_of(row[c]) for c in ("prompt", "chosen") if row.get(c) is not None}
        found |= {c: "given" if c in row else "missing" for c in ("margin", WEIGHT, *FINISHED)}
        check_kinds(found, kinds, where)

    return read_rows(path, check, what="preference pairs")


def check_pair(row: Row, where: str) -> Row:
    """Return the row unchanged, or raise `UserError` if it holds no usable preference."""
    require_columns(row, ("chosen", "rejected"), where)
    check_template_options(row, where)
    check_prompt(row, where)
    for column in ("chosen", "rejected"):
        check_text(row[column], f"{where}: column {column!r}")
    if is_conversational(row["chosen"]) != is_conversational(row["rejected"]):
        raise UserError(
            f"{where}: chosen is {kind_of(row['chosen'])} but rejected is "
            f"{kind_of(row['rejected'])}; write both in the same way"
        )
    empty = [side for side in ("chosen", "rejected") if no_text(row[side])]
    if len(empty) == 2:
        raise UserError(f"{where}: both sides of the pair are empty; remove the row")
    if empty:
        raise UserError(f"{where}: the response {empty[0]!r} is empty; remove the row")
    if row["chosen"] == row["rejected"]:
        raise UserError(
            f"{where}: chosen and rejected are equal, so there is no preference; remove the row"
        )
    check_margin(row.get("margin"), where)
    check_weight(row.get(WEIGHT), where)
    for column in FINISHED:
        if not isinstance(row.get(column), bool | None):
            raise UserError(
                f"{where}: column {column!r} is {row[column]!r}; expected true or false on every "
                "row"
            )
    return row


def check_margin(margin: Any, where: str) -> float:
    """Return the margin, 0 for None; raise `UserError` if it is no number or too large for fp32."""
    if margin is None:
        return 0.0
    expected = f"a number of at most {LARGEST_MARGIN:g} in size"
    return _check_number(margin, f"{where}: column 'margin'", -LARGEST_MARGIN, expected)


def check_weight(weight: Any, where: str) -> float:
    """Return the weight, 1 for None; raise `UserError` if it is not a number from 0 to 1e9."""
    if weight is None:
        return 1.0
    expected = f"a number from 0 to {LARGEST_MARGIN:g}"
    return _check_number(weight, f"{where}: column {WEIGHT!r}", 0.0, expected)


def _check_number(value: Any, place: str, least: float, expected: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= LARGEST_MARGIN:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise UserError(f"{place} is {shown}; expected {expected} on every row")
    return float(value)


def check_kinds(found: dict[str, str], kinds: dict[str, tuple[str, str]], where: str) -> None:
    """Require all rows to be of one kind: the trainer's table has one type per column.

    Args:
        found: column -> what it holds in this row.
        kinds: column -> what it holds and where that was first seen; updated here.
    """
    for column, kind in found.items():
        first, at = kinds.setdefault(column, (kind, where))
        if kind != first:
            raise UserError(
                f"{where}: column {column!r} is {kind}, but {first} at {at}; write all rows in the "
                "same way"
            )


def kind_of(text: Any) -> str:
    """Name the kind of a column's value, for messages."""
    if text is None:
        return "missing"
    return "a list of messages" if is_conversational(text) else "text"
