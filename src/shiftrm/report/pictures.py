"""The pictures of a run's page. A caption is made from the picture's numbers."""

from __future__ import annotations

import base64
import statistics
from dataclasses import dataclass

from matplotlib.figure import Figure

from shiftrm.report import figures, plots
from shiftrm.report.analysis import kl_below_zero, kl_spreads
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import fixed_point
from shiftrm.report.wording import listing

MISSING = "Not measured: the records hold no numbers for this picture."


@dataclass(frozen=True)
class Image:
    """A picture; `source` is a data URI, or None if nothing was measured."""

    title: str
    source: str | None
    alt: str


@dataclass(frozen=True)
class Picture:
    """Pictures side by side with one caption."""

    title: str
    images: tuple[Image, ...]
    caption: str


def image_of(figure: Figure | None, title: str, caption: str) -> Image:
    """Return a figure as a data URI, with its caption in the alternative text."""
    if figure is None:
        return Image(title, None, "")
    data = base64.b64encode(plots.render(figure)).decode("ascii")
    return Image(title, f"data:image/svg+xml;base64,{data}", f"{title}. {caption}")


def pictures(m: Results) -> list[Picture]:
    """Return the pictures of the page, in order."""
    found = [_variance(m), _wins(m), _held_out(m), _normalised(m), _against_kl(m)]
    if m.has("accuracy_policy_after"):
        found.append(_policy_accuracy(m))
    return [*found, *_meta_steps(m)]


def _picture(title: str, caption: str, *images: tuple[str, Figure | None]) -> Picture:
    return Picture(title, tuple(image_of(f, name, caption) for name, f in images), caption)


def _variance(m: Results) -> Picture:
    arm = m.vanilla or next(iter(m.with_rewards), None)
    parts = _variance_parts(m, arm) if arm else []
    caption = f"Under {m.name(arm)} {'; '.join(parts)}." if arm and parts else ""
    courses = []
    for name in m.with_rewards:
        course = m.course(name, "relative_difference_variance_after")
        if course:
            numbers = ", ".join(fixed_point(value.mean) for _, value in course)
            courses.append(f"{m.name(name)} {numbers}")
    if courses:
        caption += (
            " Variance of the reward differences after each round, relative to SFT responses under "
            f"the same reward model (1 = as on SFT): {'; '.join(courses)}. Two responses to a "
            "prompt make a difference. Larger differences are not by themselves better judgement."
        )
    return _picture(
        "Reward differences while the policy moves (the paper's Figure 1)",
        caption.strip() or MISSING,
        ("Variance of reward differences by policy step", figures.variance_figure(m, arm)),
        ("Variance by round", figures.variance_by_round_figure(m)),
        (
            "Distribution of |r_i - r_j|, SFT and latest policy",
            figures.distribution_figure(m, arm),
        ),
    )


def _variance_parts(m: Results, arm: str) -> list[str]:
    """Return the variance at start and end, and the medians of both distributions."""
    parts = []
    rounds = m.rounds(arm, "ppo", "difference_variance")
    if rounds:
        start = _tenth(m, arm, rounds[0], first=True)
        end = _tenth(m, arm, rounds[-1], first=False)
        verb = "falls" if end < start else "rises"
        change = f", to {100 * end / start:.0f} % of its start" if start > 0 else ""
        parts.append(
            f"the variance of the reward differences {verb} from {fixed_point(start, 3)} (mean of "
            f"the first tenth of the steps of round {rounds[0]}) to {fixed_point(end, 3)} (last "
            f"tenth of round {rounds[-1]}){change}"
        )
    for last in m.rounds(arm, "evaluate", "difference_values_after")[-1:]:
        sft, after = (m.pooled(arm, last, f"difference_values_{when}") for when in ("sft", "after"))
        if sft and after:
            parts.append(
                f"the median difference is {fixed_point(statistics.median(sft))} on SFT samples "
                f"and {fixed_point(statistics.median(after))} on the policy's after round {last}"
            )
    return parts


