"""Comparisons for tables and text: gold gaps, matched KL, changes by an adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shiftrm.measure.diagnosis.thresholds import SPREAD_FACTOR
from shiftrm.report.measurements import Measurements, SeedEstimate, estimate
from shiftrm.report.results import SFT, Results

KL_TOLERANCE = 0.25  # arms that differ by more are not "at matched KL"
MINIMUM_ACCURACY_CHANGE = 0.02  # a smaller change in accuracy counts as noise


def relative_gap(values: list[float]) -> float:
    """Return largest / smallest - 1; infinity if the smallest value is not positive.

    If all values are equal, also to 0, the gap is 0.
    """
    low, high = min(values), max(values)
    if low == high:
        return 0.0
    return high / low - 1 if low > 0 else math.inf


@dataclass(frozen=True)
class GoldGap:
    """Gold score of `method` minus that of `reference` after `round`, paired by seed.

    `sampling_half_width`: 1.96 standard errors over the responses, without the variation
    between seeds. None if gold_std or n is missing.
    `kl` and `reference_kl`: mean KL to SFT (None if not measured).
    """

    method: str
    reference: str
    round: int
    gold: float
    reference_gold: float
    difference: SeedEstimate
    sampling_half_width: float | None
    kl: float | None
    reference_kl: float | None

    @property
    def matched(self) -> bool | None:
        """Whether the two KLs differ by at most 25 %; None if one was not measured."""
        if self.kl is None or self.reference_kl is None:
            return None
        return relative_gap([self.kl, self.reference_kl]) <= KL_TOLERANCE

    @property
    def within_noise(self) -> bool:
        """Whether the difference is within the sampling error of the responses."""
        return abs(self.difference.mean) <= (self.sampling_half_width or 0.0)

    @property
    def clear(self) -> bool:
        """Whether the interval over the seeds excludes zero; for one seed, beyond the noise."""
        if self.difference.half_width is None:
            return not self.within_noise
        return self.difference.excludes_zero


def _sampling_half_width(m: Measurements, arms: tuple[str, str], round_: int) -> float | None:
    """Return 1.96 standard errors of the difference of two mean gold scores."""
    variance = 0.0
    for arm in arms:
        deviations = m.final("evaluate", arm, round_, "gold_std")
        size = m.sample_size("evaluate", arm, round_, "gold_mean")
        if not deviations or not size:
            return None
        mean_square = sum(value**2 for value in deviations.values()) / len(deviations)
        variance += mean_square / size
    return 1.96 * math.sqrt(variance)


def gold_gap(m: Measurements, method: str, reference: str) -> GoldGap | None:
    """Return the gap after the last round that both arms have for a common seed."""
    rounds = set(m.rounds(method, "evaluate", "gold_mean"))
    for round_ in sorted(rounds & set(m.rounds(reference, "evaluate", "gold_mean")), reverse=True):
        ours = m.final("evaluate", method, round_, "gold_mean")
        theirs = m.final("evaluate", reference, round_, "gold_mean")
        seeds = sorted(set(ours) & set(theirs))
        difference = estimate({seed: ours[seed] - theirs[seed] for seed in seeds})
        if difference is None:
            continue
        return GoldGap(
            method=method,
            reference=reference,
            round=round_,
            gold=sum(ours[seed] for seed in seeds) / len(seeds),
            reference_gold=sum(theirs[seed] for seed in seeds) / len(seeds),
            difference=difference,
            sampling_half_width=_sampling_half_width(m, (method, reference), round_),
            kl=m.mean(method, round_, "kl"),
            reference_kl=m.mean(reference, round_, "kl"),
        )
    return None


def gold_gaps(m: Results) -> list[GoldGap]:
    """Compare every other arm with the first one whose reward model is kept."""
    vanilla = m.vanilla
    if vanilla is None:
        return []
    gaps = (gold_gap(m, arm, vanilla) for arm in m.trained if arm != vanilla)
    return [gap for gap in gaps if gap is not None]


@dataclass(frozen=True)
class KlSpread:
    """The arms with the lowest and the highest KL after one round."""

    round: int
    lowest: str
    lowest_kl: float
    highest: str
    highest_kl: float

    @property
    def gap(self) -> float:
        """Highest / lowest - 1."""
        return relative_gap([self.lowest_kl, self.highest_kl])

    @property
    def matched(self) -> bool:
        """Whether the KLs of all arms differ by at most 25 %."""
        return self.gap <= KL_TOLERANCE


def kl_below_zero(m: Results) -> str:
    """Return a warning if a KL logged during policy training is negative, else ""."""
    steps = [
        value
        for arm in m.with_rewards
        for round_ in m.rounds(arm, "ppo", "sequence_kl")
        for points in m.curve("ppo", arm, round_, "sequence_kl").values()
        for _, value in points
    ]
    below = sum(value < -0.1 for value in steps)  # larger than the noise around 0
    if not below:
        return ""
    return (
        f"{below} of {len(steps)} policy steps have a KL clearly below 0, which no KL is: they "
        "were logged by an earlier version, as an estimate from the sampled tokens that is wrong "
        "where sampling changes the policy (temperature, top-p, penalties). Do not read the dots "
        "there."
    )


def kl_spreads(m: Results) -> list[KlSpread]:
    """Return one entry per round in which at least two arms with reward models have a KL."""
    spreads = []
    for round_ in m.all_rounds:
        found = {arm: m.mean(arm, round_, "kl") for arm in m.with_rewards}
        means = {arm: value for arm, value in found.items() if value is not None}
        if len(means) < 2:
            continue
        lowest, highest = min(means, key=lambda a: means[a]), max(means, key=lambda a: means[a])
        spreads.append(KlSpread(round_, lowest, means[lowest], highest, means[highest]))
    return spreads


def accuracy_noise(first: float, second: float, n_first: int | None, n_second: int | None) -> float:
    """Return the difference above which two accuracies count as different.

    Two binomial standard errors of the difference, at least 0.02; 0.05 if a sample size is
    unknown.
    """
    if not n_first or not n_second:
        return 0.05
    variance = first * (1 - first) / n_first + second * (1 - second) / n_second
    return max(MINIMUM_ACCURACY_CHANGE, 2 * math.sqrt(variance))


Change = tuple[float | None, float | None]
"""Old and new value; None where it was not measured."""


@dataclass(frozen=True)
class AdaptationEffect:
    """Changes by a round's adaptation, on responses of the same policy.

    Old: the reward model of the previous round (round 1: the first one); new: the adapted one.
    Changes of accuracy up to `noise` do not count.
    """

    method: str
    round: int
    accuracy: Change
    noise: float
    relative_variance: Change
    variance: Change

    @property
    def spread_up(self) -> bool:
        """Whether reward differences grew, relative to SFT samples or in raw units."""
        return any(
            old is not None and new is not None and new > SPREAD_FACTOR * old
            for old, new in (self.relative_variance, self.variance)
        )

    @property
    def reading(self) -> str:
        """Return "sharper", "louder, not sharper", "duller" or similar words."""
        old, new = self.accuracy
        if old is None or new is None:
            return "not measured"
        if new - old > self.noise:
            return "sharper"
        if self.spread_up:
            return "louder, not sharper"
        return "duller" if new - old < -self.noise else "no clear change"


def adaptation(m: Results, method: str, round_: int) -> AdaptationEffect:
    """Compare the reward model before and after the adaptation that starts a round."""
    vanilla = m.vanilla
    if round_ > 1:
        old, when = (method, round_ - 1), "after"
    elif vanilla and m.final("evaluate", vanilla, 1, "accuracy_policy_before"):
        # In round 1 the vanilla arm has the first reward model and the SFT policy.
        old, when = (vanilla, 1), "before"
    else:  # the evaluation of SFT, which is recorded as "after" since there is no policy training
        old, when = (SFT, 0), "after"

    def change(metric: str) -> Change:
        return m.mean(*old, f"{metric}_{when}"), m.mean(method, round_, f"{metric}_before")

    accuracy = change("accuracy_policy")
    sizes = (
        m.sample_size("evaluate", *old, f"accuracy_policy_{when}"),
        m.sample_size("evaluate", method, round_, "accuracy_policy_before"),
    )
    noise = accuracy_noise(accuracy[0] or 0.0, accuracy[1] or 0.0, *sizes)
    relative, raw = change("relative_difference_variance"), change("difference_variance")
    return AdaptationEffect(method, round_, accuracy, noise, relative, raw)


def adaptations(m: Results) -> list[AdaptationEffect]:
    """Return all rounds of all arms that train reward models of their own."""
    trains = [arm for arm in m.with_rewards if m.arms[arm].trains]
    return [adaptation(m, arm, round_) for arm in trains for round_ in m.rounds(arm)]


def influence(m: Measurements, method: str, round_: int) -> SeedEstimate | None:
    """Return the mean of `|grad L(theta') - grad L(theta)| / |grad L(theta)|`, by seed."""
    curves = m.curve("reward_model", method, round_, "meta_influence")
    return estimate(
        {seed: sum(v for _, v in points) / len(points) for seed, points in curves.items()}
    )


def normalised_differences(m: Measurements, method: str, round_: int) -> list[float]:
    """Return `|r_i - r_j|` on the policy's samples, divided by the reward model's maximum.

    The maximum is over differences on SFT and policy samples, per seed (every seed has its own
    reward model). The seeds are then pooled.
    """
    pooled: list[float] = []
    policy = m.values("evaluate", method, round_, "difference_values_before")
    sft = m.values("evaluate", method, round_, "difference_values_sft")
    for seed, values in policy.items():
        maximum = max(values + sft.get(seed, []))
        pooled += [value / maximum if maximum > 0 else 0.0 for value in values]
    return pooled
