"""The reported results by world, KL target and round, and how tables write their numbers."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .arms import ARMS
from .plan import START
from .results import Result
from .statistics import Paired, holm, paired, paired_at_equal_kl, pooled_slope

CHOOSING = (100, 101, 102, 103)
"""Seeds on which settings were chosen; none of them is reported in the comparison."""

DIFFER_FROM = {"contrast_rounds": 3}
"""The first round in which an arm differs from the one that it varies."""

WORLD_NAMES = {"": "", "adverts": "second world, "}
"""How a world is called in headings."""

Measure = Callable[[Result], float]


class Study:
    """The reported results of one world, by KL target and round."""

    def __init__(self, results: Sequence[Result], world: str, *, chosen_on: bool = False) -> None:
        self.world = world
        self.results = [
            r
            for r in results
            if r.world == world
            and (r.seed in CHOOSING) == chosen_on
            and r.round >= DIFFER_FROM.get(r.arm, 0)
        ]

    def cell(self, kl: float, number: int) -> "Cell":
        return Cell([r for r in self.results if r.kl_target == kl and r.round == number])

    def __iter__(self) -> Iterator[tuple[float, int, "Cell"]]:
        """Yield the cells that have at least two arms, in order of KL and round."""
        for kl, number in sorted({(r.kl_target, r.round) for r in self.results}):
            cell = self.cell(kl, number)
            if len(cell.arms) > 1:
                yield kl, number, cell

    def title(self, kl: float, number: int) -> str:
        return capital(f"{WORLD_NAMES.get(self.world, self.world)}KL {kl:g}, round {number}")


class Cell:
    """All arms and seeds at one KL target and round."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)
        present = {r.arm for r in results}
        self.arms = [name for name in ARMS if name in present]
        self.arms += sorted(present - set(self.arms) - {START})
        self.slope = functools.cache(self._slope)
        """The slope of gold on KL within arms, without a seed or (None) from all of them."""

    def _slope(self, without: int | None = None) -> float:
        # Not from gold as the reward, which does not over-optimise, nor from arms whose KL in PPO
        # is to another policy: theirs is measured once, on the final policy.
        found = [r for r in self.results if r.arm != "gold" and r.seed != without]
        return pooled_slope([(r.arm, r.kl, r.gold) for r in found if not _resets(r.arm)])

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        return {r.seed: measure(r) for r in self.results if r.arm == arm}

    def gold(self, arm: str) -> dict[int, float]:
        return self.values(arm, lambda r: r.gold)

    def kl(self, arm: str) -> dict[int, float]:
        return self.values(arm, lambda r: r.kl)

    def differences(self, arm: str, other: str) -> tuple[Paired, Paired]:
        """Return the difference in gold from another arm, as it is and at equal KL."""
        ours, theirs = self.gold(arm), self.gold(other)
        gold, kl = gaps(ours, theirs), gaps(self.kl(arm), self.kl(other))
        return paired(ours, theirs), paired_at_equal_kl(gold, kl, self.slope)

    def from_retrained(self) -> "tuple[Corrected, Corrected]":
        """Return every arm's difference from retraining, as it is and at equal KL.

        Gold as the reward has none at equal KL: the slope is that of arms that over-optimise.
        """
        found = {a: self.differences(a, "retrained") for a in self.arms if a != "retrained"}
        raw = corrected({arm: one for arm, (one, _) in found.items()})
        return raw, corrected({arm: one for arm, (_, one) in found.items() if arm != "gold"})

    def number(self, arm: str, name: str) -> float:
        """Return the mean over seeds of a number of the evaluation; NaN if a seed lacks it."""
        return mean(r.numbers.get(name, math.nan) for r in self.results if r.arm == arm)


def gaps(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Return the differences by the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def _resets(arm: str) -> bool:
    return arm in ARMS and ARMS[arm].arm.resets_reference


Corrected = dict[str, tuple[Paired, float]]
"""Differences by arm, each with its p value after Holm's correction for all of them."""


def corrected(found: Mapping[str, Paired]) -> Corrected:
    """Add Holm's p values to comparisons that are read together."""
    p = holm([one.p for one in found.values()])
    return {arm: (one, value) for (arm, one), value in zip(found.items(), p, strict=True)}


def label(arm: str) -> str:
    """Return an arm's name in tables and pictures."""
    return ARMS[arm].label if arm in ARMS else arm


def capital(text: str) -> str:
    """Return the text with a capital at its beginning."""
    return text[0].upper() + text[1:]


def mean(values: Iterable[float]) -> float:
    """Return the mean; NaN of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def number_text(value: float, form: str) -> str:
    """Return a number as tables show it; empty for NaN."""
    return "" if math.isnan(value) else format(value, form)


def interval(found: Paired | None) -> str:
    """Return a mean difference with its interval, as tables show it."""
    if found is None or not found.n:
        return ""
    if math.isnan(found.low):
        return signed(found.mean)
    return f"{signed(found.mean)} ({signed(found.low)}, {signed(found.high)})"


def signed(value: float) -> str:
    """Return a difference with its sign, which zero has none of."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def wins(found: Paired | None) -> str:
    """Return the seeds above zero of all."""
    return "" if found is None or not found.n else f"{found.wins}/{found.n}"


def p_text(value: float) -> str:
    """Return a p value as tables show it."""
    if math.isnan(value):
        return ""
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0")
