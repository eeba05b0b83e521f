"""Read rows from JSONL, JSON, Parquet, CSV, or anything `datasets` loads.

One function reads all formats, so every command accepts every format and errors name the row.
"""

import codecs
import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shiftrm.data.folders import SUFFIXES, files_of, is_saved
from shiftrm.errors import UserError, first_line
from shiftrm.files import BEYOND_JSON, Row, file_hash, iterate_jsonl, require_columns

SOURCE_HELP = """
Data is a .jsonl (or .jsonl.gz), .json, .parquet or .csv file, a folder of such files, or
a name on the Hugging Face hub: owner/name, owner/name:config or owner/name:config:split
(owner/name::test is a split of the default configuration; without one it is train). In JSON: a list
of objects, or an object that holds one. In CSV, lists and messages are written as JSON in the cell.
"""
"""For the --help of commands that read data."""

PARQUET_EXPORT = "refs/convert/parquet"
"""Where the hub keeps its automatic copy of data sets that need their own loading script."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

TEXT_COLUMNS = ("prompt", "response", "chosen", "rejected", "completion", "messages")
"""Columns that hold text or chat messages; in a CSV cell, messages are JSON."""

JSON_COLUMNS = (
    "responses",
    "finished",
    "prompt_ids",
    "response_ids",
    "chosen_finished",
    "rejected_finished",
    "margin",
    "tools",
    "chat_template_kwargs",
)
"""Columns whose CSV cells hold JSON."""

INNER_LISTS = ("conversations", "completions", "summaries", "replies")
"""Lists of objects inside one row of a public data set, which are not rows."""


def iterate_rows(
    source: str | Path,
    *,
    required: tuple[str, ...] = (),
    split: str = "train",
    data_dir: str | None = None,
    data_file: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield `(where, row)` for every row of a source; `~` is the home folder.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json`, `.parquet` or `.csv` file (without suffix: JSONL),
            a folder of such files (read separately in order of their names, so their columns may
            differ; names such as `test-00.jsonl` name the file's split, as in `datasets`), a folder
            that `datasets` loads (such as one from `save_to_disk`), or a hub name
            `owner/name[:config[:split]]`.
        required: columns every row must have.
        split: which split of a folder or hub name, unless the source names one.
        data_dir: the only subfolder of a folder or hub name to read.
        data_file: the only file of a hub name to read.

    Yields:
        `where` for error messages (`file:line` for JSONL and CSV, `file: row N` for JSON and
        Parquet, `name[split] row N` through `datasets`; rows count from 1) and the row. Columnar
        formats fill missing entries with null; these are removed, also inside messages.

    Raises:
        UserError: the source does not exist or cannot be read, or a row lacks a column.
    """
    for where, row in _reader(source, split, _only(data_dir=data_dir, data_files=data_file)):
        require_columns(row, required, where)
        yield where, row


def read_rows(source: str | Path, check: Callable[[Row, str], object], *, what: str) -> list[Row]:
    """Read a source whole.

    Args:
        source: as in `iterate_rows`.
        check: called with every row and its place; raises `UserError` for a bad row.
        what: what the rows are, for the message if there are none.

    Raises:
        UserError: as `iterate_rows` and `check`, or no rows.
    """
    rows = []
    for where, row in iterate_rows(source):
        check(row, where)
        rows.append(row)
    if not rows:
        raise UserError(f"{source}: the file has no {what}")
    return rows


def _only(**parts: str | None) -> dict[str, str]:
    return {name: part for name, part in parts.items() if part is not None}


def _reader(source: str | Path, split: str, parts: dict[str, str]) -> Iterator[tuple[str, Row]]:
    source = os.path.expanduser(source)
    if not str(source):
        raise UserError("the name of the data is empty; give a file or a hub name")
    path = Path(source)
    if path.is_file():
        return _iterate_file(path)
    if path.is_dir():
        return _iterate_folder(path, split, parts)
    name, _, rest = str(source).partition(":")
    config, _, own_split = rest.partition(":")
    folder = Path(name).is_dir()
    if folder and not config:
        return _iterate_folder(Path(name), own_split or split, parts)
    if folder or (HUB_NAME.fullmatch(name) and Path(name).suffix.lower() not in SUFFIXES):
        return _iterate_datasets(name, config or None, own_split or split, parts)
    raise UserError(f"{source}: no such file; check the path")


def _iterate_folder(folder: Path, split: str, parts: dict[str, str]) -> Iterator[tuple[str, Row]]:
    files = [] if parts else files_of(folder, split)
    if files:
        return (item for file in files for item in _iterate_file(file))
    return _iterate_datasets(str(folder), None, split, parts)


def _iterate_file(path: Path) -> Iterator[tuple[str, Row]]:
    readers: dict[str, Any] = {
        "": iterate_jsonl,
        ".jsonl": iterate_jsonl,
        ".json": _iterate_json,
        ".parquet": _iterate_parquet,
        ".csv": iterate_csv,
    }
    suffix = path.suffix.lower()
    if suffix == ".gz" and path.with_suffix("").suffix.lower() == ".jsonl":
        return iterate_jsonl(path)
    if suffix not in readers:
        raise UserError(
            f"{path}: cannot read {path.suffix} files; give one of {', '.join(SUFFIXES)}"
        )
    return readers[suffix](path)


# -- JSON ------------------------------------------------------------------------------------


