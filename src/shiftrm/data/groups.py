"""Response groups: unlabelled responses of a policy to one prompt, checked on reading."""

from pathlib import Path

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.rendering import Text, check_text

__all__ = ["check_group", "check_prompt", "check_responses", "read_groups"]


def read_groups(path: str | Path) -> list[Row]:
    """Read groups `{"prompt", "responses": [...], "finished"?: [...]}` from a file or hub name.

    Args:
        path: what `sources.iterate_rows` reads.

    Raises:
        UserError: missing or malformed file, a missing column, or a group with fewer than two
            responses or one that is no text; the message names file and line or row.
    """
    rows = [check_group(row, where) for where, row in iterate_rows(path)]
    if not rows:
        raise UserError(f"{path}: the file has no groups")
    return rows


def check_group(row: Row, where: str) -> Row:
    """Refuse a group without a pair of responses to tell apart; returns the row as it is."""
    require_columns(row, ("prompt", "responses"), where)
    check_prompt(row, where)
    responses = check_responses(row, where)
    if len(responses) < 2:
        raise UserError(
            f"{where}: the group has {len(responses)} response(s); at least two are needed to "
            "measure a difference: sample more with num_responses >= 2"
        )
    return row


def check_prompt(row: Row, where: str) -> None:
    """Refuse a prompt that is there but no text. None or no messages: the responses hold it all."""
    if row.get("prompt") is not None and row["prompt"] != []:
        check_text(row["prompt"], f"{where}: column 'prompt'")


def check_responses(row: Row, where: str) -> list[Text]:
    """The responses of a row, once it is sure that each is text and that `finished` fits."""
    responses, finished = row["responses"], row.get("finished")
    if not isinstance(responses, list):
        raise UserError(
            f"{where}: column 'responses' holds {type(responses).__name__}; expected a list"
        )
    for number, response in enumerate(responses, start=1):
        check_text(response, f"{where}: response {number}")
    if finished is None:
        return responses
    if not isinstance(finished, list) or not all(isinstance(f, bool) for f in finished):
        raise UserError(f"{where}: column 'finished' must be a list of true and false")
    if len(finished) != len(responses):
        raise UserError(
            f"{where}: 'finished' has {len(finished)} entries for {len(responses)} responses"
        )
    return responses
