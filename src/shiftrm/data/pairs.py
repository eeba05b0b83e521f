"""Preference pairs: TRL's preference rows, standard or conversational, checked on reading."""

from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.files import Row, iterate_jsonl, require_columns

__all__ = ["check_pair", "read_pairs"]


def read_pairs(path: str | Path) -> list[Row]:
    """Read preference pairs `{"prompt"?, "chosen", "rejected", "margin"?}` from a JSONL file.

    Raises:
        UserError: missing or malformed file, a missing column, or a pair whose sides are equal
            or empty; the message names file and line.
    """
    rows = [check_pair(row, where) for where, row in iterate_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: the file has no preference pairs")
    return rows


def check_pair(row: Row, where: str) -> Row:
    """Refuse a pair that cannot teach anything; returns the row as it is."""
    require_columns(row, ("chosen", "rejected"), where)
    for column in ("chosen", "rejected"):
        value = row[column]
        if not isinstance(value, str | list):
            raise UserError(
                f"{where}: column {column!r} holds {type(value).__name__}; expected text or a list "
                "of messages"
            )
    if not row["chosen"] and not row["rejected"]:
        raise UserError(f"{where}: both sides of the pair are empty; remove the row")
    if row["chosen"] == row["rejected"]:
        raise UserError(
            f"{where}: chosen and rejected are equal, so there is no preference; remove the row"
        )
    return row
