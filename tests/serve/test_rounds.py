"""A round within somebody else's run: the monitor's alarm, `adapt`, and the server's change."""

import subprocess
import sys

import pytest

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import Scorer, row_responses
from shiftrm.serve.client import RewardClient
from shiftrm.serve.output import RequestLog
from tests.serve.conftest import KEY


@pytest.mark.slow
def test_the_alarm_adapts_and_the_server_changes(
    serving, model, policy, tokenizer, pairs, tmp_path
):
    """RLOO asks the server; from the step of the alarm on, it gets the adapted model's rewards."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from shiftrm.monitor.monitor import DriftMonitor
    from shiftrm.monitor.settings import MonitorConfig

    write_jsonl(tmp_path / "pairs.jsonl", pairs * 4)
    policy.save_pretrained(tmp_path / "policy")
    requests, adapted = RequestLog(tmp_path / "requests.jsonl"), tmp_path / "adapted"
    server = serving(model, token=KEY, log=requests)
    client = RewardClient(server.url, token=KEY, tokenizer=tokenizer)

    def answers(comparisons):
        wrong = client.version.startswith("reward@")
        return ["lose" if wrong else "win"] * len(comparisons)

    def adapt(alarm):
        words = ["--model", model, "--pairs", tmp_path / "pairs.jsonl", "--groups", alarm.groups]
        words += ["--output", adapted, "--method", "contrast", "--sight-pairs", 0]
        words += ["max_steps=2", "learning_rate=1e-2", "per_device_train_batch_size=4"]
        command = [sys.executable, "-m", "shiftrm", "adapt", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        client.reload(str(adapted))
        monitor.model_changed()

    monitor = DriftMonitor(
        client,
        tmp_path / "monitor",
        MonitorConfig(
            threshold=0.7, budget=80, audit_pairs=20, audit_every=2, baseline=2, window=2,
            sight_pairs=8,
        ),
        answers=answers,
        actions=[adapt],
    )  # fmt: skip
    words = ("red", "blue", "green", "small", "large")
    trainer = RLOOTrainer(
        model=str(tmp_path / "policy"),
        reward_funcs=[monitor],
        args=RLOOConfig(
            str(tmp_path / "out"),
            num_generations=4,
            max_completion_length=6,
            per_device_train_batch_size=40,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"the {a} {b}" for a in words for b in words]}),
        processing_class=tokenizer,
    )
    trainer.train()
    log = tmp_path / "monitor" / "errors.log"
    assert monitor.errors == 0, log.read_text()
    events = [row["event"] for row in read_jsonl(tmp_path / "monitor" / "events.jsonl")]
    assert events.count("model_changed") == 1
    assert events.count("alarm") == 1
    assert not monitor.alarmed
    assert client.swaps == 1
    scorers = {"reward": Scorer.from_pretrained(model), "adapted": Scorer.from_pretrained(adapted)}
    by_name = dict.fromkeys(scorers, 0)
    server.close()
    requests.close()
    for asked in read_jsonl(requests.path):  # no request was lost or mixed
        scorer = scorers[asked["version"].partition("@")[0]]
        rows = asked["request"]["rows"]
        responses = [r for row in rows for r in row_responses(row, "row")]
        assert asked["rewards"] == pytest.approx(scorer.score(responses), abs=1e-6)
        by_name[asked["version"].partition("@")[0]] += len(responses)
    assert min(by_name.values()) > 0
    logs = [row for row in trainer.state.log_history if "drift/evidence" in row]
    assert len(logs) == 4
