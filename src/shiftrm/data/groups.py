"""Response groups: unlabelled responses of a policy to one prompt, checked on reading."""

from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.files import Row, iterate_jsonl, require_columns

__all__ = ["check_group", "read_groups"]


def read_groups(path: str | Path) -> list[Row]:
    """Read groups `{"prompt", "responses": [...], "finished"?: [...]}` from a JSONL file.

    Raises:
        UserError: missing or malformed file, a missing column, or a group with fewer than two
            responses; the message names file and line.
    """
    rows = [check_group(row, where) for where, row in iterate_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: the file has no groups")
    return rows


def check_group(row: Row, where: str) -> Row:
    """Refuse a group without a pair of responses to tell apart; returns the row as it is."""
    require_columns(row, ("prompt", "responses"), where)
    responses = row["responses"]
    if not isinstance(responses, list):
        raise UserError(
            f"{where}: column 'responses' holds {type(responses).__name__}; expected a list"
        )
    if len(responses) < 2:
        raise UserError(
            f"{where}: the group has {len(responses)} response(s); at least two are needed to "
            "measure a difference: sample more with num_responses >= 2"
        )
    finished = row.get("finished")
    if finished is not None and len(finished) != len(responses):
        raise UserError(
            f"{where}: 'finished' has {len(finished)} entries for {len(responses)} responses"
        )
    return row
