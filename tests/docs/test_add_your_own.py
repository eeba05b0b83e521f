"""Every example of "Add your own" works from outside the package, by its import path."""

import math
import re

import pytest
import torch

from shiftrm.files import write_jsonl
from tests.docs.blocks import blocks
from tests.docs.test_build import DOCS

PAGE = DOCS / "add-your-own.md"
FILES = {block.file: block for block in blocks(PAGE) if block.file}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The files of the page in a folder of their own, which is on Python's path."""
    for name, block in FILES.items():
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_examples_are_short(name):
    assert len(FILES[name].text.splitlines()) <= 30


def test_every_section_has_an_example_and_a_test():
    sections = re.findall(r"^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    modules = [name for name in FILES if name.endswith(".py")]
    assert len(modules) == len(sections)
    for name in modules:
        assert f"test_{name.removesuffix('.py')}" in globals(), name


def test_my_method(outside, policy, tokenizer, pairs):
    from shiftrm.methods.method import METHODS
    from shiftrm.models.scoring import Scorer
    from shiftrm.pipeline.jobs import TrainReward

    assert METHODS.get("my_method:SMALL").label == "Small rewards"
    policy.save_pretrained("sft")
    tokenizer.save_pretrained("sft")
    write_jsonl("pairs.jsonl", pairs)
    settings = {"max_steps": 30, "learning_rate": 1e-2, "report_to": "none"}
    size = {}
    for name in ("my_method:SMALL", "retrained"):
        out = outside / name.replace(":", "-")
        TrainReward("sft", "pairs.jsonl", adaptation=name, settings=settings).run(out)
        scorer = Scorer.from_pretrained(out)
        rewards = scorer([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
        size[name] = sum(r * r for r in rewards) / len(rewards)
    assert size["my_method:SMALL"] < size["retrained"]


def test_my_objective(outside, policy, tokenizer, pairs, groups):
    from datasets import Dataset

    from shiftrm import MetaRMConfig, MetaRMTrainer
    from shiftrm.core.objectives import OBJECTIVES

    rewards = torch.tensor([[1.0, 3.0, math.nan]])
    value = OBJECTIVES.get("my_objective:spread")(rewards, mask=~rewards.isnan())
    assert value.tolist() == pytest.approx([math.tanh(1.0)])

    policy.save_pretrained("sft")
    tokenizer.save_pretrained("sft")
    args = MetaRMConfig(
        "out",
        preset="scale_free",
        meta_objective="my_objective:spread",
        max_steps=2,
        logging_steps=1,
        report_to="none",
    )
    write_jsonl("groups.jsonl", groups)
    trainer = MetaRMTrainer(
        "sft", args, train_dataset=Dataset.from_list(pairs), meta_dataset="groups.jsonl"
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "meta_objective" in log]
    assert len(logs) == 2
    assert all(log["meta_objective_after"] > log["meta_objective"] for log in logs)


def test_my_negative(outside, groups):
    from shiftrm.data.negatives import negative_pairs

    pairs = negative_pairs(groups, "my_negative:BACKWARDS", 4)
    assert len(pairs) == 4
    for pair in pairs:
        assert pair["rejected"].split() == pair["chosen"].split()[::-1] != pair["chosen"].split()


def test_my_feature():
    from shiftrm.measure.features import Reading, TextFeature
    from shiftrm.registry import Registry

    features = Registry("text feature", TextFeature)
    line = re.search(r"`(FEATURES\.register\(.*?\)\)\))`", PAGE.read_text(encoding="utf-8"), re.S)
    eval(line[1], {"FEATURES": features, "TextFeature": TextFeature})
    assert features.get("commas").measure(Reading("Why?", "One, two, three.")) == 2


def test_my_advantage(outside):
    from shiftrm.policies.advantages import ADVANTAGES
    from tests.policies.test_ppo import make_trainer

    rewards = torch.tensor([[1.0, 2.0], [5.0, math.nan]])
    advantages, returns = ADVANTAGES.get("my_advantage:above_mean")(
        rewards, rewards, ~rewards.isnan(), gamma=1.0, lam=1.0, group_size=2
    )
    assert advantages.tolist() == [[-1.0, -1.0], [1.0, 0.0]]
    assert returns.tolist() == [[3.0, 2.0], [5.0, 0.0]]
    logs = make_trainer(advantage="my_advantage:above_mean").train()
    assert all(math.isfinite(log.policy_loss) for log in logs)


def test_my_format(outside):
    from shiftrm.data.named import load

    loaded = load("my_format:ANSWERS", "answers.jsonl", kind="pairs")
    assert [row["chosen"] for row in loaded.rows] == [" Blue.", " A pear."]
    assert loaded.counts() == {"not_two_answers": 1}


def test_my_metric(outside, capsys):
    from shiftrm.metrics import Better, metric
    from shiftrm.records import read_records

    [use] = [block for block in blocks(PAGE) if block.text.startswith("from my_metric")]
    exec(compile(use.text, use.where, "exec"), {})
    assert capsys.readouterr().out == "Polite responses 0.5\n"
    assert metric("polite_share").better is Better.HIGHER
    [record] = read_records("polite.jsonl")
    assert (record.value, record.n) == (0.5, 2)