def _iterate_json(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a list of objects, an object that holds one under any key, or JSON lines."""
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        return
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            yield from iterate_jsonl(path)
            return
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno} ({error.msg}); "
            "the file must be a list of objects, or one object a line"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: {BEYOND_JSON}") from None
    for number, row in enumerate(_rows_of(content, path), start=1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def _rows_of(content: Any, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a list of objects, found {type(content).__name__}")
    if any(column in content for column in (*TEXT_COLUMNS, "responses")):
        return [content]  # a file of one row
    lists = [key for key, value in content.items() if _holds_rows(value)]
    if any(key in INNER_LISTS for key in lists):
        return [content]
    if len(lists) > 1:
        raise UserError(
            f"{path}: holds several lists of objects ({', '.join(lists)}); write the rows as one "
            "list, or one object a line"
        )
    return content[lists[0]] if lists else [content]


def _holds_rows(value: Any) -> bool:
    """Whether this is a list of objects that are not chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "role" not in item for item in value)
    )


# -- CSV -------------------------------------------------------------------------------------


def iterate_csv(path: Path, *, delimiter: str = ",") -> Iterator[tuple[str, Row]]:
    """Yield `("file:line", row)` of a CSV file."""
    csv.field_size_limit(2**31 - 1)  # transcripts exceed the default 128 KiB
    with open(path, "rb") as handle:
        reader = csv.reader(_decoded_lines(handle, path), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path)
            start = reader.line_num + 1
            for cells in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: {len(cells)} cells for {len(header)} columns; put text with "
                        f"{delimiter!r} or line breaks in double quotes"
                    )
                row = {c: _cell(c, text, where) for c, text in zip(header, cells, strict=True)}
                yield where, {c: value for c, value in row.items() if value is not None}
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _decoded_lines(handle: Any, path: Path) -> Iterator[str]:
    for number, raw in enumerate(handle, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not valid UTF-8 at byte {error.start + 1}; "
                "save the file as UTF-8"
            ) from None


def _check_header(header: list[str], path: Path) -> None:
    for number, name in enumerate(header, start=1):
        if name in header[: number - 1]:
            raise UserError(f"{path}:1: two columns are called {name!r}; rename one")
        if not name:
            header[number - 1] = f"column_{number}"  # pandas writes an index without a name


def _cell(column: str, text: str, where: str) -> Any:
    """Return a cell's value; None for an empty cell of a column that cannot be empty."""
    if column in JSON_COLUMNS:
        if not text.strip():
            return None
        if text.strip().lower() in ("true", "false"):  # as spreadsheets and pandas write them
            text = text.strip().lower()
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: column {column!r} is not valid JSON at column {error.colno} of the cell "
                f"({error.msg}); write it as JSON, with double quotes"
            ) from None
        except (ValueError, RecursionError):
            raise UserError(f"{where}: column {column!r} is {BEYOND_JSON}") from None
    if column == "prompt" and not text:
        return None
    if column in TEXT_COLUMNS and text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            return value
    return text


# -- Arrow -----------------------------------------------------------------------------------


def _iterate_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in _plain_rows(batch, path, number):
                number += 1
                yield f"{path}: row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a whole Parquet file after row {number} ({first_line(error)})"
        ) from None


def _plain_rows(batch: Any, path: Path, before: int) -> list[Row]:
    """Return the rows of an Arrow batch; a value that Python cannot hold is named by its place."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            for column in batch.schema.names:
                try:
                    batch.column(column)[number].as_py()
                except (ValueError, OverflowError) as error:
                    where = f"{path}: row {before + number + 1}: column {column!r}"
                    raise _unreadable(where, error) from None
        raise


def _unreadable(where: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where}: text that is not valid UTF-8; write it as UTF-8")
    return UserError(f"{where}: a value cannot be read ({first_line(error)}); correct it")


def _iterate_datasets(
    name: str, config: str | None, split: str, parts: dict[str, str]
) -> Iterator[tuple[str, Row]]:
    """Yield rows through `datasets`: a folder of data files or of `save_to_disk`, or a hub name."""
    table = _load(name, config, split, parts)
    called = "/".join((name, *parts.values()))
    rows, number = iter(table), 0
    while True:
        number += 1
        where = f"{called}[{split}] row {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except (ValueError, OverflowError) as error:
            raise _unreadable(where, error) from None
        yield where, without_nulls(row)


def _load(name: str, config: str | None, split: str, parts: dict[str, str]) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if not is_saved(Path(name)):
            with _quiet(datasets.utils.logging):  # it also logs what it raises
                return _load_published(name, config, split, parts)
        table = datasets.load_from_disk(name)
    except ConnectionError as error:
        raise UserError(
            f"{name}: cannot be downloaded ({first_line(error)}); check the network, or give a "
            "local file"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # any error here is about these files
        cause = error.__cause__ or error  # which may say what is wrong with the file
        reason = first_line(cause)
        raise UserError(f"{name}: cannot be loaded as a data set ({reason})") from None
    splits = list(table) if isinstance(table, dict) else ["train"]
    if split not in splits:
        raise UserError(f"{name}: has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return table[split] if isinstance(table, dict) else table


def _load_published(name: str, config: str | None, split: str, parts: dict[str, str]) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, **parts)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    # A configuration is a folder there.
    folder = {"data_dir": config} if config else {}
    return datasets.load_dataset(name, split=split, revision=PARQUET_EXPORT, **folder | parts)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def without_nulls(value: Any) -> Any:
    """Return a row in JSON types, without the nulls that a columnar format adds."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)  # dates, decimals, bytes in the user's own columns


def fingerprint(source: str | Path, rows: list[Row]) -> str:
    """Return a SHA-256 that identifies a data set, from the file's bytes or else from the rows."""
    if Path(source).is_file():
        return file_hash(source)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
