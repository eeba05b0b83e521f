"""Data formats by name or import path: the rows each gives, its options, and `load` to read them.

loaded = load("hh_rlhf", "Anthropic/hh-rlhf", kind="pairs", subset="helpful")
loaded.rows, loaded.counts()
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiftrm.config import from_mapping
from shiftrm.data.loaded import (
    KINDS,
    Loaded,
    Options,
    Outcome,
    Outcomes,
    collect,
    demonstrations_of,
    each,
    prompts_of,
)
from shiftrm.data.sources import iterate_rows
from shiftrm.data.splits import deduplicated, limited
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.registry import Registry

COMMON = {
    "limit": "at most N rows, drawn with the seed (default: all)",
    "seed": "random seed of what is drawn (default: 0)",
}
"""Options that every format has."""


def source_rows(source: str, split: str, _options: Any) -> Iterable[tuple[str, Row]]:
    """Yield the rows of a source as they are."""
    return iterate_rows(source, split=split)


@dataclass(frozen=True)
class Format:
    """A data set's schema: how its rows become pairs, prompts or demonstrations.

    A format gives either `mappers`, where each row becomes one row, or `read`. Without a mapper of
    their own, demonstrations are the preferred sides of pairs, and prompts those of demonstrations
    or else of pairs.

    Attributes:
        about: one line for `shiftrm convert --help`.
        kinds: the kinds of rows it gives, of `KINDS`.
        read: takes source, kind, split and options; yields `(where, row)`, or `(where, reason)` for
            a row that is dropped.
        options: a dataclass derived from `loaded.Options`.
        hub: its names on the hub; a recipe that gives no source reads the first one.
        splits: hub name -> kind -> default split, where that is not `train`.
        rows_say_split: whether rows name their split in a column `split`, so that one file can hold
            several; rows of another split are dropped as `other_split`.
        mappers: kind -> function of a row, its place and the options.
        rows: takes source, split and options; yields `(where, row)` for the mappers.
    """

    about: str
    kinds: tuple[str, ...] = KINDS
    read: Callable[[str, str, str, Any], Outcomes] | None = None
    options: type = Options
    hub: tuple[str, ...] = ()
    splits: dict[str, dict[str, str]] = field(default_factory=dict)
    rows_say_split: bool = False
    mappers: Mapping[str, Callable[[Row, str, Any], Outcome]] = field(default_factory=dict)
    rows: Callable[[str, str, Any], Iterable[tuple[str, Row]]] = source_rows

    def outcomes(self, source: str, kind: str, split: str, options: Any) -> Outcomes:
        """Yield the rows of a kind, and the reasons for those that are dropped."""
        if self.read is not None:
            return self.read(source, kind, split, options)
        made = next(k for k in (kind, "demonstrations", "pairs") if k in self.mappers)

        def mapper(row: Row, where: str) -> Outcome:
            if self.rows_say_split and not _in_split(row, split):
                return "other_split"
            return self.mappers[made](row, where, options)

        found = each(mapper, self.rows(source, split, options))
        if made == kind:
            return found
        return prompts_of(found) if kind == "prompts" else demonstrations_of(found)

    def default_split(self, source: str, kind: str) -> str:
        """Return the split to read when none is given."""
        return self.splits.get(source.partition(":")[0], {}).get(kind, "train")

    def option_help(self) -> dict[str, str]:
        """Return option -> help text; the options that every format has come last."""
        fields = dataclasses.fields(self.options)
        return {field.name: field.metadata.get("help", "") for field in fields} | COMMON


FORMATS = Registry[Format]("format", Format, home="shiftrm.data.formats")
"""The data formats, by name or as `package.module:FORMAT`."""


def load(
    format: str,
    source: str | Path,
    *,
    kind: str,
    split: str | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Loaded:
    """Read a data set of a known format.

    Args:
        format: a name in `FORMATS`, or the import path `package.module:FORMAT` of a `Format`.
        source: a file, a folder or a hub name, as `sources.iterate_rows` reads them.
        kind: one of `KINDS`; not every format offers each.
        split: split of a folder or hub name; None takes the format's default for this kind.
        progress: called with the number of rows read so far.
        options: the format's own (`Format.option_help`), and `limit` and `seed`.

    Returns:
        The rows without duplicates, and the dropped rows with where and why.

    Raises:
        UserError: an unknown format, kind or option, a source that cannot be read or has another
            schema in every row, or no row is left.
    """
    form = FORMATS.get(format)
    if kind not in form.kinds:
        hint = suggest(kind, list(form.kinds))
        raise UserError(f"{format}: gives no {kind!r}; it gives {', '.join(form.kinds)}{hint}")
    limit, seed = _common({name: options[name] for name in COMMON if name in options}, format)
    own = {f.name for f in dataclasses.fields(form.options)}
    options = {name: value for name, value in options.items() if name in own or name not in COMMON}
    try:
        settings: Any = from_mapping(form.options, options)
    except UserError as error:
        raise UserError(f"{format}: {error}") from None
    split = split or form.default_split(str(source), kind)
    settings.check(kind)
    outcomes = form.outcomes(str(source), kind, split, settings)
    loaded = deduplicated(collect(_counted(outcomes, progress)))
    if limit is not None:
        loaded = limited(loaded, limit=limit, seed=seed)
    if not loaded.rows:
        if errors := [row["error"] for row in loaded.dropped if "error" in row]:
            raise UserError(errors[0])
        reasons = ", ".join(f"{n} {reason}" for reason, n in loaded.counts().items())
        raise UserError(
            f"{source}: no row is left as {kind} of {format} ({reasons or 'there are none'}); "
            "check the format, the split and the options"
        )
    return loaded


def parse_options(format: str, words: list[str]) -> dict[str, Any]:
    """Parse `name=value` words from the command line into typed options.

    Raises:
        UserError: a word that is not an option, or a value of the wrong type.
    """
    form = FORMATS.get(format)
    hints = typing.get_type_hints(form.options) | {"limit": int, "seed": int}
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not an option; write name=value, as limit=1000")
        if name not in hints:
            raise UserError(f"{format}: no option {name!r}{suggest(name, list(hints))}")
        options[name] = _typed(hints[name], text, f"{format}: {name}")
    return options


def _in_split(row: Row, split: str) -> bool:
    """Whether a row is of a split; "valid1" is part of "validation"."""
    said = row.get("split")
    return not isinstance(said, str) or said == split or said[:5] == split[:5] == "valid"


def _common(given: dict[str, Any], format: str) -> tuple[int | None, int]:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise UserError(f"{format}: {name} is {value!r}; expected a whole number")
    return given.get("limit"), given.get("seed") or 0


def _counted(outcomes: Outcomes, progress: Callable[[int], None] | None) -> Iterator[Any]:
    for number, item in enumerate(outcomes, start=1):
        yield item
        if progress is not None and number % 256 == 0:
            progress(number)


def _typed(hint: Any, text: str, what: str) -> Any:
    """Convert text to the type of an option. Unlike YAML, `lang=no` stays text (Norwegian)."""
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what} is {text!r}; give true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"{what} is {text!r}; expected {kind}") from None
    return text