def _tenth(m: Results, arm: str, round_: int, *, first: bool) -> float:
    """Return the mean over the first or last tenth of a round's steps and over the seeds."""
    means = []
    for points in m.curve("ppo", arm, round_, "difference_variance").values():
        values = [value for _, value in points]
        count = max(1, len(values) // 10)
        means.append(statistics.fmean(values[:count] if first else values[-count:]))
    return statistics.fmean(means)


def _wins(m: Results) -> Picture:
    best = {}
    for arm in m.trained:
        course = m.course(arm, "win_vs_sft")
        if len(course) > 1:
            best[arm] = max(course, key=lambda entry: entry[1].mean)
    caption = "Not measured: there was no judge, or none of its verdicts could be read."
    if m.judged:
        rounds = {round_ for round_, _ in best.values()}
        parts = [
            f"{m.name(arm)} in round {round_} ({100 * found.mean:.0f} %)"
            for arm, (round_, found) in best.items()
        ]
        said = f"Wins most often: {'; '.join(parts)}. " if parts else ""
        if len(best) > 1 and len(rounds) == 1:
            said = f"Every arm wins most often in round {rounds.pop()}. {said}"
        bars = "over the seeds" if len(m.seeds) > 1 else "over the prompts"
        caption = f"{said}Bars, where recorded: 95 % intervals of the wins {bars}."
    return _picture(
        "Wins against SFT over the rounds (Figure 3)",
        caption,
        ("Wins against SFT by round", figures.win_figure(m, "win")),
        ("Losses against SFT by round", figures.win_figure(m, "lose")),
    )


def _held_out(m: Results) -> Picture:
    trains = [arm for arm in m.with_rewards if m.arms[arm].trains]
    shown = m.adapted or trains
    parts = []
    first = figures.deployed_accuracy(m, SFT, 0)
    if first is not None:
        parts.append(f"the first reward model reaches {fixed_point(first.mean, 3)}")
    for arm in trains:
        rounds = m.rounds(arm, "reward_model", "eval_accuracy")
        ends = [figures.deployed_accuracy(m, arm, r) for r in rounds or m.rounds(arm)]
        if ends and all(ends):
            numbers = ", ".join(fixed_point(end.mean, 3) for end in ends if end is not None)
            parts.append(f"{m.name(arm)} deploys {numbers} (rounds in order)")
    caption = MISSING
    if parts:
        caption = (
            f"On the held-out pairs {'; '.join(parts)}. Lines: while training; diamonds: the "
            "parameters that were deployed. Vanilla: the reward model trained before the rounds."
        )
    images = [
        (f"Held-out accuracy, {m.name(arm)}", figures.accuracy_curve_figure(m, arm))
        for arm in shown
    ] or [("Held-out accuracy of an adapted reward model", None)]
    title = "Held-out accuracy while the reward model trains (Figure 4)"
    return _picture(title, caption, *images)


def _normalised(m: Results) -> Picture:
    found = figures.normalised(m)
    parts = [
        f"{fixed_point(statistics.median(values))} for {m.name(arm)} (round {last})"
        for arm, (last, values) in found.items()
    ]
    caption = MISSING
    if parts:
        caption = (
            f"Median of the normalised differences: {'; '.join(parts)}. Each |r_i - r_j| on "
            "responses of the policy that the round began with is divided by the largest "
            "difference the same reward model gives on SFT and policy responses together; that "
            "maximum is one extreme value, so a longer tail alone can move a whole curve left."
        )
    return _picture(
        "Normalised reward differences, vanilla against MetaRM (Figure 5)",
        caption,
        ("Normalised reward differences", figures.normalised_figure(m)),
    )


def _against_kl(m: Results) -> Picture:
    gold = m.has("gold_mean")
    caption = MISSING
    if gold or m.has("proxy_mean_standardised"):
        caption = (
            f"{_gold_course(m)}Large markers: ends of rounds, numbered; dots: averages of a few "
            "policy steps, where the optimiser logs them in the same units. Each arm's proxy is "
            "its own reward model's, standardised on SFT responses: compare its course, not its "
            "height."
        )
        if gold and not m.gold_is_true:
            caption += " Gold is a second reward model, which trained nothing."
        caption = f"{caption} {kl_below_zero(m)}".strip()
    name = "Gold against KL"
    if not gold:
        name += " (no second reward model was given: evaluation.gold)"
    return _picture(
        "Gold and proxy against KL",
        caption,
        (name, figures.kl_figure(m, "gold")),
        ("Proxy against KL", figures.kl_figure(m, "proxy")),
    )


def _gold_course(m: Results) -> str:
    """Say which arm has the highest gold after the last round, at which KL, and which fell."""
    rounds = m.all_rounds
    golds = {arm: m.mean(arm, rounds[-1], "gold_mean") for arm in m.with_rewards if rounds}
    found = {arm: gold for arm, gold in golds.items() if gold is not None}
    if not found:
        return ""
    best, worst = max(found, key=lambda arm: found[arm]), min(found, key=lambda arm: found[arm])
    text = f"After round {rounds[-1]} gold is highest for {m.name(best)}"
    text += f" ({fixed_point(found[best])})"
    if worst != best:
        text += f" and lowest for {m.name(worst)} ({fixed_point(found[worst])})"
    for spread in kl_spreads(m)[-1:]:
        if spread.round == rounds[-1]:
            kls = fixed_point(spread.lowest_kl), fixed_point(spread.highest_kl)
            text += f", at KL {kls[0]}" if kls[0] == kls[1] else f", at KLs from {' to '.join(kls)}"
    falling = []
    for arm in m.with_rewards:
        means = [value.mean for _, value in m.course(arm, "gold_mean")]
        if means and means[-1] < max(means):
            falling.append(m.short(arm))
    if falling:
        text += f"; gold ends below its best round for {listing(falling)}"
    return f"{text}. "


def _policy_accuracy(m: Results) -> Picture:
    ends = {arm: m.last(arm, "accuracy_policy_after") for arm in m.with_rewards}
    found = {arm: end[1].mean for arm, end in ends.items() if end is not None}
    caption = MISSING
    if found:
        best, worst = max(found, key=lambda a: found[a]), min(found, key=lambda a: found[a])
        high, low = fixed_point(found[best], 3), fixed_point(found[worst], 3)
        if high == low:
            span = f"it is {high} for {'every arm' if len(found) > 1 else m.name(best)}"
        else:
            span = f"it runs from {high} for {m.name(best)} down to {low} for {m.name(worst)}"
        caption = (
            f"After policy training, in the last round, {span}; the dotted line is chance. What an "
            "adaptation gave is the step from a round's point in the second picture to the next "
            "round's in the first."
        )
    return _picture(
        "Accuracy on the policy's own pairs, by round",
        caption,
        ("Before the round's policy training", figures.policy_accuracy_figure(m, "before")),
        ("After it", figures.policy_accuracy_figure(m, "after")),
    )


def _meta_steps(m: Results) -> list[Picture]:
    """Return what the meta steps did while the reward models trained; none without such arms."""
    images = [
        (f"{what} by training step", figure)
        for what, metric in (
            ("Influence of the meta step", "meta_influence"),
            ("J before the meta step", "meta_objective"),
            ("J after the meta step", "meta_objective_after"),
        )
        if (figure := figures.meta_figure(m, metric)) is not None
    ]
    if not images:
        return []
    caption = (
        "The influence is how much the meta step changes the training gradient, relative to its "
        "length; J, which the step raises, is how far apart it puts the rewards of the policy's "
        "responses."
    )
    return [_picture("Meta steps while the reward model trains", caption, *images)]
