"""Records of runs over the gold world's domains -> the figures of the OODPL paper, and one more.

Figure 3: training loss and A_PL over the outer steps, and A_PL on each held-out domain. Figure 4:
gold reward of every method in every held-out domain. Figure 5: the effect of beta. And the gradient
norm against the outer steps for several beta, for the convergence claim. Several seeds are drawn
as their mean with 95 % t-intervals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shiftrm.metrics import metric as declared
from shiftrm.records import Record
from shiftrm.report.domain_records import (
    LABELS,
    betas_of,
    mean_over_domains,
    methods_of,
    targets_of,
    values,
)
from shiftrm.report.measurements import SeedEstimate, estimate

__all__ = ["all_figures"]

_COLOURS = (
    "#999999", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#004466", "#8B2500",
    "#005540", "#7FC8EE", "#EE9966", "#66CCAA",
)  # fmt: skip
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")


def all_figures(records: Sequence[Record], beta: float) -> dict[str, tuple[str, Figure]]:
    """Return (caption, figure) by name.

    Args:
        beta: that of the run's own meta-training.
    """
    return {
        "gold": ("Gold in domains without labels, by domain and method.", gold_figure(records)),
        "training": (
            "Outer loss and A_PL over the outer steps; dotted: the reference policy.",
            training_figure(records, beta),
        ),
        "beta": ("Gold, A_PL and KL of reward-weighted fine-tuning.", beta_figure(records)),
        "gradient-norm": (
            "Norm of the hypergradient over the outer steps, for each beta.",
            gradient_norm_figure(records),
        ),
    }


def training_figure(records: Sequence[Record], beta: float) -> Figure:
    """Loss, A_PL on the query pairs, and A_PL on each target after adapting to it (Figure 3)."""
    method = f"beta_{beta:g}"
    figure, axes = _row(3)
    for ax, metric, label in (
        (axes[0], "loss", "outer loss"),
        (axes[1], "accuracy", "A_PL, source pairs"),
    ):
        _draw(ax, _curve(records, "meta", method, metric), "#0072B2")
        ax.set_ylabel(label)
    for colour, target in zip(_LINES, targets_of(records), strict=False):
        _draw(axes[2], _curve(records, "meta", method, f"eval_{target}_accuracy"), colour, target)
        before = estimate(values(records, "meta", method, f"eval_{target}_reference_accuracy", 0))
        if before is not None:
            axes[2].axhline(before.mean, color=colour, linewidth=0.8, linestyle=":")
    axes[2].set_ylabel("A_PL, held-out domains")
    axes[2].legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.set_xlabel("outer step")
    axes[0].set_title(f"Meta-training (beta {beta:g}); dotted: the reference policy", **_TITLE)
    return figure


def gold_figure(records: Sequence[Record]) -> Figure:
    """Gold reward of every method in every target (Figure 4)."""
    methods, targets = methods_of(records), targets_of(records)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    ax = _plain(figure.add_subplot())
    width = 0.85 / max(1, len(methods))
    for i, method in enumerate(methods):
        found = [
            estimate(values(records, f"evaluate/{t}", method, "gold_mean")) for t in targets
        ] + [estimate(mean_over_domains(records, method, "gold_mean"))]
        x = np.arange(len(found)) + (i - (len(methods) - 1) / 2) * width
        shown = [(at, e) for at, e in zip(x, found, strict=True) if e is not None]
        ax.bar(
            [at for at, _ in shown],
            [e.mean for _, e in shown],
            width,
            yerr=[e.half_width or 0.0 for _, e in shown],
            color=_COLOURS[list(LABELS).index(method)],
            error_kw={"elinewidth": 0.8},
            label=LABELS[method],
        )
    ax.set_xticks(range(len(targets) + 1), [*targets, "mean"])
    ax.axhline(0, color="#333333", linewidth=0.8)
    ax.set_ylabel("gold reward")
    ax.set_title("Gold reward in domains that nobody labelled", **_TITLE)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def beta_figure(records: Sequence[Record]) -> Figure:
    """Gold, A_PL and KL of reward-weighted fine-tuning against beta (Figure 5)."""
    figure, axes = _row(3)
    betas = betas_of(records)
    names = {beta: f"oodpl_beta_{beta:g}" for beta in betas}
    accuracy = "accuracy_mean"
    for ax, metric, label in (
        (axes[0], "gold_mean", "gold reward"),
        (axes[1], accuracy, "A_PL (mean over tokens)"),
        (axes[2], "kl", "KL to the reference"),
    ):
        found = [
            (beta, e)
            for beta in betas
            if (e := estimate(mean_over_domains(records, names[beta], metric))) is not None
        ]
        _draw(ax, found, "#D55E00", "OODPL", marker="o")
        for method, colour in (("finetuned", "#56B4E9"), ("reference", "#999999")):
            level = estimate(mean_over_domains(records, method, metric))
            if level is not None:
                ax.axhline(level.mean, color=colour, linewidth=1, label=LABELS[method])
        if found:  # a logarithmic axis needs a value
            ax.set_xscale("log", base=2)
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.set_xlabel("beta")
        ax.set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_title("The effect of beta, mean over held-out domains", **_TITLE)
    return figure


def gradient_norm_figure(records: Sequence[Record]) -> Figure:
    """Norm of the hypergradient against outer steps, for each beta (the convergence claim)."""
    figure, axes = _row(2)
    for colour, beta in zip(_LINES, betas_of(records), strict=False):
        curve = _curve(records, "meta", f"beta_{beta:g}", "hypergradient_norm")
        _draw(axes[0], curve, colour, f"beta {beta:g}", band=False)
        smallest: list[tuple[float, SeedEstimate]] = []
        for step, point in curve:
            low = min(point.mean, smallest[-1][1].mean) if smallest else point.mean
            smallest.append((step, SeedEstimate(low, None, point.count)))
        _draw(axes[1], smallest, colour, f"beta {beta:g}", band=False)
    for ax, label in zip(axes, ("norm of the hypergradient", "smallest so far"), strict=True):
        if ax.lines:
            ax.set_yscale("log")
        ax.set_xlabel("outer step")
        ax.set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_title("Gradient norm in meta-training", **_TITLE)
    return figure


_TITLE: Any = {"fontsize": 11, "loc": "left"}


def _curve(
    records: Sequence[Record], stage: str, method: str, metric: str
) -> list[tuple[float, SeedEstimate]]:
    declared(metric)
    by_step: dict[int, dict[int, float]] = {}
    for r in records:
        if (r.stage, r.method, r.metric) == (stage, method, metric) and r.step is not None:
            by_step.setdefault(r.step, {})[r.seed] = float(r.value)  # type: ignore[arg-type]
    points = ((step, estimate(found)) for step, found in sorted(by_step.items()))
    return [(float(step), point) for step, point in points if point is not None]


def _draw(
    ax: Axes,
    curve: Sequence[tuple[float, SeedEstimate]],
    colour: str,
    label: str | None = None,
    *,
    marker: str = "",
    band: bool = True,
) -> None:
    x = [at for at, _ in curve]
    ax.plot(x, [e.mean for _, e in curve], color=colour, label=label, marker=marker, linewidth=1.6)
    if band and any(e.half_width for _, e in curve):
        low, high = [e.low for _, e in curve], [e.high for _, e in curve]
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _row(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * columns, 3.2), layout="constrained")
    return figure, [_plain(figure.add_subplot(1, columns, i + 1)) for i in range(columns)]


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes
