"""Pictures of a recipe's page with captions, and figures that the demo's page lacks.

Every `*_figure` function returns None if its numbers were not measured.
"""

from __future__ import annotations

import statistics
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shiftrm.report import plots
from shiftrm.report.analysis import kl_below_zero, normalised_differences
from shiftrm.report.arms import SFT
from shiftrm.report.captions import MISSING
from shiftrm.report.measurements import Estimate, Measurements
from shiftrm.report.page import Image, Picture, image_of
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.recipe_tables import all_rounds, win_bounds
from shiftrm.report.tables import fixed_point

__all__ = ["recipe_pictures", "variance_by_round_figure", "win_figure"]


def recipe_pictures(m: Measurements, arms: Arms) -> list[Picture]:
    """Return all pictures of the page, in order."""
    return [
        _variance(m, arms),
        _wins(m, arms),
        _accuracy(m, arms),
        _normalised(m, arms),
        _against_kl(m, arms),
    ]


# -- Figure 1 --------------------------------------------------------------------------------------


def variance_by_round_figure(m: Measurements, arms: Arms) -> Figure | None:
    """Plot the variance of reward differences after every round, relative to SFT responses."""
    metric = "relative_difference_variance_after"
    found = [arm for arm in arms.with_reward_model if m.rounds(arm, "evaluate", metric)]
    if not found:
        return None
    figure, axes = plots.new_axes("round", "relative to SFT", "Variance after every round")
    axes.axhline(1, color="#666666", linewidth=1, linestyle=":")
    entries = []
    for i, arm in enumerate(found):
        style = arms.styles[arm]
        shift = 0.03 * (i - (len(found) - 1) / 2)  # keeps equal arms visible
        curves: dict[int, plots.Curve] = {}
        for round_ in m.rounds(arm, "evaluate", metric):
            for seed, value in m.final("evaluate", arm, round_, metric).items():
                curves.setdefault(seed, [(0 + shift, 1.0)]).append((round_ + shift, value))
        plots.draw_seeds(axes, list(curves.values()), colour=style.colour)
        means = [(float(r + shift), e.mean) for r, e in _course(m, arm, metric)]
        axes.plot(*plots.columns_of(means), style.marker, color=style.colour, markersize=7)
        entries.append(_entry(arms, arm))
    axes.set_xticks([0, *all_rounds(m, arms)])
    axes.set_ylim(bottom=0)
    plots.draw_legend(figure, entries)
    return figure


def _course(m: Measurements, arm: str, metric: str) -> list[tuple[int, Estimate]]:
    """Return (round, estimate) of an arm, in order."""
    found = [(r, m.estimate("evaluate", arm, r, metric)) for r in m.rounds(arm, "evaluate", metric)]
    return [(r, value) for r, value in found if value is not None]


def _entry(arms: Arms, arm: str) -> tuple[Line2D, str]:
    style = arms.styles[arm]
    return Line2D([], [], color=style.colour, marker=style.marker, markersize=6), style.short


def _variance(m: Measurements, arms: Arms) -> Picture:
    arm = arms.vanilla or next(iter(arms.with_reward_model), None)
    caption = MISSING
    by_step = distribution = None
    if arm is not None:
        style = arms.styles[arm]
        by_step = plots.variance_figure(m, arm, style=style, steps="policy training step")
        distribution = plots.distribution_figure(
            m, arm, style=style, title=f"Reward differences: {style.short}"
        )
    parts = []
    for name in arms.with_reward_model:
        course = _course(m, name, "relative_difference_variance_after")
        if course:
            numbers = ", ".join(fixed_point(value.mean) for _, value in course)
            parts.append(f"{arms.name(name)} {numbers}")
    if parts:
        caption = (
            "Variance of the reward differences after each round, relative to SFT responses under "
            f"the same reward model (1 = as on SFT): {'; '.join(parts)}. Two responses to a prompt "
            "make a difference. Larger differences are not by themselves better judgement."
        )
    return Picture(
        "Reward differences while the policy moves (the paper's Figure 1)",
        (
            image_of(by_step, "Variance of reward differences by policy step", caption),
            image_of(variance_by_round_figure(m, arms), "Variance by round", caption),
            image_of(distribution, "Distribution of |r_i - r_j|, SFT and latest policy", caption),
        ),
        caption,
    )


# -- Figure 3 --------------------------------------------------------------------------------------


def win_figure(m: Measurements, arms: Arms, outcome: Literal["win", "lose"]) -> Figure | None:
    """Plot the share of wins (or losses) against SFT by round; wins have intervals."""
    metric = f"{outcome}_vs_sft"
    found = [arm for arm in arms.trained if m.rounds(arm, "evaluate", metric)]
    if not found:
        return None
    word = {"win": "Wins", "lose": "Losses"}[outcome]
    figure, axes = plots.new_axes("round", "% of prompts", f"{word} against SFT")
    entries = []
    for i, arm in enumerate(found):
        style = arms.styles[arm]
        shift = 0.05 * (i - (len(found) - 1) / 2)
        course = _course(m, arm, metric)
        points = [(r + shift, 100 * value.mean) for r, value in course]
        axes.plot(*plots.columns_of(points), color=style.colour, marker=style.marker, markersize=7)
        for (round_, _), (x, y) in zip(course, points, strict=True):
            bounds = win_bounds(m, "evaluate", arm, [round_], SFT) if outcome == "win" else None
            if bounds is not None:
                low, high = (100 * end for end in bounds)
                axes.errorbar(
                    [x], [y], [[max(0, y - low)], [max(0, high - y)]],
                    color=style.colour, capsize=3, linewidth=1, alpha=0.7,
                )  # fmt: skip
        entries.append(_entry(arms, arm))
    axes.set_xticks(all_rounds(m, arms))
    axes.set_ylim(0, 100)
    plots.draw_legend(figure, entries)
    return figure


