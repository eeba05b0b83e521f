"""Plot of best-of-n: proxy and gold against KL, as in Gao et al. 2023, Figure 1."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shiftrm.core.intervals import Measured
from shiftrm.measure.best_of_n import BestOfN, BestOfNCurve
from shiftrm.report.plots import draw_legend, new_axes

_PROXY, _GOLD = "#8a8a8a", "#b8860b"


def best_of_n_figure(curve: BestOfNCurve) -> Figure:
    """Plot both scores with their intervals, and a line at the peak of gold.

    Proxy and gold have different scales, so each has its own axis.
    """
    figure, left = new_axes("KL = log n - (n - 1) / n", "gold", "Best of n by proxy")
    right = left.twinx()
    right.set_ylabel("proxy")
    right.spines["top"].set_visible(False)
    kl = [point.kl for point in curve.points]
    entries = []
    for axes, colour, marker, label, values in (
        (right, _PROXY, "s", "proxy (right)", [point.proxy for point in curve.points]),
        (left, _GOLD, "o", "gold (left)", [point.gold for point in curve.points]),
    ):
        axes.plot(kl, [v.value for v in values], color=colour, marker=marker, markersize=4)
        low, high = _band(values)
        axes.fill_between(kl, low, high, color=colour, alpha=0.18, linewidth=0)
        entries.append((Line2D([], [], color=colour, marker=marker, markersize=5), label))
    peak = next(point for point in curve.points if point.n == curve.peak)
    left.axvline(peak.kl, color=_GOLD, linewidth=1, linestyle=":")
    entries.append((Line2D([], [], color=_GOLD, linestyle=":"), f"gold peaks, n = {peak.n}"))
    _mark_n(left, curve.points)
    draw_legend(figure, entries)
    return figure


def _band(values: Sequence[Measured]) -> tuple[list[float], list[float]]:
    low = [v.value if v.low is None else v.low for v in values]
    high = [v.value if v.high is None else v.high for v in values]
    return low, high


def _mark_n(axes: object, points: Sequence[BestOfN]) -> None:
    """Label the top axis with n, thinned out so that the numbers do not touch."""
    top = axes.secondary_xaxis("top")  # type: ignore[attr-defined]
    step = -(-len(points) // 8)
    shown = [*points[::step]]
    top.set_xticks([p.kl for p in shown], [str(p.n) for p in shown], fontsize=8)
    top.set_xlabel("n", fontsize=9)
