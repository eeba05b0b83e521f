"""Sample responses of all arms to the same prompts, read from a run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row, is_number, iterate_jsonl
from shiftrm.report.results import SFT
from shiftrm.report.tables import NOT_MEASURED, fixed_point

PROMPTS = 4
RESPONSE_LIMIT = 2000  # characters shown of a response


@dataclass(frozen=True)
class Answer:
    """One arm's response.

    Attributes:
        reward: of the arm's own reward model, in words; `gold` is None where it was not asked.
        cut: whether the response reached the length limit.
    """

    arm: str
    round: int
    response: str
    reward: str
    gold: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt with its responses."""

    prompt: str
    answers: tuple[Answer, ...]


def read_samples(folder: Path) -> list[SamplePrompt]:
    """Return the first test prompts with SFT's and every arm's last responses.

    An arm whose file is missing or unreadable is left out.
    """
    methods = folder / "methods"
    arms = sorted(methods.iterdir()) if methods.is_dir() else []
    places = [(SFT, 0, folder), *((arm.name, *_last_round(arm)) for arm in arms)]
    found = [(name, number, _first_rows(place / "evaluation")) for name, number, place in places]
    prompts: dict[str, Row] = next((rows for *_, rows in found if rows), {})
    return [
        SamplePrompt(
            shown(row.get("prompt")),
            tuple(_answer(name, number, rows[key]) for name, number, rows in found if key in rows),
        )
        for key, row in prompts.items()
    ]


def _last_round(arm: Path) -> tuple[int, Path]:
    """Return the last evaluated round and its folder; earlier demos evaluated DPO outside one."""
    rounds = [
        (int(match[1]), path)
        for path in arm.iterdir()
        if (match := re.fullmatch(r"round-(\d+)", path.name)) and (path / "evaluation").is_dir()
    ]
    return max(rounds, default=(1, arm))


def _first_rows(folder: Path) -> dict[str, Row]:
    """Return the first rows with different prompts; none if the file is missing or unreadable."""
    path = folder / "scored.jsonl"
    if not path.is_file():
        path = folder / "responses.jsonl"  # of an earlier demo
    rows: dict[str, Row] = {}
    try:
        for _, row in iterate_jsonl(path, required=("responses",)):
            if row["responses"]:
                rows.setdefault(repr(row.get("prompt")), row)
            if len(rows) == PROMPTS:
                break
    except (UserError, OSError):
        return {}
    return rows


def _answer(arm: str, number: int, row: Row) -> Answer:
    def first(*keys: str) -> Any:
        value = next((row[key] for key in keys if key in row), None)
        return value[0] if isinstance(value, list) and value else None

    def rounded(value: Any) -> str | None:
        return fixed_point(float(value)) if is_number(value) else None

    return Answer(
        arm=arm,
        round=number,
        response=shown(first("responses")),
        reward=rounded(first("rewards", "proxy")) or NOT_MEASURED,
        gold=rounded(first("golds", "gold")),
        cut=first("finished") is False,
    )


def shown(value: Any) -> str:
    """Return text, or a dialogue as paragraphs `role: text`, truncated if too long."""
    if isinstance(value, list):
        value = "\n\n".join(
            f"{turn.get('role', '?')}: {turn.get('content', '')}"
            if isinstance(turn, Mapping)
            else str(turn)
            for turn in value
        )
    text = str(value if value is not None else "")
    return text if len(text) <= RESPONSE_LIMIT else text[:RESPONSE_LIMIT] + " …"
