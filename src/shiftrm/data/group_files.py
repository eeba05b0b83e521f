"""A group file while it is being sampled: begun, resumed, finished, or found to be there.

Until it is whole it stands under another name, with a first line that says by which settings.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, json_line, write_lines
from shiftrm.models.rendering import Text

__all__ = ["begin_or_resume", "finish", "holds_groups", "settings_key", "write_groups"]


def holds_groups(path: str | Path, prompts: Sequence[Text], *, num_responses: int) -> bool:
    """Whether a file of groups of these prompts and this size is there.

    Temperature and the like cannot be told from the file: a group file holds no settings.

    Raises:
        UserError: something else is there.
    """
    path = Path(path)
    if not path.exists():
        return False
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    rows = read_groups(path, least=1)
    sizes = {len(row["responses"]) for row in rows}
    if len(rows) != len(prompts):
        found = f"{len(rows)} groups, not {len(prompts)}"
    elif sizes != {num_responses}:
        found = f"groups of {min(sizes - {num_responses})} responses, not {num_responses}"
    elif [row["prompt"] for row in rows] != list(prompts):
        found = "groups of other prompts"
    else:
        return True
    raise UserError(f"{path}: already there with {found}; delete it or choose another output")


def settings_key(settings: list[Any]) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def begin_or_resume(partial: Path, header: Row, batch_size: int) -> int:
    """How many groups an interrupted call has left as whole batches; the rest is cut off.

    Works on bytes: a line ends at LF alone, while str.splitlines would also cut a response apart
    at U+2028 and its like.
    """
    if not partial.exists():
        atomic_write_text(partial, json_line(header))
        return 0
    *lines, _cut_off = partial.read_bytes().split(b"\n")
    if not lines or lines[0] + b"\n" != json_line(header).encode():
        raise UserError(
            f"{partial}: begun with other prompts or settings; delete it, or repeat the old ones"
        )
    done = (len(lines) - 1) // batch_size * batch_size
    with open(partial, "r+b") as handle:
        handle.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
    return done


def write_groups(
    path: Path,
    batches: Callable[[int], Iterator[list[Row]]],
    *,
    settings: list[Any],
    total: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write groups batch by batch to `PATH.partial`, from where an interrupted call stopped.

    Args:
        batches: from the number of groups already there to the batches after them.
        settings: plain data that decides what the groups are.
        total: groups in all.
        batch_size: groups a batch; only whole batches are kept of an interrupted call.
        progress: called with (groups done, groups in all) after every batch.

    Raises:
        UserError: a partial file of other settings.
    """
    partial = path.with_name(path.name + ".partial")
    done = begin_or_resume(partial, {"settings": settings_key(settings)}, batch_size)
    try:
        with open(partial, "ab") as handle:
            for rows in batches(done):
                handle.write("".join(map(json_line, rows)).encode())
                handle.flush()
                done += len(rows)
                if progress:
                    progress(done, total)
    except BaseException:
        if not done:  # nothing to continue from
            partial.unlink()
        raise
    return finish(partial, path)


def finish(partial: Path, path: Path) -> Path:
    """Publish the groups under their name, without the line of settings."""
    _, _, groups = partial.read_bytes().partition(b"\n")
    write_lines(path, groups)
    partial.unlink()
    return path
