"""The registered kinds of MetaRM, each trained for a few steps by the job that recipes use."""

from itertools import combinations
from pathlib import Path

import pytest

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.methods.method import METHODS
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.jobs import TrainReward
from shiftrm.trainers.training_log import TRAINING_LOG

BY_EFFECT = ("metarm_by_effect", "metarm_exact", "metarm_random")


@pytest.fixture
def files(policy, tokenizer, pairs, groups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy.save_pretrained("sft")
    tokenizer.save_pretrained("sft")
    write_jsonl("pairs.jsonl", pairs)
    write_jsonl("groups.jsonl", groups)


@pytest.mark.parametrize("name", BY_EFFECT)
def test_methods_by_effect_log_what_a_step_did(files, name):
    settings = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "meta_loss_rise": 1e3}
    TrainReward(
        "sft", "pairs.jsonl", groups="groups.jsonl", adaptation=name, settings=settings
    ).run(Path(name))
    logged = [row for row in read_jsonl(Path(name) / TRAINING_LOG) if "meta_rho" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    for row in logged:
        assert row["meta_rho"] > 0
        if name == "metarm_random":
            assert "meta_growth" not in row, "that of the gradient's step, which was not taken"
        else:
            assert 1.45 <= row["meta_growth"] <= 1.55
    assert ("meta_second_order" in logged[0]) == (name == "metarm_exact")


def test_random_steps_as_long_as_metarms_spread_rewards_less(files, groups):
    spread = {}
    for name in ("metarm_by_effect", "metarm_random"):
        settings = {"max_steps": 1, "learning_rate": 0.0, "report_to": "none"}
        TrainReward(
            "sft", "pairs.jsonl", groups="groups.jsonl", adaptation=name, settings=settings
        ).run(Path(name))
        scorer = Scorer.from_pretrained(name)
        rewards = [scorer([g["prompt"]] * len(g["responses"]), g["responses"]) for g in groups]
        spread[name] = sum((a - b) ** 2 for group in rewards for a, b in combinations(group, 2))
    assert spread["metarm_random"] < spread["metarm_by_effect"]


def test_each_has_a_look_of_its_own():
    methods = [METHODS.get(name) for name in METHODS.names() if name.startswith("metarm")]
    assert len({(m.colour, m.marker) for m in methods}) == len(methods) == 7