def _wins(m: Measurements, arms: Arms) -> Picture:
    parts = []
    for arm in arms.trained:
        course = _course(m, arm, "win_vs_sft")
        if len(course) > 1:
            best = max(course, key=lambda entry: entry[1].mean)
            parts.append(f"{arms.name(arm)} in round {best[0]} ({100 * best[1].mean:.0f} %)")
    caption = "Not measured: there was no judge, or not one verdict of it could be read."
    if any(m.rounds(arm, "evaluate", "win_vs_sft") for arm in arms.trained):
        said = f"Wins most often: {'; '.join(parts)}. " if parts else ""
        bars = "over the seeds" if len(m.seeds) > 1 else "over the prompts"
        caption = f"{said}Bars, where recorded: 95 % intervals of the wins {bars}."
    return Picture(
        "Wins against SFT over the rounds (Figure 3)",
        (
            image_of(win_figure(m, arms, "win"), "Wins against SFT by round", caption),
            image_of(win_figure(m, arms, "lose"), "Losses against SFT by round", caption),
        ),
        caption,
    )


# -- Figures 4 and 5, KL ---------------------------------------------------------------------------


def _accuracy(m: Measurements, arms: Arms) -> Picture:
    retrained = [arm for arm, kind in arms.kinds.items() if kind == "retrained"]
    shown = arms.adapted or retrained
    parts = []
    vanilla = m.sft("accuracy_heldout")
    if vanilla is not None:
        parts.append(f"the first reward model reaches {fixed_point(vanilla.mean, 3)}")
    for arm in [*retrained, *arms.adapted]:
        course = _course(m, arm, "accuracy_heldout")
        if course:
            numbers = ", ".join(fixed_point(value.mean, 3) for _, value in course)
            parts.append(f"{arms.name(arm)} {numbers} (rounds in order)")
    caption = MISSING
    if parts:
        caption = (
            f"On the held-out pairs {'; '.join(parts)}. Lines: while training; diamonds: the "
            "parameters that were deployed. Vanilla: the reward model trained before the rounds."
        )
    images = tuple(
        image_of(
            plots.accuracy_curve_figure(
                m, arm, plain=next((r for r in retrained if r != arm), None), styles=arms.styles
            ),
            f"Held-out accuracy, {arms.name(arm)}",
            caption,
        )
        for arm in shown
    )
    return Picture(
        "Held-out accuracy while the reward model trains (Figure 4)",
        images or (Image("Held-out accuracy of an adapted reward model", None, ""),),
        caption,
    )


def _normalised(m: Measurements, arms: Arms) -> Picture:
    parts = []
    for arm in arms.with_reward_model:
        last = m.last_round(arm, "difference_values_before")
        values = [] if last is None else normalised_differences(m, arm, last)
        if values:
            median = fixed_point(statistics.median(values))
            parts.append(f"{median} for {arms.name(arm)} (round {last})")
    caption = MISSING
    if parts:
        caption = (
            f"Median of the normalised differences: {'; '.join(parts)}. Each |r_i - r_j| on "
            "responses of the policy that the round began with is divided by the largest "
            "difference the same reward model gives on SFT and policy responses together; that "
            "maximum is one extreme value, so a longer tail alone can move a whole curve left."
        )
    figure = plots.normalised_figure(m, arms.with_reward_model, styles=arms.styles)
    return Picture(
        "Normalised reward differences, vanilla against MetaRM (Figure 5)",
        (image_of(figure, "Normalised reward differences", caption),),
        caption,
    )


def _against_kl(m: Measurements, arms: Arms) -> Picture:
    gold = any(m.rounds(arm, "evaluate", "gold_mean") for arm in arms.trained)
    proxy = [arm for arm in arms.trained if m.rounds(arm, "evaluate", "proxy_mean_standardised")]
    # Only our PPO, which also logs raw scores, logs rewards in the units of the ends.
    dotted = [arm for arm in proxy if m.rounds(arm, "ppo", "score_mean")]
    caption = MISSING
    if proxy:
        caption = (
            "Large markers: ends of rounds, numbered; dots: averages of a few policy steps, where "
            "the optimiser logs them in the same units. Each arm's proxy is its own reward "
            "model's, standardised on SFT responses: compare its course, not its height."
        )
        if gold:
            caption += " Gold is a second reward model, which trained nothing."
        caption = f"{caption} {kl_below_zero(m)}".strip()
    images = [
        image_of(
            plots.kl_figure(m, "proxy", proxy, styles=arms.styles, dotted=dotted),
            "Proxy against KL",
            caption,
        )
    ]
    if gold:
        figure = plots.kl_figure(m, "gold", list(arms.kinds), styles=arms.styles, dotted=())
        images.insert(0, image_of(figure, "Gold against KL", caption))
    else:
        images.append(
            Image("Gold against KL (no second reward model was given: evaluation.gold)", None, "")
        )
    return Picture("Proxy and gold against KL", tuple(images), caption)
