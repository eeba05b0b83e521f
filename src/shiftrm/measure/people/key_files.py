"""Files of a human evaluation: sheets for spreadsheets, the key, a judge's verdicts."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.measure.judges.comparing import Comparison, Outcome
from shiftrm.measure.people.blinding import OUTCOMES, Placement, Sheet, Side, pair_id

COLUMNS = ("sheet", "item", "prompt", "response_a", "response_b", "answer", "comment", "rater")

CELL_LIMIT = 32767  # maximum characters of a cell in Excel and LibreOffice's import

FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # noqa: RUF001 - wide forms too
"""First characters of cells that spreadsheets evaluate (OWASP, "CSV injection")."""


# -- The sheet as a table --------------------------------------------------------------------


def sheet_csv(sheet: Sheet) -> str:
    """Return the sheet as CSV; raters fill in A, B or tie under `answer`.

    It has a byte-order mark, since Excel needs it for UTF-8. No cell is read as a formula.
    """
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for number, item in enumerate(sheet.items, start=1):
        turns = "\n\n".join(f"{role}: {text}" if role else text for role, text in item.turns)
        texts = [defused(text) for text in (turns, item.a, item.b)]
        writer.writerow([sheet.id, number, *texts, "", "", ""])
    return "\ufeff" + out.getvalue()


def defused(cell: str) -> str:
    """Put an apostrophe before a cell that begins like a formula."""
    return "'" + cell if cell.startswith(FORMULA) else cell


def too_long_for_cells(sheet: Sheet) -> int:
    """Count the items that a spreadsheet would truncate."""
    return sum(
        max(len(item.a), len(item.b), sum(len(text) for _, text in item.turns)) > CELL_LIMIT
        for item in sheet.items
    )


# -- The key ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """The key: whose response is which.

    Attributes:
        pairs: the pairs by their id.
        sheets: for each sheet's id, where item n (from 1) has (pair id, our side) at n - 1.
    """

    pairs: dict[str, Comparison]
    sheets: dict[str, list[tuple[str, Side]]]


def key_text(
    pairs: Sequence[Comparison],
    sheets: Sequence[Sheet],
    placements: Sequence[Sequence[Placement]],
    *,
    settings: dict[str, Any],
) -> str:
    """Return the content of `key.json`; `settings` are only for information."""
    names = [pair_id(pair) for pair in pairs]
    content = {
        "note": "Keep this from the raters: it says which response is whose.",
        "format": 1,
        "settings": settings,
        "sheets": [
            {
                "id": sheet.id,
                "items": [{"id": names[p.pair], "ours": p.ours} for p in placed],
            }
            for sheet, placed in zip(sheets, placements, strict=True)
        ],
        "pairs": {
            name: {"prompt": pair.prompt, "ours": pair.ours, "theirs": pair.theirs}
            for name, pair in zip(names, pairs, strict=True)
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=True) + "\n"


def read_key(path: str | Path) -> Key:
    """Read `key.json`.

    Raises:
        UserError: no such file, or not a key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the key.json that the sheet was written with")
    try:
        return _key(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: is not the key of a sheet; give the key.json that `shiftrm evaluate sheet` "
            "wrote"
        ) from None


def _key(content: dict[str, Any]) -> Key:
    if content["format"] != 1:
        raise ValueError(content["format"])
    pairs = {
        str(name): Comparison(pair["prompt"], pair["ours"], pair["theirs"])
        for name, pair in dict(content["pairs"]).items()
    }
    sheets: dict[str, list[tuple[str, Side]]] = {}
    for sheet in content["sheets"]:
        items = [(item["id"], item["ours"]) for item in sheet["items"]]
        if any(name not in pairs or side not in ("A", "B") for name, side in items):
            raise ValueError(sheet["id"])
        sheets[sheet["id"]] = items
    return Key(pairs, sheets)


def read_verdicts(source: str | Path, key: Key) -> dict[str, Outcome | None]:
    """Read a judge's outcomes by pair id, from the rows of `shiftrm evaluate win-rate`.

    Verdicts on pairs that are not on the sheet are ignored.

    Raises:
        UserError: a malformed file, another outcome than win, tie, lose or null, or no verdict on
            a pair of the sheet.
    """
    found: dict[str, Outcome | None] = {}
    for where, row in iterate_rows(source, required=("prompt", "ours", "theirs")):
        outcome = row.get("outcome")
        if outcome is not None and outcome not in OUTCOMES:
            raise UserError(f"{where}: the outcome {outcome!r} is not one of {', '.join(OUTCOMES)}")
        name = pair_id(Comparison(row["prompt"], row["ours"], row["theirs"]))
        if name in key.pairs:
            found[name] = outcome
    if all(outcome is None for outcome in found.values()):
        raise UserError(
            f"{source}: no verdict on the sheet's pairs of responses; judge the same two files, "
            "with the same --limit and --seed"
        )
    return found
