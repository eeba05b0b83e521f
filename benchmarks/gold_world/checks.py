"""Checks of the gold world's controls, computed from records alone.

"Noise" is three standard errors throughout. For a curve over PPO steps it is estimated from the
curve: neighbouring steps differ by sampling, hardly by training, so half the mean square of their
differences is the variance of one step. For an evaluation it comes from the spread of responses.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shiftrm.records import Record

from .controls import ControlsConfig, at_kl

WINDOW = 10
"""PPO steps averaged into one point of a curve before it is judged."""

LAST_STEPS = 20
"""Final steps whose mean is a run's gold and KL: the controller oscillates around its target."""

NOISE = 3.0
"""Standard errors that count as noise."""

KL_TOLERANCE = 0.2
"""A run is at matched KL if its KL is within this share of the target."""

SHUFFLED_ACCURACY = (0.45, 0.55)
_ACCURACY = "eval_accuracy"


@dataclass(frozen=True)
class Check:
    """One claim about the world, whether it holds, and the numbers behind the verdict.

    Attributes:
        control: "a" to "e", as in `docs/gold-world.md`.
        seed: None if the claim is about the mean over seeds.
    """

    control: str
    claim: str
    holds: bool
    seed: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)


class Table:
    """Look-up of the records of one or more seeds.

    Raises:
        ValueError: a run has two records for one step, as when its records are given twice.
        KeyError: on look-up, a value was not measured; the message names it.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        curves: dict[tuple[int, str, str], dict[int, float]] = defaultdict(dict)
        self._finals: dict[tuple[str, int, str, str], tuple[float, int]] = {}
        for r in records:
            if isinstance(r.value, list):
                continue
            if r.stage in ("ppo", "reward_model") and r.step is not None:
                curve = curves[r.seed, r.method, r.metric]
                if r.step in curve:
                    raise ValueError(f"{r.method}, seed {r.seed}: step {r.step} is there twice")
                curve[r.step] = r.value
            elif r.step is None:
                self._finals[r.stage, r.seed, r.method, r.metric] = (r.value, r.n or 1)
        self._curves = {
            key: [v for _, v in sorted(points.items())] for key, points in curves.items()
        }
        self.seeds = sorted({r.seed for r in records})

    def curve(self, seed: int, method: str, metric: str) -> list[float]:
        """Return a training metric by step."""
        return self._curves[seed, method, metric]

    def at_end(self, seed: int, method: str, metric: str) -> float:
        """Mean over the last `LAST_STEPS` steps of PPO."""
        last = self.curve(seed, method, metric)[-LAST_STEPS:]
        return sum(last) / len(last)

    def evaluated(self, seed: int, method: str, metric: str = "gold_mean") -> float:
        """Return an evaluation result after PPO; for method "sft", of the SFT policy."""
        return self._finals["evaluate", seed, method, metric][0]

    def accuracy(self, seed: int, method: str) -> float:
        """Held-out accuracy of a reward model at its last step."""
        return self.curve(seed, method, _ACCURACY)[-1]

    def shuffled_accuracies(self, seed: int) -> list[float]:
        """Held-out accuracies of the reward models on shuffled labels, one per shuffle."""
        accuracies = [self.accuracy(seed, "shuffled_1")]
        while (seed, f"shuffled_{len(accuracies) + 1}", _ACCURACY) in self._curves:
            accuracies.append(self.accuracy(seed, f"shuffled_{len(accuracies) + 1}"))
        return accuracies

    def gold_noise(self, seed: int, method: str) -> float:
        """Noise of the difference between a method's evaluated gold and the SFT policy's.

        Both answer the same prompts; treating them as independent overstates the noise a little.
        """
        variances = []
        for name in (method, "sft"):
            deviation, n = self._finals["evaluate", seed, name, "gold_std"]
            variances.append(deviation**2 / n)
        return NOISE * math.sqrt(sum(variances))


def windows(curve: Sequence[float], width: int = WINDOW) -> list[float]:
    """Means of consecutive stretches of `width` steps; an incomplete last one is left out."""
    starts = range(0, len(curve) - width + 1, width)
    return [sum(curve[i : i + width]) / width for i in starts]


def curve_noise(curve: Sequence[float], width: int = WINDOW) -> float:
    """Noise of the difference of two window means, from the differences of neighbouring steps."""
    squares = [(b - a) ** 2 for a, b in pairwise(curve)]
    if not squares:
        raise ValueError("a curve needs at least two steps")
    one_step = sum(squares) / len(squares) / 2
    return NOISE * math.sqrt(2 * one_step / width)


def largest_fall(values: Sequence[float]) -> float:
    """The largest drop from any value to a later one; 0 if they never fall."""
    highest, fall = -math.inf, 0.0
    for value in values:
        highest = max(highest, value)
        fall = max(fall, highest - value)
    return fall


def check_controls(records: Sequence[Record], config: ControlsConfig) -> list[Check]:
    """All claims: (a), (b), (c), (e) seed by seed, (d) on the mean over the seeds.

    Args:
        records: of one or several seeds of `controls.plan_controls`.
        config: pair counts and KL targets; its seed does not matter.

    Raises:
        KeyError: something that a claim needs was not measured.
    """
    table = Table(records)
    checks: list[Check] = []
    for seed in table.seeds:
        checks += proxy_without_penalty(table, seed)
        checks += gold_as_reward(table, seed)
        checks += shuffled_labels(
            table, seed, [at_kl("shuffled", config.shuffled_kl), "shuffled_no_kl"]
        )
    for target in config.kl_targets:
        checks += matched_kl(table, target, config.pair_counts)
    for seed in table.seeds:
        checks += with_penalty(table, seed)
    return checks


def proxy_without_penalty(table: Table, seed: int) -> list[Check]:
    """(a) The proxy rises throughout while gold peaks and ends below the SFT policy."""
    name = "proxy_no_kl"
    proxy, gold = table.curve(seed, name, "standardised_mean"), table.curve(seed, name, "gold_mean")
    means, third = windows(proxy), len(proxy) // 3
    thirds = [sum(proxy[i * third : (i + 1) * third]) / third for i in range(3)]
    fall, noise = largest_fall(means), curve_noise(proxy)
    sft, end = table.evaluated(seed, "sft"), table.evaluated(seed, name)
    golds = windows(gold)
    peak = max(golds)
    # Up to the peak: later responses differ more and more between prompts.
    until = gold[: (golds.index(peak) + 1) * WINDOW]
    gold_noise = math.hypot(curve_noise(until), table.gold_noise(seed, "sft"))
    return [
        Check(
            "a",
            "without KL penalty the proxy rises throughout",
            fall <= noise and thirds[0] < thirds[1] < thirds[2],
            seed,
            {"first": means[0], "last": means[-1], "largest fall": fall, "noise": noise},
        ),
        Check(
            "a",
            "its gold peaks above the SFT policy and falls from there",
            peak > sft + gold_noise and golds[-1] < peak - curve_noise(gold),
            seed,
            {"sft": sft, "peak": peak, "noise": gold_noise, "last": golds[-1]},
        ),
        Check(
            "a",
            "its gold ends below the SFT policy",
            end < sft - table.gold_noise(seed, name),
            seed,
            {"sft": sft, "end": end, "kl": table.evaluated(seed, name, "kl")},
        ),
    ]


def gold_as_reward(table: Table, seed: int) -> list[Check]:
    """(b) PPO on the gold reward itself, without penalty: gold never falls by more than noise."""
    gold = table.curve(seed, "gold_no_kl", "gold_mean")
    means, noise = windows(gold), curve_noise(gold)
    fall = largest_fall(means)
    sft, end = table.evaluated(seed, "sft"), table.evaluated(seed, "gold_no_kl")
    return [
        Check(
            "b",
            "with gold as reward, gold never falls by more than noise and ends above SFT",
            fall <= noise and end > sft + table.gold_noise(seed, "gold_no_kl"),
            seed,
            {"sft": sft, "end": end, "largest fall": fall, "noise": noise},
        )
    ]


def shuffled_labels(table: Table, seed: int, runs: Sequence[str]) -> list[Check]:
    """(c) Nothing is learned from shuffled labels, and optimising that model gains no gold."""
    accuracies = table.shuffled_accuracies(seed)
    accuracy = sum(accuracies) / len(accuracies)
    low, high = SHUFFLED_ACCURACY
    checks = [
        Check(
            "c",
            f"shuffled labels give a held-out accuracy of {low} to {high} (mean of the shuffles)",
            low <= accuracy <= high,
            seed,
            {"mean": accuracy, "lowest": min(accuracies), "highest": max(accuracies)},
        )
    ]
    sft = table.evaluated(seed, "sft")
    for name in runs:
        end, noise = table.evaluated(seed, name), table.gold_noise(seed, name)
        checks.append(
            Check(
                "c",
                f"PPO on that reward model gains no gold ({name})",
                end <= sft + noise,
                seed,
                {"sft": sft, "end": end, "noise": noise},
            )
        )
    return checks


def matched_kl(table: Table, target: float, counts: Sequence[int]) -> list[Check]:
    """(d) At one KL, gold rises with the number of pairs and stays below gold as reward."""
    names = [*(f"pairs_{count}" for count in sorted(counts)), "gold"]
    kls, golds = {}, {}
    for name in names:
        runs = [at_kl(name, target)] * len(table.seeds)
        pairs = list(zip(table.seeds, runs, strict=True))
        kls[name] = [table.at_end(seed, run, "sequence_kl") for seed, run in pairs]
        golds[name] = [table.at_end(seed, run, "gold_mean") for seed, run in pairs]
    means = {name: sum(values) / len(values) for name, values in golds.items()}
    # Gold as reward may stay below the target: once nothing is left to gain, more KL only costs.
    short = max(0.0, *(1 - kl / target for name in names[:-1] for kl in kls[name]))
    beyond = max(0.0, *(kl / target - 1 for values in kls.values() for kl in values))
    by_size = [means[name] for name in names[:-1]]
    rises = all(a < b for a, b in pairwise(by_size))
    return [
        Check(
            "d",
            f"KL {target:g}: all runs are within {KL_TOLERANCE:.0%} (gold as reward: or below)",
            max(short, beyond) <= KL_TOLERANCE,
            numbers={"furthest short": short, "furthest beyond": beyond},
        ),
        Check(
            "d", f"KL {target:g}: gold rises with the number of pairs", rises, numbers=dict(means)
        ),
        Check(
            "d",
            f"KL {target:g}: gold stays below that of gold as reward",
            max(by_size) < means["gold"],
            numbers={"best": max(by_size), "gold": means["gold"]},
        ),
    ]


def with_penalty(table: Table, seed: int) -> list[Check]:
    """(e) The run of (a) with a KL penalty: its gold does not fall, and ends above SFT."""
    gold = table.curve(seed, "proxy_kl", "gold_mean")
    fall, noise = largest_fall(windows(gold)), curve_noise(gold)
    sft, end = table.evaluated(seed, "sft"), table.evaluated(seed, "proxy_kl")
    return [
        Check(
            "e",
            "a KL penalty stops the fall of (a): gold falls by no more than noise, ends above SFT",
            fall <= noise and end > sft + table.gold_noise(seed, "proxy_kl"),
            seed,
            {"sft": sft, "end": end, "largest fall": fall, "noise": noise},
        )
    ]
