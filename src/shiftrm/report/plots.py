"""Parts of Matplotlib figures, rendered to PNG or SVG: deterministic, without pyplot's state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH, HEIGHT = 5.2, 3.7  # inches: one column at 1280 px, legible down to 390 px
GREY = "#666666"

Curve = list[tuple[float, float]]
LineStyle = Literal["-", "--", "-.", ":"]


def render(figure: Figure, *, format: Literal["svg", "png"] = "svg") -> bytes:
    """Return the picture's bytes. They depend only on the figure (no date, fixed ids)."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "shiftrm"}):
        # The font may lack the script of an arm's name: show boxes in the legend.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=format, metadata=metadata, dpi=150)
    return buffer.getvalue()


def plain_label(text: str, limit: int = 28) -> str:
    """Return a label that matplotlib prints literally, without control characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    shown = shown.replace("$", r"\$")  # `$` would start mathtext
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels with a `_`


def new_axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def draw_legend(figure: Figure, entries: Sequence[tuple[Line2D, str]], columns: int = 3) -> None:
    figure.legend(
        [handle for handle, _ in entries],
        [plain_label(label) for _, label in entries],
        loc="outside lower center",
        ncols=min(columns, max(1, len(entries))),
        frameon=False,
        fontsize=9.5,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over the seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in common]


def draw_seeds(
    axes: Axes, curves: Sequence[Curve], *, colour: str, linestyle: LineStyle = "-"
) -> None:
    """Draw the mean as a thick line and, if there are several seeds, each as a thin line.

    A single point, of which there is no line, gets a dot.
    """
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*columns_of(curve), color=colour, linewidth=0.6, alpha=0.4)
    mean = columns_of(_mean_curve(curves))
    dot = "o" if len(mean[0]) == 1 else ""
    axes.plot(*mean, color=colour, linewidth=1.8, linestyle=linestyle, marker=dot, markersize=4)


def columns_of(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def draw_histogram(
    axes: Axes, values: list[float], bins: np.ndarray, colour: str, linestyle: LineStyle = "-"
) -> None:
    """Draw shares of pairs per bin as an outline; solid lines get a light fill."""
    weights = np.full(len(values), 1 / len(values))
    if linestyle == "-":
        axes.hist(values, bins=bins.tolist(), weights=weights, color=colour, alpha=0.15)
    axes.hist(
        values, bins=bins.tolist(), weights=weights, histtype="step", color=colour, linewidth=1.6,
        linestyle=linestyle,
    )  # fmt: skip
