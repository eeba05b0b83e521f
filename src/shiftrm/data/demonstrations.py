"""Demonstrations for supervised fine-tuning: prompt and completion, or whole conversations."""

from pathlib import Path

from shiftrm.data.pairs import check_kinds, kind_of
from shiftrm.data.sources import read_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import check_template_options, check_text, is_conversational
from shiftrm.models.responses import check_finished

COLUMNS = ("prompt", "completion", "messages", "finished", "tools", "chat_template_kwargs")
"""The columns that training reads."""


def read_demonstrations(path: str | Path) -> list[Row]:
    """Read rows `{"prompt", "completion"}`, text or messages each, or `{"messages"}`.

    A row may also hold `finished`, false where a length limit cut the last answer off.

    Args:
        path: any source that `sources.iterate_rows` reads.

    Raises:
        UserError: missing or malformed file, no rows, a row without text to learn, or one of
            a different kind than the first; the message names file and line or row.
    """
    kinds: dict[str, tuple[str, str]] = {}

    def check(row: Row, where: str) -> None:
        check_demonstration(row, where)
        columns = ("prompt", "completion", "messages")
        check_kinds({c: kind_of(row.get(c)) for c in columns}, kinds, where)

    return read_rows(path, check, what="demonstrations")


def check_demonstration(row: Row, where: str) -> None:
    """Raise `UserError` for a row without anything to learn."""
    check_template_options(row, where)
    check_finished(row, "finished", where)
    if row.get("messages") is not None:
        messages = row["messages"]
        if not is_conversational(messages):
            raise UserError(f"{where}: column 'messages' is not a list of messages")
        check_text(messages, f"{where}: column 'messages'")
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{where}: column 'messages' has no assistant message to learn")
        return
    if not {"prompt", "completion"} <= row.keys():
        raise UserError(
            f"{where}: expected columns 'prompt' and 'completion', or 'messages'; the row has "
            f"{', '.join(map(repr, row)) or 'no columns'}"
        )
    for column in ("prompt", "completion"):
        check_text(row[column], f"{where}: column {column!r}")
        if not row[column]:
            raise UserError(f"{where}: column {column!r} is empty; remove the row")
