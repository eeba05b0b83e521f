"""Figures of scored files: reward differences, calibration, reward against length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shiftrm.core.discrimination import Floats
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, ScoredFile
from shiftrm.measure.diagnosis.pays import Pays
from shiftrm.measure.diagnosis.scored import differences, distinct
from shiftrm.measure.features import FEATURES
from shiftrm.report.plots import (
    GREY,
    LineStyle,
    draw_histogram,
    draw_legend,
    new_axes,
    plain_label,
)

# Okabe and Ito's palette; the line styles differ too.
_COLOURS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
_MOST_FEATURES = 10  # in a picture
_MANY_POINTS = 1000  # with more points, plot their density

Series = tuple[str, ScoredFile, Diagnosis]


def difference_figure(series: Sequence[Series], *, relative: bool) -> Figure | None:
    """Plot
    r_i - r_j
     of every file, in raw units or in that file's reward deviations."""
    values: list[tuple[str, Floats]] = []
    for name, file, diagnosis in series:
        found = [d for d in differences([distinct(g) for g in file.unlabelled]) if d.size]
        scale = diagnosis.spread.reward_std if relative else 1.0
        if found and scale > 0:
            values.append((name, np.concatenate(found) / scale))
    if not values:
        return None
    together = np.concatenate([v for _, v in values])
    top = float(np.quantile(together, 0.995)) or float(together.max()) or 1.0
    if relative:
        x, title = "$|r_i - r_j|$ / std of all rewards", "Relative to the file's own rewards"
    else:
        x, title = "$|r_i - r_j|$", "Reward differences"
    figure, axes = new_axes(x, "share of comparisons", title)
    entries = []
    for i, (name, v) in enumerate(values):
        colour, line = _COLOURS[i % len(_COLOURS)], _LINES[i % len(_LINES)]
        draw_histogram(axes, np.minimum(v, top).tolist(), np.linspace(0, top, 31), colour, line)
        entries.append((Line2D([], [], color=colour, linestyle=line, linewidth=2), name))
    draw_legend(figure, entries)
    return figure


def calibration_figure(series: Sequence[Series]) -> Figure | None:
    """Plot accuracy against stated probability; None without labels."""
    labelled = [(name, d.labels) for name, _, d in series if d.labels is not None]
    if not labelled:
        return None
    figure, axes = new_axes("stated probability", "share right", "Calibration on labelled pairs")
    axes.plot([0.5, 1], [0.5, 1], color="#666666", linewidth=1, linestyle=":")
    entries = []
    for i, (name, found) in enumerate(labelled):
        colour, line = _COLOURS[i % len(_COLOURS)], _LINES[i % len(_LINES)]
        stated, right, count = np.array(found.curve).T
        axes.plot(stated, right, color=colour, linestyle=line, linewidth=1.4)
        axes.scatter(stated, right, s=12 + 150 * count / count.sum(), color=colour, alpha=0.7)
        handle = Line2D([], [], color=colour, linestyle=line, marker="o", markersize=5)
        entries.append((handle, name))
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    draw_legend(figure, entries)
    return figure


def length_figure(name: str, file: ScoredFile) -> Figure:
    """Plot reward against length, both minus the means of the prompt."""
    centred = []
    for group in file.unlabelled:
        table = np.array([[r.length, r.reward] for r in distinct(group).responses])
        centred.append(table - table.mean(axis=0))
    length, reward = np.concatenate(centred).T
    figure, axes = new_axes(
        "length, tokens (prompt's mean = 0)", "reward (prompt's mean = 0)", plain_label(name, 48)
    )
    if length.size > _MANY_POINTS:
        cells = axes.hexbin(length, reward, gridsize=32, bins="log", mincnt=1, cmap="Blues")
        figure.colorbar(cells, ax=axes, label="responses")
    else:
        axes.plot(length, reward, "o", color="#0072B2", alpha=0.3, markersize=3.5)
    return figure


def pays_figure(columns: Sequence[tuple[str, Pays]], features: Sequence[str]) -> Figure:
    """Plot what is paid for each feature as horizontal bars, one for each file or model.

    Args:
        columns: names and prices.
        features: in order from the top; the first ten are drawn.
    """
    features = features[:_MOST_FEATURES]
    figure, axes = new_axes("standard deviations of the reward", "", "One std more …")
    axes.axvline(0, color=GREY, linewidth=1)
    axes.grid(visible=False, axis="y")
    height = 0.8 / len(columns)
    entries = []
    for i, (name, entry) in enumerate(columns):
        colour = _COLOURS[i % len(_COLOURS)]
        prices = {price.feature: price.pays for price in entry.prices}
        drawn = [(row, prices[key]) for row, key in enumerate(features) if key in prices]
        at = [row + (i - (len(columns) - 1) / 2) * height for row, _ in drawn]
        values = [pays.value for _, pays in drawn]
        axes.barh(at, values, height=0.85 * height, color=colour, alpha=0.75)
        for y, (_, pays) in zip(at, drawn, strict=True):
            if pays.low is not None and pays.high is not None:
                axes.plot([pays.low, pays.high], [y, y], color="black", linewidth=1)
        entries.append((Line2D([], [], color=colour, linewidth=6, alpha=0.75), name))
    axes.set_yticks(range(len(features)), [plain_label(FEATURES.get(k).label) for k in features])
    axes.set_ylim(len(features) - 0.5, -0.5)  # the first feature on top
    draw_legend(figure, entries)
    return figure
