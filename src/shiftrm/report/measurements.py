"""Index of records by stage, arm, round, metric and seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shiftrm.core.intervals import t_quantile_95
from shiftrm.metrics import metric as declared
from shiftrm.records import Record


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over seeds with the half width of its 95 % t-interval (None for one seed)."""

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean for one seed."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean for one seed."""
        return self.mean + (self.half_width or 0.0)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero; False for one seed."""
        return self.half_width is not None and (self.low > 0 or self.high < 0)


def estimate(values: Mapping[int, float]) -> SeedEstimate | None:
    """Return mean and 95 % t-interval of one value per seed; None without values."""
    numbers = list(values.values())
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return SeedEstimate(mean, None, 1)
    variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    half_width = t_quantile_95(len(numbers) - 1) * math.sqrt(variance / len(numbers))
    return SeedEstimate(mean, half_width, len(numbers))


_Key = tuple[str, str, int, str]  # stage, method, round, metric

_EARLIER_NAMES = {
    ("ppo", "kl"): "sequence_kl",
    ("ppo", "proxy_mean"): "standardised_mean",
    ("ppo", "score_mean"): "reward",
    ("ppo", "accuracy"): "rewards/accuracies",
    ("reward_model", "meta_objective_before"): "meta_objective",
}
"""Earlier versions renamed the metrics of the training logs; their records are read as today's."""


def _key(stage: str, method: str, round_: int, metric: str) -> _Key:
    """Return the lookup key; an undeclared metric is a programming error."""
    declared(metric)
    return stage, method, round_, _EARLIER_NAMES.get((stage, metric), metric)


class Measurements:
    """Records by (stage, method, round, metric) and seed.

    If a stage was repeated, the later record counts.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._finals: dict[_Key, dict[int, float]] = defaultdict(dict)
        self._sizes: dict[_Key, dict[int, int]] = defaultdict(dict)
        self._curves: dict[_Key, dict[int, dict[int, float]]] = defaultdict(dict)
        self._lists: dict[_Key, dict[int, list[float]]] = defaultdict(dict)
        self._rounds: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        self._read: set[str] = set()
        self.provenance: dict[tuple[str, str], set[int]] = defaultdict(set)
        seeds: set[int] = set()
        for record in records:
            seeds.add(record.seed)
            self.provenance[str(record.commit), str(record.versions)].add(record.seed)
            self._add(record)
        self.seeds: list[int] = sorted(seeds)

    def _add(self, record: Record) -> None:
        key = _key(record.stage, str(record.method), record.round, record.metric)
        stage, method, round_, metric = key
        self._rounds[stage, method, metric].add(round_)
        value = record.value
        if isinstance(value, list):
            self._lists[key][record.seed] = [float(number) for number in value]
        elif record.step is not None:
            self._curves[key].setdefault(record.seed, {})[record.step] = float(value)
        else:
            self._finals[key][record.seed] = float(value)
            if record.n is not None:
                self._sizes[key][record.seed] = record.n

    def final(self, stage: str, method: str, round_: int, metric: str) -> dict[int, float]:
        """Return the final value (step null) of each seed."""
        if stage == "evaluate":
            self._read.add(metric)
        return dict(self._finals.get(_key(stage, method, round_, metric), {}))

    def by_seed(
        self, stage: str, method: str, rounds: Iterable[int], metric: str
    ) -> dict[int, float]:
        """Return `final` merged over several rounds; later rounds win."""
        values: dict[int, float] = {}
        for round_ in rounds:
            values |= self.final(stage, method, round_, metric)
        return values

    def estimate(self, stage: str, method: str, round_: int, metric: str) -> SeedEstimate | None:
        """Return the mean of `final` over the seeds."""
        return estimate(self.final(stage, method, round_, metric))

    def mean(self, method: str, round_: int, metric: str) -> float | None:
        """Return the mean of an evaluation's metric over the seeds."""
        found = self.estimate("evaluate", method, round_, metric)
        return found.mean if found else None

    def course(self, method: str, metric: str) -> list[tuple[int, SeedEstimate]]:
        """Return (round, estimate) of an evaluation's metric, in the order of the rounds."""
        found = [
            (r, self.estimate("evaluate", method, r, metric))
            for r in self.rounds(method, "evaluate", metric)
        ]
        return [(round_, value) for round_, value in found if value is not None]

    def sample_size(self, stage: str, method: str, round_: int, metric: str) -> int | None:
        """Return the sample size summed over the seeds; None if a seed has none."""
        key = _key(stage, method, round_, metric)
        sizes = self._sizes.get(key, {})
        if not sizes or set(sizes) != set(self._finals.get(key, {})):
            return None
        return sum(sizes.values())

    def curve(
        self, stage: str, method: str, round_: int, metric: str
    ) -> dict[int, list[tuple[float, float]]]:
        """Return (step, value) of each seed, sorted by step."""
        by_seed = self._curves.get(_key(stage, method, round_, metric), {})
        return {
            seed: [(float(step), value) for step, value in sorted(points.items())]
            for seed, points in sorted(by_seed.items())
            if points
        }

    def values(self, stage: str, method: str, round_: int, metric: str) -> dict[int, list[float]]:
        """Return the list of each seed (`*_values` metrics); empty lists are left out."""
        by_seed = self._lists.get(_key(stage, method, round_, metric), {})
        return {seed: list(values) for seed, values in sorted(by_seed.items()) if values}

    def pooled(self, method: str, round_: int, metric: str) -> list[float]:
        """Return the lists of all seeds of an evaluation, joined."""
        found = self.values("evaluate", method, round_, metric)
        return [value for values in found.values() for value in values]

    def methods(self) -> list[str]:
        """Return the arms that have results, in the order of their first records."""
        stages = ("reward_model", "ppo", "evaluate", "compare")
        return list(dict.fromkeys(method for stage, method, _ in self._rounds if stage in stages))

    def metrics(self, stage: str, method: str | None = None) -> list[str]:
        """Return the sorted names of all metrics of a stage."""
        found = {key[2] for key in self._rounds if key[0] == stage and method in (None, key[1])}
        return sorted(found)

    def unread(self) -> list[str]:
        """Return the sorted final metrics of stage "evaluate" that nobody has asked for yet."""
        found = {metric for stage, _, _, metric in self._finals if stage == "evaluate"}
        return sorted(found - self._read)

    def rounds(self, method: str, stage: str = "evaluate", metric: str | None = None) -> list[int]:
        """Return the rounds that have records, in order."""
        if metric is not None:
            metric = _key(stage, method, 0, metric)[-1]
            return sorted(self._rounds.get((stage, method, metric), ()))
        found = (rounds for key, rounds in self._rounds.items() if key[:2] == (stage, method))
        return sorted(set().union(*found))

    def merged(self, stage: str) -> dict[str, SeedEstimate]:
        """Return the final metrics of a stage by name, means over the seeds; later rounds count."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for (key_stage, _, _, metric), by_seed in self._finals.items():
            if key_stage == stage:
                found[metric].update(by_seed)
        estimates = {metric: estimate(by_seed) for metric, by_seed in sorted(found.items())}
        return {metric: value for metric, value in estimates.items() if value is not None}
