"""Warnings about misleading numbers: small samples, larger spread only, over-optimisation."""

from __future__ import annotations

import math

from shiftrm.measure.diagnosis.thresholds import INFLUENCE_CEILING, INFLUENCE_FLOOR
from shiftrm.report.analysis import adaptations, influence
from shiftrm.report.arms import arm_name
from shiftrm.report.measurements import Measurements, estimate
from shiftrm.report.tables import fixed_point
from shiftrm.report.wording import listing, rounds_text


def flags(m: Measurements) -> list[str]:
    """Return the warnings."""
    return [*_influence_flags(m), *_loud_flags(m), *_below_half_flags(m), *_proxy_flags(m)]


def _influence_flags(m: Measurements) -> list[str]:
    texts = []
    for arm in m.methods():
        found = {r: influence(m, arm, r) for r in m.rounds(arm, "reward_model", "meta_influence")}
        small = {r: v.mean for r, v in found.items() if v is not None and v.mean < INFLUENCE_FLOOR}
        if small:
            texts.append(
                f"{arm_name(arm)}: the meta step changed the gradient by at most "
                f"{max(small.values()):.1e} of its length in {rounds_text(sorted(small))}: too "
                "small to matter. While it trains, this arm is as good as plain retraining."
            )
        large = {
            r: v.mean for r, v in found.items() if v is not None and v.mean > INFLUENCE_CEILING
        }
        if large:
            texts.append(
                f"{arm_name(arm)}: the meta step changed the gradient by up to "
                f"{max(large.values()):.1f} times its length in {rounds_text(sorted(large))}: it "
                "outweighs the pairs, and knows no labels."
            )
    return texts


def _loud_flags(m: Measurements) -> list[str]:
    by_arm: dict[str, list[int]] = {}
    for found in adaptations(m):
        if found.reading == "louder, not sharper":
            by_arm.setdefault(found.method, []).append(found.round)
    if not by_arm:
        return []
    where = listing([f"{arm_name(arm)}, {rounds_text(rounds)}" for arm, rounds in by_arm.items()])
    return [
        "Louder, not sharper: the adaptation spread the rewards further apart but did not rank the "
        f"same responses better in {where}."
    ]


def _below_half_flags(m: Measurements) -> list[str]:
    """Warn of arms that order their policy's pairs wrongly or at random.

    An accuracy is below one half if it is lower by more than two standard errors at p = 1/2.
    """
    worse: list[str] = []
    coin: dict[str, list[int]] = {}
    for arm in m.policy_arms():
        for round_ in m.rounds(arm):
            found = m.estimate("evaluate", arm, round_, "accuracy_policy_after")
            size = m.sample_size("evaluate", arm, round_, "accuracy_policy_after")
            if found is None or not size:
                continue
            noise = 2 * math.sqrt(0.25 / size)  # size: pairs of all seeds
            if found.mean < 0.5 - noise:
                worse.append(f"{arm_name(arm)}, round {round_} ({fixed_point(found.mean, 3)})")
            elif found.mean < 0.5 + noise:
                coin.setdefault(arm, []).append(round_)
    texts = []
    if worse:
        texts.append(
            f"Accuracy on the policy's own pairs after PPO is below one half in {listing(worse)}: "
            "there the reward model prefers the worse response, and amplifying makes it worse."
        )
    if coin:
        where = listing([f"{arm_name(arm)}, {rounds_text(rounds)}" for arm, rounds in coin.items()])
        texts.append(
            "After PPO the reward model ranks the policy's own pairs no better than a coin, within "
            f"the noise, in {where}."
        )
    return texts


def _proxy_flags(m: Measurements) -> list[str]:
    """Warn of over-optimisation: proxy up and gold down over an arm's rounds."""
    found = []
    for arm in m.policy_arms():
        falls = [
            f"{before} to {after}"
            for before, after in zip(m.rounds(arm), m.rounds(arm)[1:], strict=False)
            if _moved(m, arm, "proxy_mean_standardised", before, after) > 0
            and _moved(m, arm, "gold_mean", before, after) < 0
        ]
        if falls:
            found.append(f"{arm_name(arm)}, round {listing(falls)}")
    if not found:
        return []
    return [
        "The mark of over-optimisation, its own reward model scoring the policy higher while gold "
        f"fell: {listing(found)}."
    ]


def _moved(m: Measurements, arm: str, metric: str, before: int, after: int) -> float:
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
    deviation = m.estimate("evaluate", arm, after, "gold_std")
    size = m.sample_size("evaluate", arm, after, metric)
    if deviation and size:
        noise = 1.96 * deviation.mean * math.sqrt(2 / size)
        return change.mean if abs(change.mean) > noise else 0.0
    return change.mean
