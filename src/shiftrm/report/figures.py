"""Figures of a run's records.

Every `*_figure` function returns None if its numbers were not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shiftrm.measure.diagnosis.thresholds import INFLUENCE_FLOOR
from shiftrm.metrics import metric as declared
from shiftrm.report.analysis import normalised_differences
from shiftrm.report.measurements import SeedEstimate
from shiftrm.report.plots import (
    GREY,
    Curve,
    LineStyle,
    columns_of,
    draw_histogram,
    draw_legend,
    draw_seeds,
    new_axes,
    plain_label,
)
from shiftrm.report.results import SFT, Results
from shiftrm.report.win_tables import contest

_DOTS_PER_ROUND = 12


def _entry(m: Results, arm: str) -> tuple[Line2D, str]:
    style = m.arms[arm]
    handle = Line2D([], [], color=style.colour, marker=style.marker, markersize=6)
    return handle, style.short


# -- by training step --------------------------------------------------------------------------


def variance_figure(m: Results, arm: str | None) -> Figure | None:
    """Plot the variance of reward differences by policy step of an arm (the paper's Figure 1)."""
    metric = "difference_variance"
    curves, starts = ({}, {}) if arm is None else _all_rounds(m, "ppo", arm, metric)
    if arm is None or not curves:
        return None
    title = declared(metric).label
    figure, axes = new_axes("policy training step (all rounds)", "variance", title)
    draw_seeds(axes, list(curves.values()), colour=m.arms[arm].colour)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))  # for the text of the first round
    for round_, start in starts.items():
        if start:
            axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(
            start, 1.0, f" round {round_}", transform=axes.get_xaxis_transform(), va="top",
            color=GREY, fontsize=9,
        )  # fmt: skip
    return figure


def _all_rounds(
    m: Results, stage: str, arm: str, metric: str
) -> tuple[dict[int, Curve], dict[int, float]]:
    """Return each seed's curve with one round behind the other, and the step each begins at."""
    by_seed: dict[int, Curve] = {}
    starts: dict[int, float] = {}
    offset = 0.0
    for round_ in m.rounds(arm, stage, metric):
        starts[round_] = offset
        curves = m.curve(stage, arm, round_, metric)
        for seed, points in curves.items():
            start = starts[round_]
            by_seed.setdefault(seed, []).extend((start + step, value) for step, value in points)
        offset += max((points[-1][0] for points in curves.values()), default=0)
    return by_seed, starts


def meta_figure(m: Results, metric: str) -> Figure | None:
    """Plot a metric of the meta step by training step, for every arm that takes meta steps."""
    found = {arm: _all_rounds(m, "reward_model", arm, metric)[0] for arm in m.adapted}
    found = {arm: curves for arm, curves in found.items() if curves}
    if not found:
        return None
    label = declared(metric).label
    figure, axes = new_axes("training step (all rounds)", label, "While the reward model trains")
    if metric == "meta_influence":
        axes.set_yscale("symlog", linthresh=INFLUENCE_FLOOR)
    for arm, curves in found.items():
        draw_seeds(axes, list(curves.values()), colour=m.arms[arm].colour)
    draw_legend(figure, [_entry(m, arm) for arm in found])
    return figure


def accuracy_curve_figure(m: Results, arm: str) -> Figure | None:
    """Plot held-out accuracy in training: the first reward model, plain retraining and an arm.

    This is the paper's Figure 4. A diamond marks the parameters that were deployed.
    """
    rounds = m.rounds(arm, "reward_model", "eval_accuracy")
    if not rounds:
        return None
    lines: list[tuple[str, int, str, str, LineStyle]] = [(SFT, 0, "vanilla", "#000000", "--")]
    plain = m.retrained
    if plain is not None and plain != arm:
        for r in m.rounds(plain, "reward_model", "eval_accuracy")[-1:]:
            lines.append((plain, r, f"retrained, round {r}", m.arms[plain].colour, "--"))
    for i, r in enumerate(rounds):
        white = 0.55 * (len(rounds) - 1 - i) / max(1, len(rounds) - 1)
        lines.append((arm, r, f"round {r}", _blend(m.arms[arm].colour, white), "-"))
    title = plain_label(f"Held-out accuracy: {m.short(arm)}", 48)
    figure, axes = new_axes("training step", "accuracy", title)
    entries = []
    for method, round_, label, colour, style in lines:
        curves = list(m.curve("reward_model", method, round_, "eval_accuracy").values())
        if not curves:
            continue
        draw_seeds(axes, curves, colour=colour, linestyle=style)
        deployed = deployed_accuracy(m, method, round_)
        marker = "D" if deployed is not None else ""
        if deployed is not None:
            at = max(points[-1][0] for points in curves), deployed.mean
            look = {"color": colour, "markeredgecolor": "white", "markersize": 8}
            axes.plot(*([x] for x in at), marker, **look)  # type: ignore[arg-type]
        handle = Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=5)
        entries.append((handle, label))
    axes.set_ylim(*_training_range(m))
    draw_legend(figure, entries)
    return figure


