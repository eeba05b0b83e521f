"""Response groups: unlabelled responses of a policy to one prompt, checked on reading."""

from pathlib import Path

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.responses import check_prompt, check_responses

__all__ = ["check_group", "check_prompt", "check_responses", "read_groups"]


def read_groups(path: str | Path, *, least: int = 2) -> list[Row]:
    """Read groups `{"prompt", "responses": [...], "finished"?: [...]}` from a file or hub name.

    Args:
        path: what `sources.iterate_rows` reads.
        least: responses that a group must have; a single one can be read, but not adapted to.

    Raises:
        UserError: missing or malformed file, a missing column, or a group with too few
            responses or one that is no text; the message names file and line or row.
    """
    rows = [check_group(row, where, least=least) for where, row in iterate_rows(path)]
    if not rows:
        raise UserError(f"{path}: the file has no groups")
    return rows


def check_group(row: Row, where: str, *, least: int = 2) -> Row:
    """Refuse a group without a pair of responses to tell apart; returns the row as it is."""
    require_columns(row, ("prompt", "responses"), where)
    check_prompt(row, where)
    responses = check_responses(row, where)
    if len(responses) < least:
        raise UserError(
            f"{where}: the group has {len(responses)} response(s); at least two are needed to "
            "measure a difference: sample more with num_responses >= 2"
        )
    return row
