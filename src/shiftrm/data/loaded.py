"""The result of reading a data set: rows that are kept, and where and why others are dropped.

A mapper converts a row of a public schema to a `Row` of ours, or returns the reason for dropping it
as a `str`. Readers yield `(where, outcome)`; `collect` gathers them, so every row that is read is
either kept or listed as dropped. A row that does not fit the schema (a null where text should be)
is dropped and counted as well; its error is raised only if no row is left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from shiftrm.errors import UserError
from shiftrm.files import Row, is_number, require_columns
from shiftrm.models.rendering import Text
from shiftrm.models.templates import text_of as message_text

KINDS = ("pairs", "prompts", "demonstrations")
"""Kinds of rows: TRL's preference rows; `{"prompt"}`; TRL's prompt-completion or messages."""

T = TypeVar("T")

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
    places: list[str] = field(default_factory=list)  # the place of each of `rows` in its source

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


def usable(outcomes: Iterable[tuple[str, T | str]], dropped: Counter[str]) -> Iterator[T]:
    """Yield the rows and count the dropped ones by reason.

    Raises:
        UserError: no row fits the schema; the message is that of the first one.
    """
    first: Broken | None = None
    fits = False
    for _, outcome in outcomes:
        if isinstance(outcome, Broken):
            first = first or outcome
        else:
            fits = True
        if isinstance(outcome, str):
            dropped[str(outcome)] += 1
        else:
            yield outcome
    if first is not None and not fits:
        raise UserError(first.message)


def each(
    mapper: Callable[[Row, str], T | str], rows: Iterable[tuple[str, Row]]
) -> Iterator[tuple[str, T | str]]:
    """Apply a mapper to each row."""
    return ((where, mapped(mapper, row, where)) for where, row in rows)


def mapped(mapper: Callable[[Row, str], T | str], row: Row, where: str) -> T | str:
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
    """Declare a field of a format's options.

    Args:
        help: its text in `shiftrm convert --help`.
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

    def check(self, kind: str) -> None:
        """Raise `UserError` if rows of this kind need an option that is not given."""


# -- parts of mappers ------------------------------------------------------------------------


def wrong(row: Row, column: str, where: str, expected: str) -> UserError:
    """Return the error for a column that holds something else than expected."""
    return UserError(f"{where}: column {column!r} is {row.get(column)!r:.40}; expected {expected}")


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text of a required column; raise `UserError` if there is none."""
    require_columns(row, (column,), where)
    if not isinstance(row[column], str):
        raise wrong(row, column, where, "text")
    return row[column]


def number_of(row: Row, column: str, where: str, expected: str = "a number") -> float:
    """Return the number in a required column, which may be NaN or infinite.

    Raises:
        UserError: there is none, or an integer that floating point cannot hold.
    """
    require_columns(row, (column,), where)
    value = row[column]
    if not is_number(value) and not isinstance(value, float):
        raise wrong(row, column, where, expected)
    return value


def bit_of(row: Row, column: str, where: str, expected: str = "0 or 1") -> int:
    """Return the 0 or 1 in a required column; raise `UserError` for anything else."""
    if number_of(row, column, where, expected) not in (0, 1):
        raise wrong(row, column, where, expected)
    return int(row[column])


def list_of(row: Row, column: str, where: str, expected: str = "a list") -> list[Any]:
    """Return the list in a required column; raise `UserError` if there is none."""
    require_columns(row, (column,), where)
    if not isinstance(row[column], list):
        raise wrong(row, column, where, expected)
    return row[column]


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
    """Return one chat message."""
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