def deployed_accuracy(m: Results, arm: str, round_: int) -> SeedEstimate | None:
    """Return the held-out accuracy of the reward model that a round deployed."""
    final = m.estimate("reward_model", arm, round_, "eval_accuracy_final")
    return final or m.estimate("evaluate", arm, round_, "accuracy_heldout")


def _training_range(m: Results) -> tuple[float, float]:
    """Return one range for the pictures of all arms."""
    values: list[float] = []
    for arm in m.arms:
        for round_ in m.rounds(arm, "reward_model", "eval_accuracy"):
            for points in m.curve("reward_model", arm, round_, "eval_accuracy").values():
                values += [value for _, value in points]
            values += m.final("reward_model", arm, round_, "eval_accuracy_final").values()
    return _range(values, 0.005)


def _range(values: Sequence[float], least: float) -> tuple[float, float]:
    margin = 0.05 * (max(values) - min(values)) + least
    return min(values) - margin, max(values) + margin


def _blend(colour: str, white: float) -> str:
    """Mix a colour with white: 0 keeps the colour, 1 gives white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


# -- distributions -----------------------------------------------------------------------------


def _histograms(
    labels: tuple[str, str],
    series: Sequence[tuple[list[float], str, str]],
    bins: np.ndarray,
    lines: Sequence[LineStyle],
) -> Figure:
    """Plot shares of pairs per bin of (values, colour, name); `labels`: x axis and title."""
    figure, axes = new_axes(labels[0], "share of pairs", labels[1])
    entries = []
    for i, (values, colour, name) in enumerate(series):
        line = lines[i % len(lines)]
        draw_histogram(axes, values, bins, colour, line)
        entries.append((Line2D([], [], color=colour, linestyle=line, linewidth=2), name))
    draw_legend(figure, entries, columns=2)
    return figure


def distribution_figure(m: Results, arm: str | None) -> Figure | None:
    """Plot `|r_i - r_j|` of an arm's reward model on samples of SFT and of the latest policy."""
    rounds = [] if arm is None else m.rounds(arm, "evaluate", "difference_values_after")
    if arm is None or not rounds:
        return None
    latest, first = (
        m.pooled(arm, rounds[-1], f"difference_values_{when}") for when in ("after", "sft")
    )
    if not latest or not first:
        return None
    sft = m.arms[SFT].colour if SFT in m.arms else GREY
    series = [
        (first, sft, "initial policy (SFT)"),
        (latest, m.arms[arm].colour, f"policy after round {rounds[-1]}"),
    ]
    labels = "$|r_i - r_j|$", plain_label(f"Reward differences: {m.short(arm)}", 60)
    return _histograms(labels, series, np.linspace(0, max(first + latest) or 1.0, 25), ("-",))


def normalised(m: Results) -> dict[str, tuple[int, list[float]]]:
    """Return the last round and its normalised differences, by arm with reward models."""
    found = {}
    for arm in m.with_rewards:
        rounds = m.rounds(arm, "evaluate", "difference_values_before")
        if rounds:
            found[arm] = rounds[-1], normalised_differences(m, arm, rounds[-1])
    return {arm: (last, values) for arm, (last, values) in found.items() if values}


def normalised_figure(m: Results) -> Figure | None:
    """Plot normalised reward differences of all arms with reward models (Figure 5)."""
    found = normalised(m)
    if not found:
        return None
    ends = {last for last, _ in found.values()}
    series = [
        (values, m.arms[arm].colour, m.short(arm) + (f", round {last}" if len(ends) > 1 else ""))
        for arm, (last, values) in found.items()
    ]
    which = f", round {ends.pop()}" if len(ends) == 1 else ""
    labels = "normalised $|r_i - r_j|$", f"Normalised differences{which}"
    return _histograms(labels, series, np.linspace(0, 1, 26), ("-", "--", "-.", ":"))


# -- by round ----------------------------------------------------------------------------------

_Bars = Callable[[str, int], tuple[float, float] | None]


