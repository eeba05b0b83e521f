"""The result of reading a data set: rows that are kept, and where and why others are dropped.

A mapper converts a row of a public schema to a `Row` of ours, or returns the reason for dropping it
as a `str`. Readers yield `(where, outcome)`; `collect` gathers them, so every row that is read is
either kept or listed as dropped. A row that does not fit the schema (a null where text should be)
is dropped and counted as well; its error is raised only if no row is left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text
from shiftrm.models.templates import text_of as message_text

__all__ = [
    "BROKEN",
    "KINDS",
    "Broken",
    "Loaded",
    "Options",
    "Outcome",
    "Outcomes",
    "collect",
    "demonstration_of",
    "demonstrations_of",
    "each",
    "mapped",
    "message",
    "no_text",
    "option",
    "pair_of",
    "prompts_of",
    "spoken",
    "text_of",
    "trimmed",
]

KINDS = ("pairs", "prompts", "demonstrations")
"""Kinds of rows: TRL's preference rows; `{"prompt"}`; TRL's prompt-completion or messages."""

Outcome = Row | str
"""A row, or the reason why it was dropped."""

BROKEN = "broken_row"
"""The reason for dropping rows that do not fit the schema."""


class Broken(str):
    """`BROKEN` with its error message."""

    message: str

    def __new__(cls, message: str) -> "Broken":
        reason = super().__new__(cls, BROKEN)
        reason.message = message
        return reason


Outcomes = Iterator[tuple[str, Outcome]]
"""`(where, outcome)`, with `where` from `sources.iterate_rows`."""

ASCII_SPACE = " \t\r\n"


@dataclass
class Loaded:
    """Rows of one kind, and every row that was dropped."""

    rows: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)  # {"where", "reason"}, "error" if broken
    places: list[str] = field(default_factory=list)  # where each of `rows` stands in its source

    def counts(self) -> dict[str, int]:
        """Return the number of dropped rows by reason, most frequent first."""
        return dict(Counter(row["reason"] for row in self.dropped).most_common())

    def drop(self, where: str, reason: str) -> None:
        """Add a row to the dropped ones."""
        row = {"where": where, "reason": str(reason)}
        self.dropped.append(row | {"error": reason.message} if isinstance(reason, Broken) else row)


def collect(outcomes: Iterable[tuple[str, Outcome]]) -> Loaded:
    """Gather outcomes in order.

    A row with half of a surrogate pair (an emoji cut in two, which JSON can contain) is not valid
    Unicode and could not be written; it is dropped as `broken_unicode`.
    """
    loaded = Loaded()
    for where, outcome in outcomes:
        if isinstance(outcome, str):
            loaded.drop(where, outcome)
        elif not _is_unicode(outcome):
            loaded.drop(where, "broken_unicode")
        else:
            loaded.rows.append(outcome)
            loaded.places.append(where)
    return loaded


def each(
    mapper: Callable[[Row, str], Outcome], rows: Iterable[tuple[str, Row]]
) -> Iterator[tuple[str, Outcome]]:
    """Apply a mapper to each row."""
    return ((where, mapped(mapper, row, where)) for where, row in rows)


def mapped(mapper: Callable[[Row, str], Outcome], row: Row, where: str) -> Outcome:
    """Apply a mapper to one row; its `UserError` becomes a `Broken` outcome."""
    try:
        return mapper(row, where)
    except UserError as error:
        return Broken(str(error))


def prompts_of(outcomes: Iterable[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """Keep only the prompt (and the tree, if any) of each row."""
    for where, outcome in outcomes:
        if isinstance(outcome, dict):
            outcome = {c: outcome[c] for c in ("prompt", "tree") if c in outcome}
        yield where, outcome


def demonstrations_of(outcomes: Iterable[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """Convert pairs to demonstrations of their preferred side."""
    for where, outcome in outcomes:
        if isinstance(outcome, dict):
            tree = {c: outcome[c] for c in ("tree",) if c in outcome}
            outcome = {"prompt": outcome["prompt"], "completion": outcome["chosen"], **tree}
        yield where, outcome


def option(default: Any, help: str, *, choices: tuple[Any, ...] = ()) -> Any:
    """A field of a format's options.

    Args:
        help: what `shiftrm convert --help` says about it.
        choices: the allowed values besides the default; empty allows any.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Base of every format's options. Each field is declared with `option`.

    Raises:
        UserError: on construction, a value that is not among the choices.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value not in (item.default, *choices):
                known = " or ".join(map(repr, choices))
                raise UserError(f"{item.name} is {value!r}; give {known}")


# -- parts of mappers ------------------------------------------------------------------------


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text of a required column.

    Raises:
        UserError: the column is missing or does not hold text.
    """
    if column not in row:
        has = ", ".join(map(repr, row)) or "no columns"
        raise UserError(f"{where}: column {column!r} is missing; the row has {has}")
    value: Any = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected text")
    return value


def trimmed(text: str) -> str:
    """Strip ASCII white space from both ends and nothing else."""
    return text.strip(ASCII_SPACE)


def spoken(text: Text) -> Text:
    """Return text unchanged; in messages, join content that is given in parts to text.

    Raises:
        UserError: a part is not text.
    """
    if not isinstance(text, list):
        return text
    return [
        {**item, "content": message_text(item, number)}
        if isinstance(item.get("content"), list)
        else item
        for number, item in enumerate(text, start=1)
    ]


def message(role: str, content: str) -> dict[str, str]:
    """One chat message."""
    return {"role": role, "content": content}


def pair_of(prompt: Text, chosen: Text, rejected: Text) -> Outcome:
    """Return a preference row, or a reason if the sides are equal or a text is empty."""
    if no_text(prompt):
        return "empty_prompt"
    if no_text(chosen) or no_text(rejected):
        return "empty_response"
    if chosen == rejected:
        return "equal_sides"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def demonstration_of(prompt: Text, completion: Text) -> Outcome:
    """Return a prompt-completion row, or a reason if either text is empty."""
    if no_text(prompt):
        return "empty_prompt"
    if no_text(completion):
        return "empty_response"
    return {"prompt": prompt, "completion": completion}


def no_text(text: Text) -> bool:
    """Whether a text, or a chat's last message, is blank. A tool call is not blank."""
    if isinstance(text, str):
        return not text.strip()
    if not text:
        return True
    return not text[-1].get("tool_calls") and not message_text(text[-1], len(text)).strip()


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    elif isinstance(value, dict):
        return all(_is_unicode(item) for item in value.values())
    elif isinstance(value, list):
        return all(_is_unicode(item) for item in value)
    return True
