"""Write diagnoses as a self-contained HTML page and as JSON. Foreign text is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shiftrm.files import atomic_write_text
from shiftrm.measure.diagnosis import thresholds
from shiftrm.measure.diagnosis.findings import Findings
from shiftrm.records import library_versions, source_commit
from shiftrm.report.diagnosis_examples import ShownRow, examples
from shiftrm.report.diagnosis_features import (
    feature_meanings,
    pays_numbers,
    pays_pictures,
    pays_sentences,
    pays_tables,
)
from shiftrm.report.diagnosis_plots import (
    Series,
    calibration_figure,
    difference_figure,
    length_figure,
)
from shiftrm.report.diagnosis_sight import sight_tables
from shiftrm.report.diagnosis_tables import comparison_table, numbers_tables, source_names
from shiftrm.report.page import page_template
from shiftrm.report.pictures import Picture, image_of
from shiftrm.report.tables import NOT_MEASURED

__all__ = ["Findings", "numbers", "render_page", "write_numbers", "write_page"]

_MANY_FILES = 12  # maximum number of plots of reward against length

_COLOURS = {
    "blind": "#B00020",
    "follows length": "#B25A00",
    "dim": "#B25A00",
    "unclear": "#666666",
    "tells apart": "#0072B2",
    "sees": "#007A55",
}


def write_page(found: Findings, path: str | Path) -> Path:
    """Write the page atomically."""
    return atomic_write_text(path, render_page(found))


def write_numbers(
    found: Findings, path: str | Path, *, more: Mapping[str, Any] | None = None
) -> Path:
    """Write all numbers and verdicts, and `more`, as JSON, atomically."""
    content = numbers(found) | dict(more or {})
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return atomic_write_text(path, text)


def numbers(found: Findings) -> dict[str, Any]:
    """Return all numbers and verdicts as plain data."""
    return {
        "overall": [asdict(entry) for entry in found.overall],
        "files": [
            {**asdict(d), "verdict": asdict(v)}
            for d, v in zip(found.diagnoses, found.verdicts, strict=True)
        ],
        "comparisons": [asdict(entry) for entry in found.comparisons],
        "pays": pays_numbers(found),
        **({} if found.change is None else {"change": asdict(found.change)}),
        "thresholds": {name: value for name, value in vars(thresholds).items() if name.isupper()},
        "commit": source_commit(),
        "versions": library_versions(),
    }


def render_page(found: Findings) -> str:
    """Return the page's HTML, which depends only on the arguments."""
    names = source_names(found.diagnoses)
    several = len(found.overall) > 1
    return page_template("diagnosis.html.j2").render(
        overall=found.overall,
        change=found.change,
        several=several,
        verdicts=[
            (name, v, _COLOURS[v.word]) for name, v in zip(names, found.verdicts, strict=True)
        ],
        colours=_COLOURS,
        comparisons=comparison_table(found.comparisons) if found.comparisons else None,
        numbers=numbers_tables(found.diagnoses, found.verdicts),
        pays=pays_sentences(found),
        pays_tables=pays_tables(found),
        pays_pictures=pays_pictures(found),
        features=feature_meanings(),
        sight=sight_tables(found.diagnoses),
        pictures=_pictures(found, names),
        examples=_examples(found, names),
        t=thresholds,
        commit=source_commit(),
        versions=library_versions(),
        not_measured=NOT_MEASURED,
    )


def _examples(found: Findings, names: list[str]) -> list[tuple[str, list[ShownRow]]]:
    return [
        (name, examples(file, rows))
        for name, file, rows in zip(names, found.files, found.rows, strict=True)
    ]


def _pictures(found: Findings, names: list[str]) -> list[Picture]:
    series = list(zip(names, found.files, found.diagnoses, strict=True))
    pictures = []
    for entry in found.overall:
        of_model = [(d.name, f, d) for _, f, d in series if d.model == entry.model]
        pictures.append(
            _difference_picture(of_model, f" · {entry.model}" if len(found.overall) > 1 else "")
        )
    if any(d.labels is not None for d in found.diagnoses):
        caption = (
            "On the dotted line, what the model states comes true; below it, the model is too "
            "sure. Larger dots rest on more pairs."
        )
        image = image_of(calibration_figure(series), "Calibration", caption)
        pictures.append(Picture("Does it know how sure it may be?", (image,), caption))
    pictures.append(_length_picture(series))
    return pictures


def _difference_picture(series: Sequence[Series], label: str) -> Picture:
    caption = (
        "Differences between rewards of two distinct responses to one prompt. A model going blind "
        "moves to the left. The right picture is divided by the standard deviation of all rewards "
        "of the file, so that the scale of the model plays no part. The last bin holds all above."
    )
    images = tuple(
        image_of(difference_figure(series, relative=relative), title, caption)
        for relative, title in ((False, "Reward differences"), (True, "Relative differences"))
    )
    return Picture(f"Reward differences{label}", images, caption)


def _length_picture(series: Sequence[Series]) -> Picture:
    caption = (
        "Every response against the mean of its prompt. A tilt means that the model pays for "
        "length; whether longer responses are better, only labels say."
    )
    if len(series) > _MANY_FILES:
        caption += f" The first {_MANY_FILES} of {len(series)} are drawn."
    images = tuple(
        image_of(length_figure(name, file), f"Reward against length, {name}", caption)
        for name, file, _ in series[:_MANY_FILES]
    )
    return Picture("Reward against length, within prompts", images, caption)
