"""Checks of options before the long work starts; each failure is one line."""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import TEMPORARY
from shiftrm.locks import hold

LONGEST = 255
"""Bytes of a name on the file systems there are."""

WORK = ".{name}.work"
"""The folder of a training until its result is whole."""


def output_file(
    option: str,
    *,
    apart_from: Iterable[Any] = (),
    beside: Sequence[str] = (),
    may_exist: bool = False,
) -> Path:
    """Where a file is to be written: a new one, and this command's alone until the command ends.

    Args:
        apart_from: what else the command reads or writes, files and folders; what is no path there
            is (None, a name on the hub) is passed over.
        beside: names of further files that the command writes beside this one, as "{name}.partial".
        may_exist: the command itself refuses a file that is not of the same run.

    Raises:
        UserError: something has this name already, or the name is too long; the command reads or
            writes this very file, one of `beside`, or the folder that it would stand in; or another
            command is writing it.
    """
    path = _place(option, apart_from, beside, folder=False)
    for name in beside:
        other = path.with_name(name.format(name=path.name))
        _require_kind(other, str(other), folder=False)
    _require_folder_above(path, option)
    hold(path)
    if not may_exist and os.path.lexists(path):  # now that nobody else can be writing it
        raise UserError(f"{option}: already there; choose another file, or delete it first")
    return Path(option)


def output_rows(
    option: str,
    *,
    apart_from: Iterable[Any] = (),
    beside: Sequence[str] = (),
    may_exist: bool = False,
) -> Path:
    """Where rows are to be written, as JSON lines; by the name of `.jsonl.gz`, packed.

    Raises:
        UserError: as `output_file`, which has the same arguments, or the name says another format.
    """
    path = Path(option)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes != [".jsonl", ".gz"] and path.suffix.lower() not in ("", ".jsonl", ".json"):
        raise UserError(f"{option}: the output is JSON lines; call it {path.stem}.jsonl")
    return output_file(option, apart_from=apart_from, beside=beside, may_exist=may_exist)


def output_folder(
    option: str, *, apart_from: Iterable[Any] = (), beside: Sequence[str] = ()
) -> Path:
    """Where a folder is to be written, which is this command's alone until the command ends.

    What may stand in it already is the command's to judge.

    Args:
        apart_from: as `output_file`.
        beside: names of further folders that the command works in, as `WORK`.

    Raises:
        UserError: something else than a folder has this name, or the name is too long; the command
            reads it, or in one of `beside`, or the folder that it would stand in; or another
            command is writing it.
    """
    path = _place(option, apart_from, beside, folder=True)
    _require_folder_above(path, option)
    hold(path)
    return Path(option)


def _place(option: str, apart_from: Iterable[Any], beside: Sequence[str], *, folder: bool) -> Path:
    """The absolute path, once it is sure that it can be one and is no input."""
    if "\0" in option:
        raise UserError(f"{option}: is no name of a file; choose another output")
    path = Path(os.path.abspath(option))
    if not path.name:
        raise UserError(f"{option}: is the root of all folders; choose another output")
    names = [
        name.format(name=path.name, unique="") for name in (*beside, ".{name}.lock", TEMPORARY)
    ]
    room = LONGEST - max(len(os.fsencode(name)) for name in names)
    if room < 0:
        size = len(os.fsencode(path.name))
        raise UserError(
            f"{path.name[:40]}...: the name has {size} bytes, and at most {size + room} can be "
            "written; choose a shorter one"
        )
    _require_kind(path, option, folder=folder)
    neighbours = [path.with_name(name) for name in names[:-1]]
    for other in apart_from:
        if isinstance(other, str | os.PathLike) and "\0" not in str(other):
            read = str(other)
            if not os.path.lexists(read):
                read = read.partition(":")[0]  # of FOLDER:configuration:split
            _require_apart(path, neighbours, read, option)
    return path


def _require_apart(path: Path, neighbours: list[Path], other: str, option: str) -> None:
    """Refuse an output that is an input by any name, that changes one, or that would destroy it."""
    taken = _identities(other)
    if _identities(path) & taken:
        if os.path.isdir(path):
            raise UserError(
                f"{option}: already there and not empty; this call reads it, so choose another "
                "--output"
            )
        raise UserError(f"{option}: this call reads or writes it already; choose another file")
    real = Path(os.path.realpath(path))
    if os.path.isdir(other) and any(_identities(folder) & taken for folder in real.parents):
        raise UserError(f"{option}: lies in {other}, which this call reads; choose another output")
    within = set[Any]().union(taken, *map(_identities, Path(os.path.realpath(other)).parents))
    for neighbour in neighbours:
        if _identities(neighbour) & within:
            raise UserError(
                f"{option}: {neighbour}, which is written beside it, is what this call reads; "
                "choose another output"
            )


def _identities(path: str | Path) -> set[Any]:
    """What tells a file from others: its real name, and the place on the disk if it has one.

    Names that differ only in case are one, as they are on the file systems of other machines.
    """
    found: set[Any] = {os.path.realpath(path).casefold()}
    try:
        status = os.stat(path)
    except OSError:
        return found
    return found | {(status.st_dev, status.st_ino)}


def _require_kind(path: Path, option: str, *, folder: bool) -> None:
    """Refuse what has this name and is neither nothing nor of the kind that is to be written."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:  # `_require_folder_above` says which
        return
    except OSError as error:
        raise UserError(f"{option}: {error.strerror}; choose another output") from None
    if stat.S_ISLNK(mode):
        raise UserError(f"{option}: is a link; give the name of what it leads to, or another")
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


def at_least_one(value: int, option: str) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise UserError(f"{option} is {value}; it must be at least 1")


def not_negative(value: float | None, option: str) -> None:
    """Refuse a number below zero; None is no number."""
    if value is not None and not value >= 0:
        raise UserError(f"{option} is {value}; it must be at least 0")


def named_paths(options: Sequence[str], flag: str = "", *, suffix: bool = False) -> dict[str, str]:
    """`NAME=PATH` or `PATH`, by name; a path without a name is called by its last part.

    Args:
        flag: the option that gives them, for errors; empty for words without one.
        suffix: whether what follows a last dot belongs to that name: in folders it does.

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
