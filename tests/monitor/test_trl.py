"""The monitor in TRL's own trainers: the same run as without it, its log, and the stop."""

import math
from dataclasses import replace

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaForCausalLM

from shiftrm.files import read_jsonl
from shiftrm.monitor.callback import StopOnDrift
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import SIGNALS
from tests.conftest import llama_config

KINDS = {
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}
SETTINGS = {
    "num_generations": 4,
    "max_completion_length": 6,
    "per_device_train_batch_size": 64,
    "learning_rate": 0.01,
    "max_steps": 5,
    "logging_steps": 1,
}
WORDS = [
    f"{a} {b}" for a in ("red", "blue", "green", "small") for b in ("one", "house", "and", "is")
]
SMALL = MonitorConfig(
    threshold=0.7, budget=48, audit_pairs=8, audit_every=1, baseline=2, window=2, sight_pairs=8
)
ALL = replace(SMALL, signals=tuple(SIGNALS.names()))


def lengths(prompts, completions, completion_ids, weight, **_):
    """A reward function of TRL with a column of the data set."""
    assert len(weight) == len(prompts)
    return [w * len(c) for c, w in zip(completions, weight, strict=True)]


def model(folder):
    """The same tiny policy each time; RLOO loads its reference from the policy's folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def trained(kind, arguments, tokenizer, reward, callbacks=(), **settings):
    trainer_class, config = KINDS[kind]
    rows = [{"prompt": f"the {w}", "weight": 1.0} for w in WORDS]
    args = arguments(config, **{**SETTINGS, **settings})
    trainer = trainer_class(
        model(f"{args.output_dir}-policy"),
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_same(kind, tokenizer, arguments, tmp_path):
    alone = trained(kind, arguments, tokenizer, lengths)
    monitor = DriftMonitor(
        lengths, tmp_path / "m", ALL, answers=lambda p: ["win"] * len(p), name="first"
    )
    watched = trained(kind, arguments, tokenizer, monitor)
    for ours, theirs in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    steps = read_jsonl(tmp_path / "m" / "steps.jsonl")
    assert len(steps) == 5
    assert monitor.errors == 0, (tmp_path / "m" / "errors.log").read_text()
    logs = [row for row in watched.state.log_history if "drift/first/evidence" in row]
    assert [row["drift/first/spread"] for row in logs] == pytest.approx(
        [row["signals"]["spread"] for row in steps], rel=1e-5
    )
    assert [row["drift/first/alarm"] for row in logs] == [0.0] * 5
    assert "rewards/first/mean" in logs[0]
    assert all(math.isfinite(row["drift/first/sight_repeated"]) for row in logs)


def test_the_alarm_stops_the_trainer(tokenizer, arguments, tmp_path):
    monitor = DriftMonitor(
        lengths, tmp_path / "m", SMALL, answers=lambda p: ["lose"] * len(p), actions=[]
    )
    trainer = trained("grpo", arguments, tokenizer, monitor, [StopOnDrift(monitor)])
    alarm = read_jsonl(tmp_path / "m" / "events.jsonl")[-1]
    assert alarm["event"] == "alarm"
    assert trainer.state.global_step == alarm["step"] < 5


def test_a_resumed_run_goes_on(tokenizer, arguments, tmp_path):
    answers = {"answers": lambda p: ["win"] * len(p)}
    first = DriftMonitor(lengths, tmp_path / "m", SMALL, **answers)
    trained("grpo", arguments, tokenizer, first, max_steps=2)
    first.close()
    again = DriftMonitor(lengths, tmp_path / "m", SMALL, **answers)
    trained("grpo", arguments, tokenizer, again, max_steps=2)
    assert [row["step"] for row in read_jsonl(tmp_path / "m" / "steps.jsonl")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "m" / "audits").iterdir())) == 4


def test_a_reward_model(tokenizer, arguments, tmp_path, reward_folder):
    """The one line of the documentation: a reward model's folder."""
    monitor = DriftMonitor(reward_folder, tmp_path / "m", SMALL)
    trained("rloo", arguments, tokenizer, monitor, max_steps=2)
    assert {"spread", "sight_other_prompt"} <= read_jsonl(tmp_path / "m" / "steps.jsonl")[0][
        "signals"
    ].keys()


@pytest.fixture
def reward_folder(tokenizer, tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    reward = LlamaForSequenceClassification(llama_config(num_labels=1))
    with torch.no_grad():
        reward.score.weight.normal_()
    reward.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_a_coroutine_function(tokenizer, arguments, tmp_path):
    async def later(prompts, completions, completion_ids, **_):
        return [float(len(c)) for c in completions]

    monitor = DriftMonitor(later, tmp_path / "m", SMALL)
    trained("grpo", arguments, tokenizer, monitor, max_steps=2)
    assert len(read_jsonl(tmp_path / "m" / "steps.jsonl")) == 2
