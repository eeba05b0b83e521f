"""Checks of options before long work starts. Error messages are one line."""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import TEMPORARY, remove_unfinished
from shiftrm.locks import hold

LONGEST = 255
"""Maximum length of a file name in bytes, on common file systems."""

WORK = ".{name}.work"
"""The folder in which a training run works until its result is complete."""


def output_file(
    option: str,
    *,
    apart_from: Iterable[Any] = (),
    beside: Sequence[str] = (),
    may_exist: bool = False,
) -> Path:
    """Return the path of a new output file, locked for this command until it ends.

    Args:
        apart_from: files and folders that the command reads or writes; other values (None, a
            name on the hub) are ignored.
        beside: names of other files that the command writes beside this one, such as
            "{name}.partial".
        may_exist: allow an existing file; the command itself rejects one from another run.

    Raises:
        UserError: the path exists, or its name is too long; the command reads or writes this
            file, one of `beside`, or a folder that contains it; or another command is writing it.
    """
    path = _place(option, apart_from, beside, folder=False)
    for name in beside:
        other = path.with_name(name.format(name=path.name))
        _require_kind(other, str(other), folder=False)
    _require_folder_above(path, option)
    hold(path)
    remove_unfinished(path)
    if not may_exist and os.path.lexists(path):  # now that no other command can be writing it
        raise UserError(f"{option}: already there; choose another file, or delete it first")
    return Path(option)


def output_rows(
    option: str,
    *,
    apart_from: Iterable[Any] = (),
    beside: Sequence[str] = (),
    may_exist: bool = False,
) -> Path:
    """Return the path of a new JSON lines file; `.jsonl.gz` is compressed.

    Raises:
        UserError: as `output_file`, which has the same arguments, or the suffix is of another
            format.
    """
    path = Path(option)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes != [".jsonl", ".gz"] and path.suffix.lower() not in ("", ".jsonl", ".json"):
        raise UserError(f"{option}: the output is JSON lines; call it {path.stem}.jsonl")
    return output_file(option, apart_from=apart_from, beside=beside, may_exist=may_exist)


def output_folder(
    option: str, *, apart_from: Iterable[Any] = (), beside: Sequence[str] = ()
) -> Path:
    """Return the path of an output folder, locked for this command until it ends.

    The command itself decides what the folder may already contain.

    Args:
        apart_from: as `output_file`.
        beside: names of other folders that the command works in, such as `WORK`.

    Raises:
        UserError: the path exists and is not a folder, or its name is too long; the command
            reads it, something in one of `beside`, or a folder that contains it; or another
            command is writing it.
    """
    hold(check_folder(option, apart_from=apart_from, beside=beside))
    return Path(option)


def check_folder(
    option: str, *, apart_from: Iterable[Any] = (), beside: Sequence[str] = ()
) -> Path:
    """Return the absolute path of an output folder that nothing is written to yet.

    Raises:
        UserError: as `output_folder`, but another command may be writing it.
    """
    path = _place(option, apart_from, beside, folder=True)
    _require_folder_above(path, option)
    return path


def _place(option: str, apart_from: Iterable[Any], beside: Sequence[str], *, folder: bool) -> Path:
    """Return the absolute path, after checking that it is valid and not an input."""
    if "\0" in option:
        raise UserError(f"{option}: is not a valid file name; choose another output")
    path = Path(os.path.abspath(option))
    if not path.name:
        raise UserError(f"{option}: is the root folder; choose another output")
    names = [
        name.format(name=path.name, unique="") for name in (*beside, ".{name}.lock", TEMPORARY)
    ]
    room = LONGEST - max(len(os.fsencode(name)) for name in names)
    if room < 0:
        size = len(os.fsencode(path.name))
        raise UserError(
            f"{path.name[:40]}...: the name has {size} bytes, and at most {size + room} are "
            "allowed; choose a shorter one"
        )
    _require_kind(path, option, folder=folder)
    neighbours = [path.with_name(name) for name in names[:-1]]
    for other in apart_from:
        if isinstance(other, str | os.PathLike) and "\0" not in str(other):
            read = str(other)
            if not os.path.lexists(read):
                read = read.partition(":")[0]  # the folder in FOLDER:configuration:split
            _require_apart(path, neighbours, read, option)
    return path


def _require_apart(path: Path, neighbours: list[Path], other: str, option: str) -> None:
    """Reject an output that is an input (under any name), or that would change or destroy one."""
    taken = _identities(other)
    if _identities(path) & taken:
        if os.path.isdir(path):
            raise UserError(
                f"{option}: already there and not empty; this command reads it, so choose another "
                "--output"
            )
        raise UserError(f"{option}: this command already reads or writes it; choose another file")
    real = Path(os.path.realpath(path))
    if os.path.isdir(other) and any(_identities(folder) & taken for folder in real.parents):
        raise UserError(
            f"{option}: lies in {other}, which this command reads; choose another output"
        )
    within = set[Any]().union(taken, *map(_identities, Path(os.path.realpath(other)).parents))
    for neighbour in neighbours:
        if _identities(neighbour) & within:
            raise UserError(
                f"{option}: {neighbour}, which is written beside it, is what this command reads; "
                "choose another output"
            )


def _identities(path: str | Path) -> set[Any]:
    """Identify a file by its real path and, if it exists, its device and inode.

    Names that differ only in case are equal, since some file systems ignore case.
    """
    found: set[Any] = {os.path.realpath(path).casefold()}
    try:
        status = os.stat(path)
    except OSError:
        return found
    return found | {(status.st_dev, status.st_ino)}


def _require_kind(path: Path, option: str, *, folder: bool) -> None:
    """Reject an existing path that is not of the kind to be written."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:  # `_require_folder_above` says which
        return
    except OSError as error:
        raise UserError(f"{option}: {error.strerror}; choose another output") from None
    if stat.S_ISLNK(mode):
        raise UserError(f"{option}: is a link; give the path of its target, or another name")
    if folder and not stat.S_ISDIR(mode):
        raise UserError(f"{option}: is not a folder; choose another --output")
    if not folder and stat.S_ISDIR(mode):
        raise UserError(f"{option or '.'}: is a folder; give the name of a file to write")
    if not folder and not stat.S_ISREG(mode):
        raise UserError(f"{option}: is a device, pipe or socket; give the name of a file to write")


def _require_folder_above(path: Path, option: str) -> None:
    above = next(p for p in path.parents if os.path.lexists(p))
    if not above.is_dir():
        raise UserError(f"{option}: {above} is not a folder; choose another --output")


def named_paths(options: Sequence[str], flag: str = "", *, suffix: bool = False) -> dict[str, str]:
    """Parse `NAME=PATH` or `PATH`; without a name, the last part of the path is the name.

    Args:
        flag: name of the option, for errors; empty for positional arguments.
        suffix: keep the file suffix in the name (for folders, it is not a suffix).

    Raises:
        UserError: an empty name or path, a name that cannot be shown, or one given twice.
    """
    found: dict[str, str] = {}
    said = f"{flag}: " if flag else ""
    for option in options:
        name, sign, path = option.partition("=")
        if not sign or Path(option).exists():
            name, path = Path(option).name if suffix else Path(option).stem, option
        if not name or not path or not name.isprintable():
            raise UserError(f"{flag} {option!r}: expected PATH or NAME=PATH".lstrip())
        if name in found:
            raise UserError(
                f"{said}two are called {name!r} ({found[name]} and {path}); name them: NAME=PATH"
            )
        found[name] = path
    return found
