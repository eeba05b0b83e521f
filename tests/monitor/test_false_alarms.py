"""False alarms of the whole monitor, in runs whose accuracy is exactly the threshold."""

import math
import os

import numpy as np
import pytest

from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig

THRESHOLD, ALPHA = 0.6, 0.05


def alarmed(folder, seed, prompts, responses, *, steps, spread=None, **settings):
    """Watch a run whose labels agree with the rewards with a probability of 0.6.

    Args:
        spread: (a, b): every prompt has a probability of its own, from a beta distribution.
    """
    rng = np.random.default_rng(seed)
    agrees: dict[str, float] = {}

    def reward(prompts, responses, *, finished):
        return rng.normal(size=len(responses))

    def labels(pairs):
        rates = [agrees.setdefault(p.prompt, rng.beta(*spread)) if spread else 0.6 for p in pairs]
        return ["win" if rng.random() < rate else "lose" for rate in rates]

    config = MonitorConfig(
        **{"threshold": THRESHOLD, "alpha": ALPHA, "audit_every": 6, "signals": (), "seed": seed}
        | settings
    )
    monitor = DriftMonitor(reward, folder, config, answers=labels, actions=[])
    for step in range(steps):
        names = [f"{step} {p}" for p in range(prompts) for _ in range(responses)]
        monitor(names, [f"text {k} of {step}" for k in range(len(names))])
        if monitor.alarmed or len(monitor._state.audits) == config.audits:
            break
    monitor.close()
    assert monitor.errors == 0
    return monitor.alarmed, monitor.labels


CASES = {
    "2 prompts of 2": (2, 2, {}),
    "4 prompts of 2": (4, 2, {}),
    "8 prompts of 4, easy and hard ones": (8, 4, {"spread": (0.6, 0.4)}),
    "16 prompts of 4": (16, 4, {"audit_every": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_false_alarms(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    prompts, responses, settings = CASES[name]
    runs = 12
    found = [
        alarmed(tmp_path / str(seed), seed, prompts, responses, steps=70, **settings)
        for seed in range(runs)
    ]
    alarms = sum(alarm for alarm, _ in found)
    labels = [n for alarm, n in found if not alarm]
    assert min(labels) >= 50  # there was something to find
    assert alarms <= runs * ALPHA + 2 * math.sqrt(runs * ALPHA * (1 - ALPHA))


@pytest.mark.parametrize("right", [0.1, 0.5, 0.95])
def test_a_verifier_that_is_always_right(right, tmp_path):
    """Rewards of 0 and 1, most pairs tied: the labels agree with every pair that is ordered."""
    rng = np.random.default_rng(0)

    def verifier(prompts, completions, **_):
        return [float("right" in text) for text in completions]

    def truth(pairs):
        scores = [verifier(None, [p.ours, p.theirs]) for p in pairs]
        return ["tie" if a == b else "win" if a > b else "lose" for a, b in scores]

    config = MonitorConfig(audit_every=2, signals=())
    monitor = DriftMonitor(verifier, tmp_path, config, answers=truth, actions=[])
    for step in range(20):
        texts = [f"{'right' if rng.random() < right else 'wrong'} {i} {step}" for i in range(128)]
        monitor([f"{step} {i // 8}" for i in range(128)], texts)
    assert monitor.labels > 40
    assert monitor.evidence.accuracy == 1.0
    assert monitor.evidence.value < 1.0
    assert monitor.evidence.answers == monitor.labels


def test_one_label_is_no_evidence(tmp_path):
    """A pool of one pair: nothing is asked, and nothing is counted twenty times."""
    asked = []

    def person(pairs):
        asked.extend(pairs)
        return ["lose"] * len(pairs)

    config = MonitorConfig(audit_every=1, signals=())
    monitor = DriftMonitor(lambda prompts, completions, **_: [1.0, 2.0], tmp_path, config,
                           answers=person)  # fmt: skip
    for _ in range(3):
        monitor(["p", "p"], ["a", "b"])
    assert (asked, monitor.labels, monitor.evidence.value) == ([], 0, 1.0)


def test_small_batches_wait_for_pairs_and_say_so(tmp_path):
    config = MonitorConfig(audit_every=2, signals=(), budget=40)
    monitor = DriftMonitor(lambda prompts, completions, **_: [1.0, 2.0], tmp_path, config)
    for step in range(5):  # one prompt a step; an audit needs five pairs
        assert monitor.labels == 0
        monitor([f"p{step}"] * 2, ["a", "b"])
    assert monitor.labels == 5
    for _ in range(13):
        monitor(["p"] * 2, ["a", "b"])
    with pytest.warns(UserWarning, match="no audit for 14 steps. One needs 5 .* there are 1"):
        monitor(["p"] * 2, ["a", "b"])
