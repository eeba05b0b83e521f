"""Warnings about misleading numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from shiftrm.measure.diagnosis.thresholds import INFLUENCE_CEILING, INFLUENCE_FLOOR
from shiftrm.report.analysis import adaptations, influence, kl_spreads
from shiftrm.report.measurements import estimate
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import fixed_point
from shiftrm.report.wording import ONE_SEED, listing, rounds_text

TRUNCATED = 0.1  # warn from this share of truncated responses
LONGER = 1.3  # warn from this mean length, relative to SFT
UNJUDGED = 0.02
CONSISTENT = 0.7

_JUDGES = {"reward-model": "a reward model", "gold": "the gold reward"}


def warnings(m: Results) -> list[str]:
    """Return the warnings about the comparison of the arms, for the top of the page."""
    texts = [ONE_SEED] if len(m.seeds) < 2 else []
    if not m.steered and len(m.with_rewards) > 1:
        texts.append(
            "This run gave all arms the same KL coefficient and did not steer their KL "
            "(kl_target): a larger reward scale is then a weaker KL penalty."
        )
    texts += kl_warnings(m)
    judge = _JUDGES.get(m.judge or "")
    if judge and not m.gold_is_true:
        texts.append(
            f"The judge is {judge}, not a person and not a language model that reads: a win is a "
            "higher score."
        )
    cut = _where(m, "truncated_share", lambda value: value > TRUNCATED)
    if cut:
        texts.append(
            f"Many responses were cut off by the length limit (largest share): {cut}. They are "
            "judged and scored as they are."
        )
    texts += _length_warning(m)
    texts += _unjudged_warning(m)
    shaky = _where(m, "judge_consistency_vs_sft", lambda value: value < CONSISTENT, worst=min)
    if shaky:
        texts.append(
            "The judge often contradicts itself when the order changes (share that agrees): "
            f"{shaky}."
        )
    return texts


def flags(m: Results) -> list[str]:
    """Return the warnings about the reward models and their adaptation."""
    return [*_influence_flags(m), *_loud_flags(m), *_below_half_flags(m), *_proxy_flags(m)]


def kl_warnings(m: Results) -> list[str]:
    """Return one sentence if the KLs of a round's arms differ by more than 25 %."""
    apart = [spread for spread in kl_spreads(m) if not spread.matched]
    if not apart:
        return []
    worst = max(apart, key=lambda spread: spread.gap)
    size = "" if math.isinf(worst.gap) else f", {100 * worst.gap:.0f} % apart"
    return [
        f"The KL did not match in {rounds_text([spread.round for spread in apart])}: in round "
        f"{worst.round} it ran from {fixed_point(worst.lowest_kl)} ({m.name(worst.lowest)}) to "
        f"{fixed_point(worst.highest_kl)} ({m.name(worst.highest)}){size}. A policy that moved "
        "further can gain or lose by that alone, so read every comparison beside KL there."
    ]


def _where(
    m: Results,
    metric: str,
    wrong: Callable[[float], bool],
    *,
    worst: Callable[[Iterable[float]], float] = max,
) -> str:
    """Return arms and rounds with the worst value, `MetaRM, rounds 2 and 3 (0.31)`, or ""."""
    found = []
    for arm in m.arms:
        values = {r: value.mean for r, value in m.course(arm, metric) if wrong(value.mean)}
        if values:
            number = fixed_point(worst(values.values()))
            found.append(f"{m.name(arm)}, {rounds_text(list(values))} ({number})")
    return listing(found)


def _unjudged_warning(m: Results) -> list[str]:
    found = []
    for arm in m.trained:
        for round_ in m.rounds(arm, "evaluate", "unjudged_vs_sft"):
            missing = sum(m.final("evaluate", arm, round_, "unjudged_vs_sft").values())
            asked = m.sample_size("evaluate", arm, round_, "unjudged_vs_sft")
            if asked and missing / asked > UNJUDGED:
                found.append(f"{m.name(arm)}, round {round_} ({missing:.0f} of {asked})")
    if not found:
        return []
    return [f"Prompts on which the judge gave no verdict, which are not counted: {listing(found)}."]


def _length_warning(m: Results) -> list[str]:
    start = m.mean(SFT, 0, "length_mean")
    if start is None or start <= 0 or (m.gold_is_true and m.judge in (None, "gold")):
        return []
    found = []
    for arm in m.trained:
        end = m.last(arm, "length_mean")
        if end is not None and not 1 / LONGER < end[1].mean / start < LONGER:
            found.append(f"{m.name(arm)} ({fixed_point(end[1].mean / start)} times SFT's)")
    if not found:
        return []
    text = f"The length of the answers changed in {listing(found)}: judges like long answers"
    equal = m.has("length_controlled_vs_sft")
    return [f"{text}{', so read the rate at equal lengths' if equal else ''}."]


