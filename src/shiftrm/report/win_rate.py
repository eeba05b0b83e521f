"""A win rate as a self-contained HTML page. Foreign text is escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.core.intervals import Measured
from shiftrm.files import atomic_write_text
from shiftrm.measure.judges.comparing import Verdict
from shiftrm.measure.judges.questions import plain_text
from shiftrm.measure.judges.win_rates import WinRate, headline, sentences, warnings
from shiftrm.records import library_versions, source_commit
from shiftrm.report.page import page_template
from shiftrm.report.tables import NOT_MEASURED, Table

__all__ = ["render_page", "write_page"]

_SHOWN_EACH = 3  # examples per outcome
_TEXT_LIMIT = 2000  # characters shown of a text
_COLOURS = {"win": "#0072B2", "tie": "#999999", "lose": "#D55E00"}


@dataclass(frozen=True)
class _Example:
    outcome: str
    prompt: str
    ours: str
    theirs: str
    said: tuple[str, ...]


def write_page(
    rate: WinRate, verdicts: Sequence[Verdict], settings: Mapping[str, Any], path: str | Path
) -> Path:
    """Write the page atomically."""
    return atomic_write_text(path, render_page(rate, verdicts, settings))


def render_page(rate: WinRate, verdicts: Sequence[Verdict], settings: Mapping[str, Any]) -> str:
    """Return the page's HTML.

    Args:
        settings: the judge's settings to show.
    """
    return page_template("win_rate.html.j2").render(
        headline=headline(rate),
        sentences=[*sentences(rate)],
        warnings=[*warnings(rate)],
        bars=[
            (name, round(100 * share.value, 1), _COLOURS[name])
            for name, share in (("win", rate.win), ("tie", rate.tie), ("lose", rate.lose))
        ],
        table=_table(rate),
        settings=_settings_table(settings),
        examples=_examples(verdicts),
        commit=source_commit(),
        versions=library_versions(),
        not_measured=NOT_MEASURED,
    )


def _table(rate: WinRate) -> Table:
    rows = [
        ("Ours wins", _cell(rate.win)),
        ("Tie", _cell(rate.tie)),
        ("Ours loses", _cell(rate.lose)),
        ("Wins and half the ties", _cell(rate.rate)),
        ("The same at equal lengths", _cell(rate.controlled)),
        ("Mean characters, ours", f"{rate.length_ours:.0f}"),
        ("Mean characters, theirs", f"{rate.length_theirs:.0f}"),
        ("Prompts judged", str(rate.asked)),
        ("Prompts counted", str(rate.counted)),
    ]
    if rate.position is not None:
        rows += [
            ("Both orders agree", _cell(rate.position.consistency)),
            ("First response named, of answers that name one", _cell(rate.position.first_share)),
        ]
    note = "In brackets: 95 % percentile intervals of 1,000 bootstrap draws of prompts."
    return Table("Ours against theirs", ("", "value"), tuple(rows), note)


def _cell(found: Measured | None) -> str:
    return NOT_MEASURED if found is None else str(found)


def _settings_table(settings: Mapping[str, Any]) -> Table:
    rows = tuple((name, str(value)) for name, value in settings.items() if value is not None)
    return Table("How it was judged", ("setting", "value"), rows, text_columns=2)


def _examples(verdicts: Sequence[Verdict]) -> list[_Example]:
    """Return the first few verdicts of every outcome, those without an outcome first."""
    found = []
    for outcome in (None, "lose", "win", "tie"):
        of_kind = [v for v in verdicts if v.outcome == outcome and v.note != "identical"]
        for verdict in of_kind[:_SHOWN_EACH]:
            comparison = verdict.comparison
            said = tuple(_cut(answer.raw) for answer in verdict.answers)
            if verdict.scores is not None:
                said = ("Scores: {:.3f} ours, {:.3f} theirs".format(*verdict.scores),)
            found.append(
                _Example(
                    outcome or f"not counted: {verdict.note}",
                    _cut(plain_text(comparison.prompt, prompt=True)),
                    _cut(plain_text(comparison.ours)),
                    _cut(plain_text(comparison.theirs)),
                    said,
                )
            )
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]} ..."
