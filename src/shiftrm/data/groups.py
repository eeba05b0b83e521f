"""Response groups: unlabelled policy responses to one prompt, checked when read."""

from functools import partial
from pathlib import Path

from shiftrm.data.sources import read_rows
from shiftrm.files import Row
from shiftrm.models.responses import check_group, check_prompt, check_responses

__all__ = ["check_group", "check_prompt", "check_responses", "read_groups"]


def read_groups(path: str | Path, *, least: int = 2) -> list[Row]:
    """Read groups `{"prompt", "responses": [...], "finished"?: [...]}` from a file or hub name.

    The order of the responses means nothing to the default objective. `meta_objective=ordered` and
    `ordered_difference` (`core.objectives`) read it as best first.

    Args:
        path: any source that `sources.iterate_rows` reads.
        least: minimum number of responses per group. A single response can be scored, but MetaRM
            cannot adapt to it.

    Raises:
        UserError: a missing or malformed file, a missing column, or a group with too few responses
            or a response that is not text. The message names file and line or row.
    """
    return read_rows(path, partial(check_group, least=least), what="groups")
