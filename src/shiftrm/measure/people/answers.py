"""Raters' answers, read with the key. Every row is checked, and missing answers are counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shiftrm.data.sources import iterate_csv, iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.measure.judges.comparing import Outcome
from shiftrm.measure.people.blinding import Side
from shiftrm.measure.people.key_files import Key

Choice = Literal["A", "B", "tie"]
CHOICES: dict[str, Choice] = {"a": "A", "b": "B", "tie": "tie"}


@dataclass(frozen=True)
class HumanAnswer:
    """A rater's answer on a pair of responses.

    Attributes:
        pair: its id.
        prompt: equal for equal prompts.
        choice: the better response as labelled on the sheet, or "tie"; None without an answer.
        ours: the label of our response on the sheet.
    """

    pair: str
    prompt: str
    rater: str
    choice: Choice | None
    ours: Side
    comment: str = ""

    @property
    def outcome(self) -> Outcome | None:
        """Outcome for our response."""
        if self.choice is None or self.choice == "tie":
            return self.choice
        return "win" if self.choice == self.ours else "lose"


def read_answers(files: Sequence[str | Path], key: Key) -> list[HumanAnswer]:
    """Read the answers of all raters, one for each item of each rater's sheet.

    A file is saved by the page (JSON or CSV) or by a spreadsheet, also with semicolons. The rater's
    name is in the column `rater`, or else is the file's name.

    Returns:
        In the order of the files, each rater's in the order of the sheet. Items without an answer,
        and those that a file does not mention, have the choice None.

    Raises:
        UserError: a missing or malformed file, a sheet that is not the key's, an item it does not
            have, an answer other than A, B or tie, an item answered twice by one rater, or no
            answer at all.
    """
    given: dict[tuple[str, str], dict[int, tuple[Choice | None, str]]] = {}
    places: dict[tuple[str, str, int], str] = {}
    for file in files:
        for where, row in _rows(Path(file)):
            sheet, item = _item(row, where, key)
            rater = _text(row, "rater") or str(file)
            before = places.setdefault((rater, sheet, item), where)
            if before != where:
                raise UserError(
                    f"{where}: item {item} of {rater!r} was already answered in {before}; give "
                    "each rater's answers once, and each rater a name of their own"
                )
            choice, comment = _choice(row, where), _text(row, "comment")
            given.setdefault((rater, sheet), {})[item] = (choice, comment)
    answers = []
    for (rater, sheet), items in given.items():
        for number, (pair, ours) in enumerate(key.sheets[sheet], start=1):
            choice, comment = items.get(number, (None, ""))
            prompt = key.pairs[pair].prompt_key
            answers.append(HumanAnswer(pair, prompt, rater, choice, ours, comment))
    _refuse_two_sheets(answers)
    if not any(answer.choice for answer in answers):
        raise UserError(
            f"{', '.join(map(str, files))}: no item is answered; the column 'answer' takes A, B "
            "or tie"
        )
    return answers


def _refuse_two_sheets(answers: Sequence[HumanAnswer]) -> None:
    """Reject several sheets of a rater, who would count twice."""
    seen: set[tuple[str, str]] = set()
    for answer in answers:
        if (answer.rater, answer.pair) in seen:
            raise UserError(
                f"rater {answer.rater!r} filled in two sheets of the same items; give each "
                "rater one sheet, and a name of their own"
            )
        seen.add((answer.rater, answer.pair))


def _item(row: Row, where: str, key: Key) -> tuple[str, int]:
    """Return sheet and item (from 1) of a row."""
    require_columns(row, ("sheet", "item", "answer"), where)
    sheet = _text(row, "sheet")
    if sheet not in key.sheets:
        raise UserError(
            f"{where}: sheet {sheet!r} is not the key's, which has {', '.join(key.sheets)}; give "
            "the key.json that was written with this sheet"
        )
    text = _text(row, "item").removesuffix(".0")  # spreadsheets may write integers so
    last = len(key.sheets[sheet])
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= last:
        raise UserError(f"{where}: item {text!r} is not on the sheet; its items are 1 to {last}")
    return sheet, int(text)


def _choice(row: Row, where: str) -> Choice | None:
    text = _text(row, "answer")
    if not text:
        return None
    if text.lower() not in CHOICES:
        raise UserError(f"{where}: the answer {text[:40]!r} is not valid; write A, B or tie")
    return CHOICES[text.lower()]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Return the rows of a file of answers, without empty lines from spreadsheets."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    with open(path, "rb") as handle:
        semicolons = path.suffix.lower() == ".csv" and b";" in handle.readline()
    # Spreadsheets in locales with decimal commas separate cells by semicolons.
    for where, row in iterate_csv(path, delimiter=";") if semicolons else iterate_rows(path):
        if any(_text(row, column) for column in row):
            yield where, row
