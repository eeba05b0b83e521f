"""The whole loop: an alarm in TRL's RLOO has the reward model adapted, and the server swaps it."""

import subprocess
import sys

import pytest

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import Scorer
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.rewards import TrlReward, open_reward
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.serve.client import RewardClient
from tests.monitor.test_trl import trained
from tests.serve.conftest import KEY, model, serving

__all__ = ["model", "serving"]

SMALL = MonitorConfig(
    threshold=0.7, budget=48, audit_pairs=8, audit_every=1, baseline=2, window=2, sight_pairs=8
)


def test_a_client_is_called_as_trl_calls_it(tokenizer):
    """It reads the sampled tokens in a batch, and scores changed texts as responses."""
    client = RewardClient("http://127.0.0.1:1", tokenizer=tokenizer)
    reward = open_reward(client)
    assert isinstance(reward, TrlReward)
    assert reward.score({}) is client


@pytest.mark.slow
def test_adapted_and_swapped_within_a_run(serving, model, tokenizer, arguments, pairs, tmp_path):
    server = serving(model, token=KEY)
    client = RewardClient(server.url, token=KEY, tokenizer=tokenizer)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    adapted = tmp_path / "adapted"

    def adapt_and_swap(alarm):
        words = ["--pairs", str(tmp_path / "pairs.jsonl"), "--groups", str(alarm.groups)]
        words += ["--eval-groups", str(alarm.groups), "--sight-pairs", "0"]
        words += ["--model", str(model), "--method", "contrast", "--output", str(adapted)]
        # In a process of its own: a second trainer would reset the state of this one.
        subprocess.run(
            [sys.executable, "-m", "shiftrm", "adapt", *words, "max_steps=2"],
            check=True,
            capture_output=True,
        )
        client.reload(str(adapted))
        monitor.model_changed()

    def answers(pairs):
        """Wrong about the first model, right about the second."""
        return ["win" if adapted.exists() else "lose"] * len(pairs)

    monitor = DriftMonitor(client, tmp_path / "m", SMALL, answers=answers, actions=[adapt_and_swap])
    trained("rloo", arguments, tokenizer, monitor)
    assert monitor.errors == 0, (tmp_path / "m" / "errors.log").read_text()
    events = [row["event"] for row in read_jsonl(tmp_path / "m" / "events.jsonl")]
    assert {"alarm", "model_changed"} <= set(events)
    assert not monitor.alarmed
    assert client.version.startswith("adapted@")
    assert client.swaps == 1
    # The frozen responses of the step with the alarm were scored again, by the adapted model.
    probe = read_jsonl(tmp_path / "m" / "probe.jsonl")
    score = Scorer.from_pretrained(adapted)
    for row in probe[:2]:
        texts = row["responses"]
        wanted = score([row["prompt"]] * len(texts), texts, finished=row["finished"])
        assert row["rewards"] == pytest.approx(wanted, abs=1e-5)
