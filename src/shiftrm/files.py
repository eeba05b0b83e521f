"""Read and write files: writes are atomic, and errors name the line."""

import codecs
import errno
import glob
import gzip
import hashlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError

Row = dict[str, Any]
"""One JSONL object."""

TEMPORARY = ".{name}.{unique:8}.tmp"
"""Name of a file while it is being written; `unique` has eight characters."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""

_Waiting = list[tuple[Path, Path, list[Path]]]
"""Files that wait for their names: the temporary name, the name, the folders made for the file."""

_waiting: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)
"""The files written so far inside `together`."""

BEYOND_JSON = "valid JSON, but nested too deep or with a number too long to read; correct it"


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically: a temporary sibling, flushed to disk, then renamed.

    A lone surrogate (possible in model output and in JSON) has no UTF-8 form and becomes "?".
    """
    return atomic_write_bytes(path, text.encode("utf-8", "replace"))


def atomic_write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically, as `atomic_write_text`. Inside `together` it appears at the end.

    After an error nothing is left, and an error of the file system names this file, also if the
    disk is full.
    """
    path = Path(path)
    waiting = _waiting.get()
    temporary = path.with_name(TEMPORARY.format(name=path.name, unique=uuid.uuid4().hex[:8]))
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if waiting is None:
            os.replace(temporary, path)
    except BaseException as error:
        _discard(temporary, made)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    if waiting is not None:
        waiting.append((temporary, path, made))
    return path


def _discard(temporary: Path, made: list[Path]) -> None:
    """Delete what was written of a file and the folders made for it, after an error."""
    with suppress(OSError):  # the first error says what is wrong
        temporary.unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):  # not made yet, or another file is in it
            folder.rmdir()


@contextmanager
def together() -> Iterator[None]:
    """Give the files that are written in the block their names at its end; after an error, none.

    A file that was there before is replaced at its turn, also if a later one then fails.

    A process that is killed while it names them leaves files that still have their temporary names
    too, from which `remove_unfinished` knows them. The last file written is the last to be named
    and the first to lose its temporary name: while it is unfinished, or not there, so are the
    others. A command should write its main output last, and call `remove_unfinished` for it first.
    """
    waiting: _Waiting = []
    token = _waiting.set(waiting)
    try:
        yield
        _name(waiting)
    except BaseException:
        for temporary, _, made in reversed(waiting):
            _discard(temporary, made)
        raise
    finally:
        _waiting.reset(token)
    for temporary, _, _ in reversed(waiting):
        temporary.unlink(missing_ok=True)


def _name(waiting: _Waiting) -> None:
    """Give finished files their names; after an error, take back the names that were new."""
    named: list[Path] = []
    try:
        for temporary, path, _ in waiting:
            if os.path.lexists(path):  # the command may rewrite it
                os.replace(temporary, path)
                continue
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                os.replace(temporary, path)
            named.append(path)
    except BaseException:
        for path in named:
            path.unlink(missing_ok=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Delete a file that a process which was killed inside `together` left under this name."""
    pattern = TEMPORARY.format(name=glob.escape(path.name), unique="?" * 8)
    for temporary in path.parent.glob(pattern):
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), temporary.lstat()):
                path.unlink()
                temporary.unlink()


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines, atomically. Keys keep their order; text stays readable UTF-8.

    A file whose name ends in .gz is compressed; the same rows give the same bytes.
    """
    return write_lines(path, "".join(json_line(row) for row in rows).encode())


def write_lines(path: str | Path, lines: bytes) -> Path:
    """Write lines atomically, compressed if the file name ends in .gz."""
    packed = Path(path).suffix.lower() == ".gz"
    return atomic_write_bytes(path, gzip.compress(lines, mtime=0) if packed else lines)


def json_line(row: Row) -> str:
    """Return one JSON line; raise ValueError for NaN and infinities, which JSON does not have.

    Text stays readable, unless it holds a lone surrogate, which models can write and UTF-8 cannot
    encode: then the line is ASCII.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row, allow_nan=False)
    return line + "\n"


def read_jsonl(path: str | Path, *, required: tuple[str, ...] = ()) -> list[Row]:
    """Read a JSONL file whole.

    Args:
        path: the file.
        required: columns every row must have.

    Raises:
        UserError: a missing or empty file, a line that is not a JSON object, invalid UTF-8 or a
            missing column; the message names file and line.
    """
    rows = [row for _, row in iterate_jsonl(path, required=required)]
    if not rows:
        raise UserError(f"{path}: the file has no rows; expected one JSON object a line")
    return rows


def iterate_jsonl(path: str | Path, *, required: tuple[str, ...] = ()) -> Iterator[tuple[str, Row]]:
    """Yield `("file:line", row)` for every non-blank line; raises as `read_jsonl` does.

    A file whose name ends in .gz is decompressed; one that is cut off is an error.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    with _lines(path) as handle:
        for number, raw in enumerate(handle, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            row = _parse(raw, where)
            require_columns(row, required, where)
            yield where, row


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[bytes]]:
    """A file's lines, decompressed if its name ends in .gz."""
    if path.suffix.lower() != ".gz":
        with open(path, "rb") as handle:
            yield handle
        return
    with gzip.open(path) as packed:
        yield _unpacked(path, packed)


def _unpacked(path: Path, packed: gzip.GzipFile) -> Iterator[bytes]:
    number = 0
    try:
        for line in packed:
            number += 1
            yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a whole gzip file after line {number} ({error}); fetch it again"
        ) from None


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def encodable(value: Any) -> Any:
    """Replace lone surrogates, which UTF-8 cannot encode, by "?" in text or nested data."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [encodable(item) for item in value]
    if isinstance(value, dict):
        return {key: encodable(item) for key, item in value.items()}
    return value


def is_number(value: Any) -> bool:
    """Whether this is a finite number that floating point can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of many digits
        return False


def require_columns(row: Row, columns: tuple[str, ...], where: str) -> None:
    """Raise `UserError` if a row lacks a column; the message lists the columns it has."""
    for column in columns:
        if column not in row:
            raise UserError(
                f"{where}: column {column!r} is missing; the row has "
                f"{', '.join(map(repr, row)) or 'no columns'}"
            )


def _parse(raw: bytes, where: str) -> Row:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON at column {error.colno} ({error.msg}); "
            "each line must be one complete JSON object"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {BEYOND_JSON}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that gets its name when the block ends without an error.

    After an error nothing of it is left.
    """
    work = target.with_name(f".{target.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    replace_directory(work, target)


def remove_temporary_files(folder: Path) -> None:
    """Delete what writers of this module left below a folder when they were killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def replace_directory(temporary: Path, target: Path) -> None:
    """Publish a finished folder under its name in one rename.

    If another process published the same folder first, ours is discarded: both hold the same
    content, since stages are deterministic.
    """
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)
