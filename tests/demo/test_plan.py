"""The plan: arms differ in the reward model of a round and in nothing else."""

import pytest

from shiftrm.pipeline.demo_config import ARMS
from shiftrm.pipeline.demo_plan import plan
from shiftrm.pipeline.demo_run import configure
from shiftrm.pipeline.engine import stage_keys


def by_name(*overrides):
    return {stage.name: stage for stage in plan(configure(list(overrides)))}


def test_needs_come_first_and_exist():
    done = set()
    for stage in plan(configure([f"methods=[{', '.join(ARMS)}]"])):
        assert done.issuperset(stage.needs), stage.name
        assert stage.name not in done
        done.add(stage.name)
    stage_keys(list(by_name().values()), 0)


def test_what_each_arm_reads_for_its_reward_model():
    stages = by_name("rounds=2")
    assert "methods/fixed/round-1/reward_model" not in stages
    reward = {
        arm: stages[f"methods/{arm}/round-2/reward_model"].needs
        for arm in ("retrained", "metarm_paper", "fresh_labels")
    }
    assert reward == {
        "retrained": ("sft", "pairs"),
        "metarm_paper": ("sft", "pairs", "methods/metarm_paper/round-2/groups"),
        "fresh_labels": (
            "sft",
            "pairs",
            "methods/fresh_labels/round-1/labels",
            "methods/fresh_labels/round-2/labels",
        ),
    }


def test_groups_are_of_the_previous_rounds_policy():
    stages = by_name("rounds=3")
    policies = [
        stages[f"methods/metarm_paper/round-{k}/groups"].settings["policy"] for k in (1, 2, 3)
    ]
    assert policies == [
        "sft",
        "methods/metarm_paper/round-1/policy",
        "methods/metarm_paper/round-2/policy",
    ]


def test_arms_get_the_same_ppo_and_the_same_training():
    stages = by_name()
    for kind in ("policy", "evaluation"):
        for number in (1, 2, 3):
            settings = []
            for arm in ("fixed", "retrained", "metarm_paper", "metarm_scale_free", "fresh_labels"):
                found = dict(stages[f"methods/{arm}/round-{number}/{kind}"].settings)
                for own in ("policy", "reward", "before"):
                    found.pop(own, None)
                settings.append(found)
            assert all(s == settings[0] for s in settings)
    training = []
    for arm in ("retrained", "metarm_paper", "metarm_scale_free", "fresh_labels"):
        settings = dict(stages[f"methods/{arm}/round-1/reward_model"].settings)
        settings.pop("preset")
        training.append(settings)
    assert all(s == training[0] for s in training)


def test_the_same_coefficient_option_drops_the_target():
    matched = by_name()["methods/fixed/round-1/policy"].settings["ppo"]
    same = by_name("matched_kl=false")["methods/fixed/round-1/policy"].settings["ppo"]
    assert matched["kl_target"] == 6.0
    assert same["kl_target"] is None
    assert same["kl_coefficient"] == matched["kl_coefficient"]


def test_the_world_follows_the_runs_seed():
    assert by_name("seed=5")["world"].settings["seed"] == 5


@pytest.mark.parametrize("arm", ["retrained", "metarm_paper"])
def test_rounds_keep_their_keys_when_more_rounds_follow(arm):
    short, long = plan(configure(["rounds=1"])), plan(configure(["rounds=2"]))
    name = f"methods/{arm}/round-1/evaluation"
    assert stage_keys(short, 0)[name] == stage_keys(long, 0)[name]
