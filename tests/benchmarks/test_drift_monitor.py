"""The study of the drift monitor: its readings by hand, and a monitor on a run made up for it."""

import json
import random

import pytest

from drift_study import replay, report, runs
from shiftrm.errors import UserError
from tests.docs.test_build import ROOT


def test_peak_and_fall_by_hand():
    gold = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 4.0, 3.0, 2.0]
    # Running means of five: ... step 5: 4.4, 6: 4.6, 7: 4.4, 8: 3.8; 10 % below 4.6 is 4.14.
    assert report.peak_and_fall(gold) == (6, 8)
    assert report.peak_and_fall([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (6, None)


def test_runs_by_name():
    assert runs.parse_runs(["gold:1", "free:0-1"]) == [("free", 0), ("gold", 1), ("free", 1)]
    with pytest.raises(UserError, match="did you mean 'free'"):
        runs.parse_runs(["fre:0"])
    with pytest.raises(UserError, match="write KIND:SEED"):
        runs.parse_runs(["free:x"])


def test_accuracy_counts_different_texts():
    groups = [
        {"texts": [0, 1, 1, 2], "rewards": [1.0, 2.0, 2.0, 3.0], "gold": [1.0, 5.0, 5.0, 1.0]}
    ]
    # Pairs 01 01 12 12 02: right, right, wrong, wrong, and a tie of gold.
    assert replay.accuracy_of({"groups": groups}) == pytest.approx(0.5)


def made_up(accuracy, kind="free", steps=40):
    """A run whose rewards order pairs rightly with a probability that depends on the step."""
    rng = random.Random(1)
    rows = []
    for step in range(1, steps + 1):
        groups = []
        for _ in range(8):
            gold = [rng.random() for _ in range(4)]
            right = rng.random() < accuracy(step)
            rewards = [g if right else -g for g in gold]
            groups.append({"texts": [0, 1, 2, 3], "rewards": rewards, "gold": gold})
        signals = {"spread": 1.0 + 0.01 * rng.random(), "level": 0.1 * step}
        rows.append({"step": step, "kl": 0.1 * step, "signals": signals, "groups": groups})
    return {"kind": kind, "seed": 3, "held_out_accuracy": 0.8}, rows


def test_a_replayed_monitor():
    good = replay.result_of(*made_up(lambda step: 0.95, "gold"))
    assert good["alarms"]["as chosen"]["step"] is None
    bad = replay.result_of(*made_up(lambda step: 0.95 if step < 10 else 0.3))
    found = bad["alarms"]["as chosen"]
    assert 10 <= found["step"] <= 26
    assert found["labels"] <= 200
    assert bad["flagged"]["level"] == 8  # the first step with two whole windows
    assert bad["flagged"]["spread"] is None
    assert replay.BOUNDARY in good["alarms"]
    assert replay.BOUNDARY not in bad["alarms"]


def test_boundary_labels_are_wrong_at_the_threshold():
    label = replay.by_chance(0.25, seed=0)
    pairs = [replay.Comparison(f"p{i}", "a", "b") for i in range(4000)]
    assert sum(label(pair) == "lose" for pair in pairs) / 4000 == pytest.approx(0.25, abs=0.02)
    assert [label(pair) for pair in pairs[:9]] == [label(pair) for pair in pairs[:9]]


def test_area_by_hand():
    def row(kind, seed, now):
        return {"kind": kind, "seed": seed, "signals": {"level": [0.0] * 4 + [now] * 40}}

    rows = [row("free", 0, 3.0), row("kl", 1, 1.0), row("gold", 0, 2.0), row("squashed", 1, 0.0)]
    # 3 > 2, 3 > 0, 1 < 2, 1 > 0.
    assert report.area(rows, "level", report._change).value == pytest.approx(0.75)
    assert report.area(rows[:2], "level", report._change) is None


def test_the_page_says_what_the_results_say():
    """The page's numbers are made from the results that lie beside it."""
    results = ROOT / "benchmarks" / "drift_study" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    page = (ROOT / "docs" / "monitor.md").read_text()
    for block in (report.alarms(rows), report.variants(rows), report.signals(rows)):
        assert block in page
