"""Matplotlib figures of records, rendered to PNG or SVG. Deterministic, without pyplot's state.

Every `*_figure` function returns None if its numbers were not measured.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shiftrm.report.analysis import normalised_differences
from shiftrm.report.arms import DPO, FIXED, RETRAINED, SFT, ArmStyle, arm_styles, is_metarm
from shiftrm.report.measurements import Measurements

WIDTH, HEIGHT = 5.2, 3.7  # inches: one column at 1280 px, legible down to 390 px
_GREY = "#666666"
_DOTS_PER_ROUND = 12

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
    """Draw the mean as a thick line and, if there are several seeds, each as a thin line."""
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*columns_of(curve), color=colour, linewidth=0.6, alpha=0.4)
    axes.plot(*columns_of(_mean_curve(curves)), color=colour, linewidth=1.8, linestyle=linestyle)


def columns_of(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def variance_figure(
    m: Measurements, arm: str = FIXED, *, style: ArmStyle | None = None, steps: str = "PPO step"
) -> Figure | None:
    """Plot the variance of reward differences by PPO step of an arm (the paper's Figure 1)."""
    offset, borders = 0, []
    by_seed: dict[int, Curve] = {}
    for round_ in m.rounds(arm, "ppo", "difference_variance"):
        curves = m.curve("ppo", arm, round_, "difference_variance")
        for seed, points in curves.items():
            by_seed.setdefault(seed, []).extend((offset + step, value) for step, value in points)
        borders.append((round_, offset))
        offset += max((points[-1][0] for points in curves.values()), default=0)
    if not by_seed:
        return None
    style = style or arm_styles([arm])[arm]
    figure, axes = new_axes(f"{steps} (all rounds)", "variance", "Variance of reward differences")
    draw_seeds(axes, list(by_seed.values()), colour=style.colour)
    axes.set_ylim(bottom=0)
    for round_, start in borders:
        if start:
            axes.axvline(start, color=_GREY, linewidth=0.8, linestyle=":")
        axes.text(
            start, 1.0, f" round {round_}", transform=axes.get_xaxis_transform(), va="top",
            color=_GREY, fontsize=9,
        )  # fmt: skip
    return figure


def distribution_figure(
    m: Measurements,
    arm: str = FIXED,
    *,
    style: ArmStyle | None = None,
    title: str = "Reward differences of the fixed model",
) -> Figure | None:
    """Plot
    r_i - r_j
     of an arm's reward model, on SFT's and the latest policy's samples."""
    last = m.last_round(arm, "difference_values_after")
    if last is None:
        return None
    latest = _pool(m.values("evaluate", arm, last, "difference_values_after"))
    first = _pool(m.values("evaluate", arm, last, "difference_values_sft"))
    if not latest or not first:
        return None
    styles = arm_styles([SFT, arm])
    figure, axes = new_axes("$|r_i - r_j|$", "share of pairs", plain_label(title, 60))
    bins = np.linspace(0, max(first + latest) or 1.0, 25)
    entries = []
    for values, colour, label in (
        (first, styles[SFT].colour, "initial policy (SFT)"),
        (latest, (style or styles[arm]).colour, f"policy after round {last}"),
    ):
        draw_histogram(axes, values, bins, colour)
        entries.append((Line2D([], [], color=colour, linewidth=2), label))
    draw_legend(figure, entries)
    return figure


def _pool(by_seed: dict[int, list[float]]) -> list[float]:
    return [value for values in by_seed.values() for value in values]


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


def accuracy_curve_figure(
    m: Measurements,
    arm: str,
    *,
    plain: str | None = RETRAINED,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Figure | None:
    """Plot held-out accuracy in training: vanilla and the rounds of a MetaRM arm (Figure 4)."""
    rounds = m.rounds(arm, "reward_model", "eval_accuracy")
    if not rounds:
        return None
    styles = styles or arm_styles([*m.methods(), SFT, RETRAINED])
    title = plain_label(f"Held-out accuracy: {styles[arm].short}", 48)
    figure, axes = new_axes("training step", "accuracy", title)
    entries: list[tuple[Line2D, str]] = []
    retrained = m.rounds(plain, "reward_model", "eval_accuracy")[-1:] if plain else []
    for method, round_, label in [
        (SFT, 0, "vanilla"),
        *((plain or "", r, f"retrained, round {r}") for r in retrained),
    ]:
        colour = "#000000" if method == SFT else styles[method].colour
        _accuracy_line(m, axes, entries, (method, round_), label, colour, "--")
    for i, round_ in enumerate(rounds):
        shade = _blend(styles[arm].colour, 0.55 * (len(rounds) - 1 - i) / max(1, len(rounds) - 1))
        _accuracy_line(m, axes, entries, (arm, round_), f"round {round_}", shade, "-")
    axes.set_ylim(*_training_range(m))
    draw_legend(figure, entries)
    return figure


def _training_range(m: Measurements) -> tuple[float, float]:
    """Return one range for the pictures of all MetaRM arms."""
    values = [
        value
        for arm in [SFT, *m.policy_arms()]
        for round_ in m.rounds(arm, "reward_model", "eval_accuracy")
        for points in m.curve("reward_model", arm, round_, "eval_accuracy").values()
        for _, value in points
    ]
    for arm in [SFT, *m.policy_arms()]:
        for round_ in m.rounds(arm):
            values += m.final("reward_model", arm, round_, "eval_accuracy_final").values()
    margin = 0.05 * (max(values) - min(values)) + 0.005
    return min(values) - margin, max(values) + margin


def _accuracy_line(
    m: Measurements,
    axes: Axes,
    entries: list[tuple[Line2D, str]],
    key: tuple[str, int],
    label: str,
    colour: str,
    linestyle: LineStyle,
) -> None:
    """Draw the curve of one training, and a marker at the parameters that were deployed."""
    curves = m.curve("reward_model", *key, "eval_accuracy")
    if not curves:
        return
    floats = [[(float(step), value) for step, value in points] for points in curves.values()]
    draw_seeds(axes, floats, colour=colour, linestyle=linestyle)
    deployed = m.estimate("reward_model", *key, "eval_accuracy_final")
    if deployed is None:
        deployed = m.estimate("evaluate", *key, "accuracy_heldout")
    marker = "D" if deployed is not None else ""
    if deployed is not None:
        end = max(points[-1][0] for points in floats)
        axes.plot(
            [end], [deployed.mean], marker, color=colour, markeredgecolor="white", markersize=8
        )
    entries.append(
        (Line2D([], [], color=colour, linestyle=linestyle, marker=marker, markersize=5), label)
    )


def _blend(colour: str, white: float) -> str:
    """Mix a colour with white: 0 keeps the colour, 1 gives white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def normalised_figure(
    m: Measurements,
    arms: Sequence[str] | None = None,
    *,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Figure | None:
    """Plot normalised reward differences, vanilla (`retrained`) and MetaRM (Figure 5)."""
    if arms is None:
        arms = [arm for arm in m.policy_arms() if arm == RETRAINED or is_metarm(arm)]
    found: dict[str, tuple[int, list[float]]] = {}
    for arm in arms:
        last = m.last_round(arm, "difference_values_before")
        values = [] if last is None else normalised_differences(m, arm, last)
        if last is not None and values:
            found[arm] = last, values
    if not found:
        return None
    styles = styles or arm_styles(m.methods())
    figure, axes = new_axes("normalised $|r_i - r_j|$", "share of pairs", "Normalised differences")
    entries = []
    lines: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
    for i, (arm, (last, values)) in enumerate(found.items()):
        style, line = styles[arm], lines[i % len(lines)]
        draw_histogram(axes, values, np.linspace(0, 1, 26), style.colour, line)
        handle = Line2D([], [], color=style.colour, linestyle=line, linewidth=2)
        entries.append((handle, f"{style.short}, round {last}"))
    draw_legend(figure, entries, columns=2)
    return figure


def kl_figure(
    m: Measurements,
    what: Literal["gold", "proxy"],
    arms: Sequence[str] | None = None,
    *,
    styles: Mapping[str, ArmStyle] | None = None,
    dotted: Sequence[str] | None = None,
) -> Figure | None:
    """Plot gold or proxy against KL: dots along PPO, numbered markers at the ends of rounds.

    `dotted` are the arms that get dots (all by default): those whose values along PPO have the
    same units as at the ends.
    """
    final = "gold_mean" if what == "gold" else "proxy_mean_standardised"
    step = "gold_mean" if what == "gold" else "proxy_mean"
    if arms is None:
        extra = [arm for arm in (DPO, SFT) if arm in m.methods()] if what == "gold" else []
        arms = [*m.policy_arms(), *extra]
    styles = styles or arm_styles(m.methods())
    unit = "" if what == "gold" else " (standardised)"
    figure, axes = new_axes("KL to SFT", f"{what}{unit}", f"{what.capitalize()} against KL")
    entries = []
    for arm in arms:
        style = styles[arm]
        dots = _ppo_dots(m, arm, step) if dotted is None or arm in dotted else []
        ends = _round_ends(m, arm, final)
        if not dots and not ends:
            continue
        axes.plot(*columns_of(dots), ".", color=style.colour, markersize=3, alpha=0.35)
        points = [(kl, value) for _, kl, value in ends]
        axes.plot(
            *columns_of(points), color=style.colour, marker=style.marker, markersize=8,
            markeredgecolor="white", linewidth=1.2,
        )  # fmt: skip
        for round_, kl, value in ends if len(ends) > 1 else []:
            axes.annotate(
                str(round_), (kl, value), xytext=(5, 4), textcoords="offset points", fontsize=8,
                color=style.colour,
            )  # fmt: skip
        handle = Line2D([], [], color=style.colour, marker=style.marker, markersize=6)
        entries.append((handle, style.short))
    if not entries:
        return None
    draw_legend(figure, entries)
    return figure


def _ppo_dots(m: Measurements, arm: str, metric: str) -> Curve:
    """Return (KL, value) along PPO, averaged over blocks of steps."""
    dots: Curve = []
    for round_ in m.rounds(arm, "ppo", metric):
        kls = m.curve("ppo", arm, round_, "kl")
        for seed, points in m.curve("ppo", arm, round_, metric).items():
            kl = dict(kls.get(seed, []))
            both = np.array([(kl[step], value) for step, value in points if step in kl])
            for block in np.array_split(both, min(_DOTS_PER_ROUND, len(both))) if len(both) else []:
                dots.append((float(block[:, 0].mean()), float(block[:, 1].mean())))
    return dots


def _round_ends(m: Measurements, arm: str, metric: str) -> list[tuple[int, float, float]]:
    """Return (round, KL, value) at the end of every round, means over the seeds."""
    ends = []
    for round_ in m.rounds(arm, "evaluate", metric):
        kl = m.estimate("evaluate", arm, round_, "kl")
        value = m.estimate("evaluate", arm, round_, metric)
        if kl is None and arm == SFT and value is not None:
            ends.append((round_, 0.0, value.mean))  # the reference, whose KL is zero
        elif kl is not None and value is not None:
            ends.append((round_, kl.mean, value.mean))
    return ends


def policy_accuracy_figure(
    m: Measurements,
    when: Literal["before", "after"],
    *,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Figure | None:
    """Plot accuracy on the policy's own pairs by round, for every arm."""
    metric = f"accuracy_policy_{when}"
    arms = [arm for arm in m.policy_arms() if m.rounds(arm, "evaluate", metric)]
    if not arms:
        return None
    styles = styles or arm_styles(m.methods())
    figure, axes = new_axes("round", "accuracy", f"On the policy's own pairs, {when} PPO")
    axes.axhline(0.5, color=_GREY, linewidth=1, linestyle=":")
    entries = []
    for i, arm in enumerate(arms):
        style = styles[arm]
        shift = 0.04 * (i - (len(arms) - 1) / 2)  # keeps arms with equal values visible
        means: Curve = []
        for round_ in m.rounds(arm, "evaluate", metric):
            by_seed = m.final("evaluate", arm, round_, metric)
            means.append((round_ + shift, sum(by_seed.values()) / len(by_seed)))
            if len(by_seed) > 1:
                xs = [round_ + shift] * len(by_seed)
                axes.plot(xs, list(by_seed.values()), ".", color=style.colour, alpha=0.4)
        axes.plot(*columns_of(means), color=style.colour, marker=style.marker, markersize=7)
        handle = Line2D([], [], color=style.colour, marker=style.marker, markersize=6)
        entries.append((handle, style.short))
    axes.set_xticks(m.all_rounds())
    low, high = _accuracy_range(m, arms)
    axes.set_ylim(low, high)
    draw_legend(figure, entries)
    return figure


def _accuracy_range(m: Measurements, arms: list[str]) -> tuple[float, float]:
    """Return one range for both pictures."""
    values = [0.5]
    for arm in arms:
        for round_ in m.rounds(arm):
            for when in ("before", "after"):
                values += m.final("evaluate", arm, round_, f"accuracy_policy_{when}").values()
    margin = 0.05 * (max(values) - min(values)) + 0.01
    return min(values) - margin, max(values) + margin
