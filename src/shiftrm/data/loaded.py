"""What came of a data set's rows: the kept ones, and for each of the others where and why.

A mapper turns a row of a public schema into one of ours, or says in a word why it cannot: `Row` or
`str`. Readers yield `(where, outcome)`, and `collect` gathers them. Nothing gets lost: what a
reader yields is either kept or listed. A row that is not of the schema (a null where text should
be) is dropped and counted as well; only where none is left, its error is raised.
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
"""What rows are for: TRL's preference rows; `{"prompt"}`; TRL's prompt-completion or messages."""

Outcome = Row | str
"""A row, or the reason why there is none."""

BROKEN = "broken_row"
"""The reason of rows that are not of the schema."""


class Broken(str):
    """`BROKEN`, with the line that says what is wrong."""

    message: str

    def __new__(cls, message: str) -> "Broken":
        reason = super().__new__(cls, BROKEN)
        reason.message = message
        return reason


Outcomes = Iterator[tuple[str, Outcome]]
"""`(where, outcome)`, as `sources.iterate_rows` says where."""

ASCII_SPACE = " \t\r\n"


@dataclass
class Loaded:
    """Rows of one kind, and every row that was dropped."""

    rows: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)  # {"where", "reason"}, "error" if broken
    places: list[str] = field(default_factory=list)  # where each of `rows` stands in its source

    def counts(self) -> dict[str, int]:
        """How many rows were dropped for which reason, the most frequent first."""
        return dict(Counter(row["reason"] for row in self.dropped).most_common())

    def drop(self, where: str, reason: str) -> None:
        """List a row that is not kept."""
        row = {"where": where, "reason": str(reason)}
        self.dropped.append(row | {"error": reason.message} if isinstance(reason, Broken) else row)


def collect(outcomes: Iterable[tuple[str, Outcome]]) -> Loaded:
    """Gather outcomes in their order.

    Text that holds half of a surrogate pair (an emoji cut in two, as JSON can spell it) is no
    Unicode and could not be written: dropped as `broken_unicode`.
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
    """The outcomes of a mapper that looks at one row at a time."""
    return ((where, mapped(mapper, row, where)) for where, row in rows)


def mapped(mapper: Callable[[Row, str], Outcome], row: Row, where: str) -> Outcome:
    """A mapper's outcome; a row that it refuses is broken, which says nothing of the others."""
    try:
        return mapper(row, where)
    except UserError as error:
        return Broken(str(error))


def prompts_of(outcomes: Iterable[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """The same outcomes with the prompt (and the tree, if any) of each row alone."""
    for where, outcome in outcomes:
        if isinstance(outcome, dict):
            outcome = {c: outcome[c] for c in ("prompt", "tree") if c in outcome}
        yield where, outcome


def demonstrations_of(outcomes: Iterable[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """Pairs as demonstrations of their preferred side."""
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
    """A column that must be there and hold text.

    Raises:
        UserError: it is missing or holds something else.
    """
    if column not in row:
        has = ", ".join(map(repr, row)) or "no columns"
        raise UserError(f"{where}: column {column!r} is missing; the row has {has}")
    value: Any = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected text")
    return value


def trimmed(text: str) -> str:
    """Text without ASCII white space at its ends; all else stays, byte for byte."""
    return text.strip(ASCII_SPACE)


def spoken(text: Text) -> Text:
    """A text as it is; of messages, the content as text where it is given in parts.

    Raises:
        UserError: a part that is no text.
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
    """A preference row, unless its sides cannot be told apart or one says nothing."""
    if no_text(prompt):
        return "empty_prompt"
    if no_text(chosen) or no_text(rejected):
        return "empty_response"
    if chosen == rejected:
        return "equal_sides"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def demonstration_of(prompt: Text, completion: Text) -> Outcome:
    """A prompt-completion row, unless one of the two says nothing."""
    if no_text(prompt):
        return "empty_prompt"
    if no_text(completion):
        return "empty_response"
    return {"prompt": prompt, "completion": completion}


def no_text(text: Text) -> bool:
    """Nothing but white space; in a chat, the last message decides. A call of a tool is not."""
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
