"""Plausible records of whole runs, made without running anything.

Gold after the last round is fixed by hand (GOLD_LAST), everything else follows simple formulas with
a little seeded noise, so that tests can say what a table must print.
"""

from collections.abc import Callable

import numpy as np
import pytest

from shiftrm.records import Record

ROUNDS = 3
# Gold after the last round by arm, for seeds 0, 1, 2.
GOLD_LAST = {
    "fixed": (4.32, 4.46, 4.62),
    "retrained": (4.61, 4.13, 4.66),
    "metarm_paper": (4.40, 4.50, 4.60),
    "metarm_scale_free": (4.77, 5.10, 4.73),
    "fresh_labels": (4.83, 4.95, 5.15),
}
# What an adaptation gives in accuracy, and the relative variance it leads to. Under `fixed` every
# round halves the variance.
ACCURACY = {
    "fixed": 0.0,
    "retrained": 0.01,
    "metarm_paper": 0.0,
    "metarm_scale_free": 0.04,
    "fresh_labels": 0.05,
}
SPREAD = {"retrained": 0.5, "metarm_paper": 0.5, "metarm_scale_free": 1.8}
MakeRecords = Callable[..., list[Record]]


class Writer:
    """Collects records of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.records: list[Record] = []

    def add(self, key: tuple[str, str, int], metric: str, value, step=None, n=None) -> None:
        stage, method, round_ = key
        if not isinstance(value, list):
            value = float(value)
        self.records.append(
            Record(
                stage=stage, method=method, round=round_, metric=metric, value=value, step=step,
                n=n, seed=self.seed, commit="0123456789ab", versions="shiftrm 0.1.0, torch 2.13.0",
            )
        )  # fmt: skip

    def jitter(self, scale: float) -> float:
        return float(self.rng.normal(0, scale))


def write_reward_model(w: Writer, method: str, round_: int) -> None:
    key = ("reward_model", method, round_)
    start, end = (0.5, 0.74) if method == "sft" else (0.73, 0.745)
    for step in range(10, 210, 10):
        w.add(key, "loss", 0.69 - 0.0008 * step, step)
        curve = end - (end - start) * np.exp(-step / 50)
        w.add(key, "eval_accuracy", curve + w.jitter(0.004), step)
        if method.startswith("metarm"):
            influence = 2e-5 if method == "metarm_paper" else 0.31
            w.add(key, "meta_influence", influence, step)
            w.add(key, "meta_skipped", 0.0, step)
    w.add(key, "eval_accuracy_final", end, n=1000)


def write_ppo(w: Writer, method: str, round_: int, gold_before: float, gold: float) -> None:
    key = ("ppo", method, round_)
    kl_before, kl = 6.0 * (round_ - 1) / ROUNDS, 6.0 * round_ / ROUNDS
    spread = SPREAD.get(method, 0.9)
    for step in range(1, 41):
        part = step / 40
        w.add(key, "kl", kl_before + (kl - kl_before) * part + w.jitter(0.1), step)
        w.add(key, "gold_mean", gold_before + (gold - gold_before) * part + w.jitter(0.15), step)
        w.add(key, "proxy_mean", 0.4 * (round_ - 1 + part) + w.jitter(0.03), step)
        variance = 0.8 * np.exp(-0.8 * (round_ - 1 + part)) if method == "fixed" else spread
        w.add(key, "difference_variance", variance * (1 + w.jitter(0.08)), step)


def write_evaluation(w: Writer, method: str, round_: int, gold: float, kl: float) -> None:
    key = ("evaluate", method, round_)
    alone = method in ("sft", "dpo")
    drift = 0.0 if alone else 0.06 * (round_ - 1)
    spread = 1.0 if alone or round_ == 1 else SPREAD.get(method, 0.9)
    if method == "fixed":
        spread = 0.5 ** (round_ - 1)
    accuracies = {"before": 0.72 - drift + ACCURACY.get(method, 0.0), "after": 0.66 - drift}
    w.add(key, "accuracy_heldout", 0.74, n=1000)
    if method == "sft":  # the evaluation of SFT knows no PPO: only "after"
        w.add(key, "accuracy_policy_after", 0.72, n=2000)
        w.add(key, "relative_difference_variance_after", 1.0)
        w.add(key, "difference_variance_after", 0.8)
    for when, factor in (("before", 1.0), ("after", 0.5)) if method != "sft" else ():
        w.add(key, f"accuracy_policy_{when}", accuracies[when], n=2000)
        w.add(key, f"relative_difference_variance_{when}", spread * factor)
        w.add(key, f"difference_variance_{when}", 0.8 * spread * factor)
    w.add(key, "difference_variance_sft", 0.8)
    scales = {"sft": 1.0, "before": np.sqrt(spread), "after": np.sqrt(0.5 * spread)}
    for when, scale in scales.items():
        values = np.abs(w.rng.normal(0, scale, 300))
        w.add(key, f"difference_values_{when}", [round(float(v), 6) for v in values])
    w.add(key, "gold_mean", gold, n=400)
    w.add(key, "gold_std", 1.5)
    w.add(key, "kl", kl)
    w.add(key, "proxy_mean", 0.9 * round_)
    w.add(key, "proxy_mean_standardised", 0.0 if method == "sft" else 0.4 * round_)
    win = min(0.9, max(0.05, 0.3 + 0.12 * (gold - 2.3)))
    for outcome, share in (("win", win), ("tie", 0.1), ("lose", 0.9 - win)):
        w.add(key, f"{outcome}_vs_sft", share, n=400)
    w.add(key, "length_mean", 11.0 + 0.3 * round_)
    w.add(key, "distinct_share", 0.8)
    w.add(key, "truncated_share", 0.01)


def write_comparison(w: Writer, method: str) -> None:
    key = ("compare", method, 1 if method == "dpo" else ROUNDS)
    for opponent, win in (("sft", 0.61), ("fixed", 0.44), ("dpo", 0.52)):
        if opponent != method:
            for outcome, share in (("win", win), ("tie", 0.16), ("lose", 0.84 - win)):
                w.add(key, f"{outcome}_vs_{opponent}", share, n=200)


def run_of_one_seed(
    seed: int, gold_last: dict[str, tuple[float, ...]], rounds: int
) -> list[Record]:
    w = Writer(seed)
    w.add(("world", "sft", 0), "pairs", 3000)
    w.add(("world", "sft", 0), "sft_gold_mean", 2.3)
    write_reward_model(w, "sft", 0)
    write_evaluation(w, "sft", 0, 2.3, 0.0)
    for method, golds in gold_last.items():
        before = 2.3
        for round_ in range(1, rounds + 1):
            if method != "fixed":
                write_reward_model(w, method, round_)
            gold = 2.3 + (golds[seed] - 2.3) * (round_ / rounds) ** 0.5
            write_ppo(w, method, round_, before, gold)
            write_evaluation(w, method, round_, gold, 6.0 * round_ / rounds)
            before = gold
        write_comparison(w, method)
    write_evaluation(w, "dpo", 1, 3.6, 9.0)
    write_comparison(w, "dpo")
    return w.records


@pytest.fixture
def make_records() -> MakeRecords:
    """`make_records(seeds=(0,), gold_last=GOLD_LAST, rounds=3)` -> records of merged runs."""

    def make(
        seeds: tuple[int, ...] = (0,),
        gold_last: dict[str, tuple[float, ...]] | None = None,
        rounds: int = ROUNDS,
    ) -> list[Record]:
        chosen = gold_last or GOLD_LAST
        return [r for seed in seeds for r in run_of_one_seed(seed, chosen, rounds)]

    return make


@pytest.fixture
def one_seed(make_records: MakeRecords) -> list[Record]:
    return make_records()


@pytest.fixture
def three_seeds(make_records: MakeRecords) -> list[Record]:
    return make_records(seeds=(0, 1, 2))


def change(records: list[Record], value: float | None, **where: object) -> list[Record]:
    """The records with `value` where all named fields agree; None drops those records."""
    changed = []
    for record in records:
        if all(getattr(record, name) == wanted for name, wanted in where.items()):
            if value is None:
                continue
            record = Record(**{**record.__dict__, "value": value})
        changed.append(record)
    return changed