def _influence_flags(m: Results) -> list[str]:
    texts = []
    for arm in m.adapted:
        found = {r: influence(m, arm, r) for r in m.rounds(arm, "reward_model", "meta_influence")}
        means = {r: value.mean for r, value in found.items() if value is not None}
        small = {r: mean for r, mean in means.items() if mean < INFLUENCE_FLOOR}
        large = {r: mean for r, mean in means.items() if mean > INFLUENCE_CEILING}
        start = f"{m.name(arm)}: the meta step changed the gradient by"
        if small:
            texts.append(
                f"{start} at most {max(small.values()):.1e} of its length in "
                f"{rounds_text(list(small))}: too small to matter. While it trains, this arm is as "
                "good as plain retraining."
            )
        if large:
            texts.append(
                f"{start} up to {max(large.values()):.1f} times its length in "
                f"{rounds_text(list(large))}: it outweighs the pairs, and it uses no labels."
            )
    return texts


def _arms_and_rounds(m: Results, found: dict[str, list[int]]) -> str:
    return listing([f"{m.name(arm)}, {rounds_text(rounds)}" for arm, rounds in found.items()])


def _loud_flags(m: Results) -> list[str]:
    by_arm: dict[str, list[int]] = {}
    for found in adaptations(m):
        if found.reading == "louder, not sharper":
            by_arm.setdefault(found.method, []).append(found.round)
    if not by_arm:
        return []
    return [
        "Louder, not sharper: the adaptation spread the rewards further apart but did not rank the "
        f"same responses better in {_arms_and_rounds(m, by_arm)}."
    ]


def _below_half_flags(m: Results) -> list[str]:
    """Warn of arms that order their policy's pairs wrongly or at random.

    An accuracy is below one half if it is lower by more than two standard errors at p = 1/2.
    """
    metric = "accuracy_policy_after"
    worse: dict[str, dict[int, float]] = {}
    coin: dict[str, list[int]] = {}
    for arm in m.with_rewards:
        for round_, found in m.course(arm, metric):
            size = m.sample_size("evaluate", arm, round_, metric)  # pairs of all seeds
            above = (found.mean - 0.5) / (2 * math.sqrt(0.25 / size)) if size else math.inf
            if above < -1:
                worse.setdefault(arm, {})[round_] = found.mean
            elif above < 1:
                coin.setdefault(arm, []).append(round_)
    texts = []
    if worse:
        said = [
            f"{m.name(arm)}, {rounds_text(list(values))} "
            f"({', '.join(fixed_point(value, 3) for value in values.values())})"
            for arm, values in worse.items()
        ]
        texts.append(
            "Accuracy on the policy's own pairs after its training is below one half in "
            f"{listing(said)}: there the reward model prefers the worse response, and amplifying "
            "makes it worse."
        )
    if coin:
        texts.append(
            "After its training the policy's own pairs are ranked no better than by chance, within "
            f"the noise, in {_arms_and_rounds(m, coin)}."
        )
    return texts


def _proxy_flags(m: Results) -> list[str]:
    """Warn of over-optimisation: proxy up and gold down over an arm's rounds."""
    found = []
    for arm in m.with_rewards:
        rounds = m.rounds(arm)
        falls = [
            f"{before} to {after}"
            for before, after in itertools.pairwise(rounds)
            if _moved(m, arm, "proxy_mean_standardised", before, after) > 0
            and _moved(m, arm, "gold_mean", before, after) < 0
        ]
        if falls:
            found.append(f"{m.name(arm)}, round {listing(falls)}")
    if not found:
        return []
    return [
        "A sign of over-optimisation: the arm's own reward model scored the policy higher while "
        f"gold fell: {listing(found)}."
    ]


def _moved(m: Results, arm: str, metric: str, before: int, after: int) -> float:
    """Return the mean change between two rounds; 0 if not measured or within the noise.

    The noise is the interval over the seeds, or for one seed the sampling error if known.
    """
    old = m.final("evaluate", arm, before, metric)
    new = m.final("evaluate", arm, after, metric)
    change = estimate({seed: new[seed] - old[seed] for seed in old.keys() & new.keys()})
    if change is None or (change.half_width is not None and not change.excludes_zero):
        return 0.0
    if change.half_width is not None or metric != "gold_mean":
        return change.mean
    deviation = m.mean(arm, after, "gold_std")
    size = m.sample_size("evaluate", arm, after, metric)
    if deviation and size:
        noise = 1.96 * deviation * math.sqrt(2 / size)
        return change.mean if abs(change.mean) > noise else 0.0
    return change.mean