def by_round_figure(
    m: Results,
    metric: str,
    arms: Sequence[str],
    labels: tuple[str, str],
    *,
    line: float | None = None,
    start: float | None = None,
    bars: _Bars = lambda arm, round_: None,
) -> Figure | None:
    """Plot a metric of the evaluations by round, for every arm that has it.

    Args:
        labels: of the y axis, and the title.
        line: the height of a dotted line.
        start: the value of round 0, from which lines are drawn.
        bars: returns the interval of an arm in a round.
    """
    found = [arm for arm in arms if m.rounds(arm, "evaluate", metric)]
    if not found:
        return None
    figure, axes = new_axes("round", *labels)
    if line is not None:
        axes.axhline(line, color=GREY, linewidth=1, linestyle=":")
    scale = 100 if labels[0].startswith("%") else 1
    for i, arm in enumerate(found):
        style = m.arms[arm]
        shift = 0.04 * (i - (len(found) - 1) / 2)  # keeps arms with equal values visible
        means: Curve = [] if start is None else [(shift, start)]
        for round_, value in m.course(arm, metric):
            x, y = round_ + shift, scale * value.mean
            means.append((x, y))
            seeds = list(m.final("evaluate", arm, round_, metric).values())
            if len(seeds) > 1:
                points = [scale * value for value in seeds]
                axes.plot([x] * len(seeds), points, ".", color=style.colour, alpha=0.4)
            if (bounds := bars(arm, round_)) is not None:
                low, high = (scale * end for end in bounds)
                axes.errorbar(
                    [x], [y], [[max(0, y - low)], [max(0, high - y)]], color=style.colour,
                    capsize=3, linewidth=1, alpha=0.7,
                )  # fmt: skip
        axes.plot(*columns_of(means), color=style.colour, marker=style.marker, markersize=7)
    rounds = [*([] if start is None else [0]), *m.all_rounds]
    axes.set_xticks(rounds)
    axes.set_xlim(min(rounds) - 0.4, max(rounds) + 0.4)  # arms of a single round stand together
    draw_legend(figure, [_entry(m, arm) for arm in found])
    return figure


def variance_by_round_figure(m: Results) -> Figure | None:
    """Plot the variance of reward differences after every round, relative to SFT responses."""
    labels = "relative to SFT", "Variance after every round"
    metric = "relative_difference_variance_after"
    figure = by_round_figure(m, metric, m.with_rewards, labels, line=1, start=1)
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def win_figure(m: Results, outcome: Literal["win", "lose"]) -> Figure | None:
    """Plot the share of wins (or losses) against SFT by round; wins have intervals."""

    def bars(arm: str, round_: int) -> tuple[float, float] | None:
        found = contest(m, "evaluate", arm, [round_]) if outcome == "win" else None
        return found.bounds if found else None

    metric = f"{outcome}_vs_sft"
    labels = "% of prompts", f"{declared(metric).label} against SFT"
    figure = by_round_figure(m, metric, m.trained, labels, bars=bars)
    if figure is not None:
        figure.axes[0].set_ylim(0, 100)
    return figure


def policy_accuracy_figure(m: Results, when: Literal["before", "after"]) -> Figure | None:
    """Plot accuracy on the policy's own pairs by round, for every arm."""
    labels = "accuracy", f"On the policy's own pairs, {when} the round"
    figure = by_round_figure(m, f"accuracy_policy_{when}", m.with_rewards, labels, line=0.5)
    if figure is not None:  # one range for both pictures
        values = [
            value.mean
            for arm in m.with_rewards
            for end in ("before", "after")
            for _, value in m.course(arm, f"accuracy_policy_{end}")
        ]
        figure.axes[0].set_ylim(*_range([0.5, *values], 0.01))
    return figure


# -- against KL --------------------------------------------------------------------------------


def kl_figure(m: Results, what: Literal["gold", "proxy"]) -> Figure | None:
    """Plot gold or proxy against KL: dots along PPO, numbered markers at the ends of rounds."""
    final = "gold_mean" if what == "gold" else "proxy_mean_standardised"
    step = "gold_mean" if what == "gold" else "standardised_mean"
    label = declared(final).label
    figure, axes = new_axes(declared("kl").label, label, f"{what.capitalize()} against KL")
    entries = []
    for arm in m.arms:
        style = m.arms[arm]
        if style.is_gold and what == "proxy":
            continue
        dots, ends = _policy_dots(m, arm, step), _round_ends(m, arm, final)
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
        entries.append(_entry(m, arm))
    if not entries:
        return None
    draw_legend(figure, entries)
    return figure


def _policy_dots(m: Results, arm: str, metric: str) -> Curve:
    """Return (KL, value) along policy training, averaged over blocks of steps."""
    dots: Curve = []
    for round_ in m.rounds(arm, "ppo", metric):
        kls = m.curve("ppo", arm, round_, "sequence_kl")
        for seed, points in m.curve("ppo", arm, round_, metric).items():
            kl = dict(kls.get(seed, []))
            both = np.array([(kl[step], value) for step, value in points if step in kl])
            for block in np.array_split(both, min(_DOTS_PER_ROUND, len(both))) if len(both) else []:
                dots.append((float(block[:, 0].mean()), float(block[:, 1].mean())))
    return dots


def _round_ends(m: Results, arm: str, metric: str) -> list[tuple[int, float, float]]:
    """Return (round, KL, value) at the end of every round, means over the seeds."""
    ends = []
    for round_, value in m.course(arm, metric):
        kl = m.mean(arm, round_, "kl")
        if kl is None and arm == SFT:
            kl = 0.0  # the reference
        if kl is not None:
            ends.append((round_, kl, value.mean))
    return ends
