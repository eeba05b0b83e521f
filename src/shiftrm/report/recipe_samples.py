"""Sample responses of all arms to the same prompts, read from a run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row, iterate_jsonl
from shiftrm.report.arms import SFT
from shiftrm.report.page import RESPONSE_LIMIT
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.tables import NOT_MEASURED, fixed_point

__all__ = ["Answer", "SamplePrompt", "read_samples"]

PROMPTS = 4
SCORED = "scored.jsonl"


@dataclass(frozen=True)
class Answer:
    """One arm's response; `cut` if it reached the length limit."""

    name: str
    colour: str
    round: int
    response: str
    reward: str
    cut: bool


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt with its responses."""

    prompt: str
    answers: tuple[Answer, ...]


def read_samples(folder: Path, arms: Arms) -> list[SamplePrompt]:
    """Return the first test prompts with SFT's and every arm's last responses.

    An arm whose file is missing or unreadable is left out.
    """
    found: list[tuple[str, int, dict[str, Row]]] = []
    for arm in arms.kinds:
        number, path = 0, folder / "evaluation" / SCORED
        if arm != SFT:
            number, path = _last_round(folder / "methods" / arm)
        rows = _first_rows(path)
        if rows:
            found.append((arm, number, rows))
    if not found:
        return []
    samples = []
    for key, row in found[0][2].items():
        answers = tuple(
            _answer(arms, arm, number, rows[key]) for arm, number, rows in found if key in rows
        )
        samples.append(SamplePrompt(_shown(row.get("prompt")), answers))
    return samples


def _last_round(folder: Path) -> tuple[int, Path]:
    rounds = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"round-(\d+)", path.name)) and (path / "evaluation").is_dir()
    ]
    number, path = max(rounds, default=(0, folder))
    return number, path / "evaluation" / SCORED


def _first_rows(path: Path) -> dict[str, Row]:
    """Return the first rows by prompt; none if the file is missing or unreadable."""
    if not path.is_file():
        return {}
    try:
        rows = [row for _, row in islice(iterate_jsonl(path, required=("responses",)), PROMPTS)]
    except (UserError, OSError):
        return {}
    return {repr(row.get("prompt")): row for row in rows if row["responses"]}


def _answer(arms: Arms, arm: str, number: int, row: Row) -> Answer:
    def first(key: str) -> Any:
        value = row.get(key)
        return value[0] if isinstance(value, list) and value else None

    reward = first("rewards")
    return Answer(
        name=arms.name(arm),
        colour=arms.styles[arm].colour,
        round=number,
        response=_shown(first("responses")),
        reward=fixed_point(float(reward)) if isinstance(reward, int | float) else NOT_MEASURED,
        cut=first("finished") is False,
    )


def _shown(value: Any) -> str:
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
