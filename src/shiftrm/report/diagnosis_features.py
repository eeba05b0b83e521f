"""What the reward pays for, in a diagnosis: sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shiftrm.core.intervals import Measured
from shiftrm.measure.diagnosis.findings import Findings
from shiftrm.measure.diagnosis.pays import Pays, Price
from shiftrm.measure.features import FEATURES
from shiftrm.report.diagnosis_plots import pays_figure
from shiftrm.report.diagnosis_tables import NONE, short
from shiftrm.report.pictures import Picture, image_of
from shiftrm.report.tables import Table, fixed_point

TITLE = "What the reward pays for"
NAMED = 0.1
"""A sentence names a feature from this many standard deviations of the reward on."""
_MOST_NAMED = 3
_MOST_SERIES = 4  # files, or models, in one picture

Columns = list[tuple[str, Pays]]

CAUTION = (
    "A fit shows what goes together with high rewards, not why, and not whether it should: "
    "only labels say what good responses have more of."
)


def pays_numbers(found: Findings) -> list[dict[str, Any]]:
    """Return all numbers as plain data."""
    return [asdict(entry) for entry in found.pays]


def pays_sentences(found: Findings) -> list[tuple[str, str]]:
    """Return the name of each file, with its model if there are several, and a sentence."""
    several = len({file.model for file in found.files}) > 1
    return [
        (f"{entry.name} · {entry.model}" if several else entry.name, sentence(entry))
        for entry in found.pays
    ]


def sentence(entry: Pays) -> str:
    """Name the features that a model pays most for, and how much all of them explain."""
    explained = (
        f"Together the features explain {100 * entry.explained:.0f} % of the variance of the "
        "rewards within prompts."
    )
    largest = sorted(filter(_clear, entry.prices), key=lambda price: -abs(price.pays.value))
    if not largest:
        return f"No feature moves the reward clearly by {NAMED} standard deviations. {explained}"
    first, *others = largest[:_MOST_NAMED]
    parts = [f"{_moves(price)} with more {_label(price)}" for price in others]
    text = f"The reward {_moves(first)} standard deviations with one standard deviation more "
    text += f"{_label(first)}{''.join(f'; it {part}' for part in parts)}."
    return f"{text} {explained}"


def _clear(price: Price) -> bool:
    return abs(price.pays.value) >= NAMED and _excludes_zero(price)


def _excludes_zero(price: Price) -> bool:
    low, high = price.pays.low, price.pays.high
    return low is not None and high is not None and (low > 0 or high < 0)


def _label(price: Price) -> str:
    return FEATURES.get(price.feature).label


def _moves(price: Price) -> str:
    return f"{'rises' if price.pays.value > 0 else 'falls'} by {short(abs(price.pays.value))}"


def pays_tables(found: Findings, *, most: int | None = None) -> list[Table]:
    """Return a table with a column for each file, or for several models one for each file.

    Args:
        most: number of features to show, those that are paid most for first.
    """
    return [_table(title, columns, most) for title, columns in _grouped(found.pays)]


def _grouped(entries: Sequence[Pays]) -> list[tuple[str, Columns]]:
    """Return titles and columns: the files of one model, or the models of each file."""
    if not entries:
        return []
    if len({entry.model for entry in entries}) == 1:
        return [(TITLE, [(entry.name, entry) for entry in entries])]
    names = dict.fromkeys(entry.name for entry in entries)
    return [
        (
            f"{TITLE}: {name}",
            [(entry.model, entry) for entry in entries if entry.name == name],
        )
        for name in names
    ]


def _table(title: str, columns: Columns, most: int | None) -> Table:
    headings, cells = [], []
    for name, entry in columns:
        by_name = {price.feature: price for price in entry.prices}
        headings.append(name)
        cells.append({key: _signed(price.pays) for key, price in by_name.items()})
        if entry.against is not None:
            headings.append(f"{name} less {entry.against}")
            cells.append({key: _signed(price.change) for key, price in by_name.items()})
    rows = [
        (FEATURES.get(key).label.capitalize(), *(column.get(key, NONE) for column in cells))
        for key in _by_size(columns)[:most]
    ]
    explained = []
    for _, entry in columns:
        explained += [f"{100 * entry.explained:.0f} %"] + [NONE] * (entry.against is not None)
    rows.append(("Explained by all features", *explained))
    return Table(
        title,
        ("One standard deviation more …", *headings),
        tuple(rows),
        "Change of the reward, in its standard deviations, if a response has one standard "
        "deviation more of the feature and as much of all others; both within prompts, on the "
        "same file. Least squares; brackets: 95 % intervals, clustered by prompt. "
        f"“{NONE}”: the feature hardly varies. {CAUTION}",
    )


def _signed(found: Measured | None) -> str:
    """Format `+0.31 [0.25, 0.37]`."""
    if found is None or found.low is None or found.high is None:
        return NONE
    ends = f"[{fixed_point(found.low)}, {fixed_point(found.high)}]"
    return f"{fixed_point(found.value, sign=True)} {ends}"


def _by_size(columns: Columns) -> list[str]:
    """Return the names of the features, those that are paid most for (or against) first."""
    size: dict[str, float] = {}
    for _, entry in columns:
        for price in entry.prices:
            size[price.feature] = max(size.get(price.feature, 0.0), abs(price.pays.value))
    return sorted(size, key=lambda name: -size[name])


def pays_pictures(found: Findings) -> list[Picture]:
    """Return one picture for each table."""
    pictures = []
    for title, columns in _grouped(found.pays):
        caption = (
            "Change of the reward by one standard deviation more of a feature, in standard "
            "deviations of the rewards. Lines: 95 % intervals."
        )
        if len(columns) > _MOST_SERIES:
            caption += f" The first {_MOST_SERIES} of {len(columns)} are drawn."
        columns = columns[:_MOST_SERIES]
        names = _by_size(columns)
        image = image_of(pays_figure(columns, names), title, caption)
        pictures.append(Picture(title.replace(TITLE, "The largest prices"), (image,), caption))
    return pictures


def feature_meanings() -> list[tuple[str, str]]:
    """Return what every feature measures, for the page's notes."""
    return [(FEATURES.get(name).label, FEATURES.get(name).meaning) for name in FEATURES.names()]
