"""Writes group files during sampling: begin, resume, finish, or find a finished file.

An unfinished file is called `PATH.partial`; its first line holds a hash of policy and settings.
Every row holds it, too, so that a finished file is not taken for one of another policy.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, iterate_jsonl, json_line, write_lines
from shiftrm.models.rendering import Text
from shiftrm.models.responses import check_group

SAMPLING = "sampling_key"
"""The column with the `sampling_key` that a row was sampled with."""


def sampling_key(settings: list[Any]) -> str:
    """Return a hash of JSON data that determines groups."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def holds_groups(
    path: str | Path, prompts: Sequence[Text], *, num_responses: int, key: str | None = None
) -> bool:
    """Return whether the file exists and holds groups of these prompts, this size and this key.

    A file without keys, which other programs and earlier versions write, fits every key.

    Args:
        key: None does not compare it.

    Raises:
        UserError: the path holds something else.
    """
    path = Path(path)
    if not path.exists():
        return False
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    rows = [check_group(row, where, least=1) for where, row in iterate_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: the file has no groups")
    sizes = {len(row["responses"]) for row in rows}
    if len(rows) != len(prompts):
        found = f"{len(rows)} groups, not {len(prompts)}"
    elif sizes != {num_responses}:
        found = f"groups of {min(sizes - {num_responses})} responses, not {num_responses}"
    elif [row["prompt"] for row in rows] != list(prompts):
        found = "groups of other prompts"
    elif key is not None and {_key_of(row) for row in rows} not in ({key}, {None}):
        found = "groups of another policy, or sampled with other settings"
    else:
        return True
    raise UserError(f"{path}: already there with {found}; delete it or choose another output")


def _key_of(row: Row) -> str | None:
    found = row.get(SAMPLING)
    return found if isinstance(found, str) else None


def write_groups(
    path: Path,
    batches: Callable[[int], Iterator[list[Row]]],
    *,
    key: str,
    total: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write groups batch by batch to `PATH.partial`, resuming an interrupted call.

    Args:
        batches: takes the number of groups already written and yields the remaining batches.
        key: the `sampling_key`; written into every row.
        total: total number of groups.
        batch_size: groups per batch; a resumed call keeps only whole batches.
        progress: called with (groups done, total) after every batch.

    Raises:
        UserError: a partial file was begun with another key.
    """
    partial = path.with_name(path.name + ".partial")
    done = _begin_or_resume(partial, {"settings": key}, batch_size)
    try:
        with open(partial, "ab") as handle:
            for rows in batches(done):
                handle.write("".join(json_line({**row, SAMPLING: key}) for row in rows).encode())
                handle.flush()
                done += len(rows)
                if progress:
                    progress(done, total)
    except BaseException:
        if not done:  # nothing to continue from
            partial.unlink()
        raise
    _, _, groups = partial.read_bytes().partition(b"\n")
    write_lines(path, groups)
    partial.unlink()
    return path


def _begin_or_resume(partial: Path, header: Row, batch_size: int) -> int:
    """Return how many groups an interrupted call wrote in whole batches; truncate the rest.

    Splits bytes at LF only: str.splitlines would also split a response at U+2028 and similar
    characters.
    """
    if not partial.exists():
        atomic_write_text(partial, json_line(header))
        return 0
    *lines, _cut_off = partial.read_bytes().split(b"\n")
    if not lines or lines[0] + b"\n" != json_line(header).encode():
        raise UserError(
            f"{partial}: begun with another policy, other prompts or other settings; delete it, or "
            "repeat the old ones"
        )
    done = (len(lines) - 1) // batch_size * batch_size
    with open(partial, "r+b") as handle:
        handle.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
    return done
