"""A monitor with labels watches the runs of the study, whose signals are already measured."""

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from shiftrm.errors import UserError
from shiftrm.files import Row, write_jsonl
from shiftrm.measure.judges.comparing import Comparison, Outcome
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import pair_differences
from shiftrm.monitor.trends import flagged, trend

from .runs import EVERY, KINDS, read_run

CONFIG = MonitorConfig(
    threshold=0.75,
    budget=200,
    audit_pairs=16,
    audit_from=6,
    audit_every=1,
    audit_flagged=1,
    pool_steps=1,
    targeted=0.0,
    baseline=4,
    window=4,
    every=EVERY,
)
"""Chosen on seeds 100 to 106 by the share of alarms before gold had fallen, eight draws a run.

Tried: audit_pairs 8 to 66; pool_steps 1 to 5; audit_every and audit_flagged 1 to 6; audit_from 1 to
8; targeted 0, 0.25, 0.5, 0.75; other stakes; threshold 0.70, 0.72, 0.75, 0.78. The threshold is the
model's accuracy in the first steps, and 200 labels are all prompts of twelve steps: those in which
this world's policies leave what the model knows. `SPREAD` does not know when that is.
"""

SPREAD = replace(CONFIG, audit_pairs=32, pool_steps=2, audit_from=1, audit_every=4, audit_flagged=2)
"""The first choice, made on seeds 100 to 102 and reported before `CONFIG` was looked for."""

VARIANTS: dict[str, MonitorConfig] = {
    "as chosen": CONFIG,
    "threshold 0.70": replace(CONFIG, threshold=0.7),
    "threshold 0.65": replace(CONFIG, threshold=0.65),
    "half of the draws where the model is in doubt": replace(CONFIG, targeted=0.5),
    "100 labels": replace(CONFIG, budget=100, audit_pairs=8),
    "audits from step 1 on": replace(CONFIG, audit_from=1),
    "32 pairs every 4 steps, every 2 while a signal is flagged": SPREAD,
    "the same, half where the model is in doubt": replace(SPREAD, targeted=0.5),
    "32 pairs every 4 steps, whatever the signals say": replace(SPREAD, audit_flagged=4),
}

BOUNDARY = "labels wrong at random, accuracy exactly the threshold"


class Replayed(DriftMonitor):
    """A monitor that reads the signals of a step instead of measuring them."""

    signals: dict[str, float]

    def _measure(self, groups: Sequence[Row]) -> dict[str, float]:
        for name, value in self.signals.items():
            self._state.series.setdefault(name, []).append(value)
        return dict(self.signals)


def replay_all(folder: Path, seeds: Sequence[int], results: Path, workers: int = 1) -> int:
    """Replay every run that is there, and write one result a run."""
    named = [folder / f"{kind}-{seed}.jsonl.gz" for kind in KINDS for seed in seeds]
    paths = [path for path in named if path.exists()]
    if not paths:
        raise UserError(f"{folder}: no runs of these seeds; make some with `run`")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        write_jsonl(results, pool.map(_result, paths))
    return len(paths)


def _result(path: Path) -> Row:
    return result_of(*read_run(path))


def result_of(about: Row, steps: Sequence[Row]) -> Row:
    """Return what the report needs of a run."""
    names = list(dict.fromkeys(name for step in steps for name in step["signals"]))
    series = {name: [step["signals"].get(name) for step in steps] for name in names}
    alarms = {
        name: alarm_of(steps, config, by_gold(steps), seed=about["seed"])
        for name, config in VARIANTS.items()
    }
    if not KINDS[about["kind"]].bad:
        labels = by_chance(1 - CONFIG.threshold, seed=about["seed"])
        alarms[BOUNDARY] = alarm_of(steps, CONFIG, labels, seed=about["seed"])
    return {
        **{name: about[name] for name in ("kind", "seed", "held_out_accuracy")},
        "gold": [round(float(np.mean([g["gold"] for g in step["groups"]])), 3) for step in steps],
        "accuracy": [round(accuracy_of(step), 3) for step in steps],
        "kl": [round(step["kl"], 2) for step in steps],
        "signals": {name: [_short(v) for v in values] for name, values in series.items()},
        "flagged": {name: first_flag(name, values) for name, values in series.items()},
        "alarms": alarms,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def accuracy_of(step: Row) -> float:
    """Return the share of all pairs of different texts that the rewards order as gold does."""
    right: list[float] = []
    for group in step["groups"]:
        row = {"responses": group["texts"], "rewards": group["rewards"]}
        product = pair_differences(row) * pair_differences(row, group["gold"])
        right += np.where(product == 0, 0.5, product > 0).tolist()
    return float(np.mean(right)) if right else 0.5


def first_flag(name: str, values: Sequence[float | None]) -> int | None:
    """Return the first step (from 1) at which a signal is flagged."""
    known = [(step, value) for step, value in enumerate(values, 1) if value is not None]
    for end in range(1, len(known) + 1):
        numbers = [value for _, value in known[:end]]
        found = trend(numbers, baseline=CONFIG.baseline, window=CONFIG.window)
        if found is not None and flagged(name, found, limit=CONFIG.flag):
            return known[end - 1][0]
    return None


Labels = Callable[[Comparison], Outcome]


def by_gold(steps: Sequence[Row]) -> Labels:
    """Label as gold orders the pair."""
    gold = {
        (f"{step['step']}/{place}", str(text)): value
        for step in steps
        for place, group in enumerate(step["groups"])
        for text, value in zip(group["texts"], group["gold"], strict=True)
    }

    def label(pair: Comparison) -> Outcome:
        ours, theirs = (gold[str(pair.prompt), str(text)] for text in (pair.ours, pair.theirs))
        return "tie" if ours == theirs else "win" if ours > theirs else "lose"

    return label


def by_chance(errors: float, *, seed: int) -> Labels:
    """Label against the reward model with this probability, the same for a pair every time."""

    def label(pair: Comparison) -> Outcome:
        drawn = random.Random(json.dumps([seed, pair.prompt, pair.ours, pair.theirs])).random()
        return "lose" if drawn < errors else "win"

    return label


def alarm_of(
    steps: Sequence[Row], config: MonitorConfig, label: Labels, *, seed: int
) -> dict[str, int | None]:
    """Return the step of a monitor's alarm (None: there was none) and its labels."""
    with tempfile.TemporaryDirectory() as folder:
        monitor = Replayed(
            _no_reward,
            Path(folder) / "monitor",
            replace(config, seed=seed),
            answers=lambda pairs: [label(pair) for pair in pairs],
            actions=[],
        )
        for step in steps:
            monitor.signals = step["signals"]
            monitor.see(
                [
                    {
                        "prompt": f"{step['step']}/{place}",
                        "responses": [str(text) for text in group["texts"]],
                        "finished": [True] * len(group["texts"]),
                        "rewards": group["rewards"],
                    }
                    for place, group in enumerate(step["groups"])
                ]
            )
            if monitor.alarmed or monitor.labels >= config.budget - config.audit_pairs + 1:
                break
        monitor.close()
        return {"step": step["step"] if monitor.alarmed else None, "labels": monitor.labels}


def _no_reward(
    prompts: Sequence[str], responses: Sequence[str], *, finished: Sequence[bool]
) -> list[float]:
    raise NotImplementedError("a replayed run scores nothing")
