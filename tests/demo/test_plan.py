"""The demo's plan: arms differ in the reward model of a round and in nothing else."""

import pytest

from shiftrm.methods.method import METHODS
from shiftrm.pipeline.engine import random_seed, stage_keys
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe

CONTRAST = "contrast_all_log_sigmoid"
TRAINED = ("retrained", "metarm_paper", CONTRAST, "fresh_labels")


def stages(*overrides):
    return plan(read_recipe("gold_demo", list(overrides)))


def by_name(*overrides):
    return {stage.name: stage for stage in stages(*overrides)}


def test_needs_come_first_and_exist():
    done = set()
    for stage in stages(f"methods=[{', '.join([*METHODS.names(), 'dpo'])}]"):
        assert done.issuperset(stage.needs), stage.name
        assert stage.name not in done
        done.add(stage.name)
    stage_keys(stages(), 0)


def test_what_each_arm_reads_for_its_reward_model():
    found = by_name("rounds=2")
    assert "methods/fixed/round-1/reward_model" not in found
    reward = {arm: found[f"methods/{arm}/round-2/reward_model"].needs for arm in TRAINED}
    assert reward == {
        "retrained": ("sft", "pairs"),
        "metarm_paper": ("sft", "pairs", "methods/metarm_paper/round-2/groups"),
        CONTRAST: ("sft", "pairs", f"methods/{CONTRAST}/round-2/groups"),
        "fresh_labels": ("sft", "methods/fresh_labels/round-2/labels", "pairs"),
    }
    labels = [found[f"methods/fresh_labels/round-{k}/labels"].needs for k in (1, 2)]
    assert labels == [
        ("methods/fresh_labels/round-1/samples", "pairs"),
        ("methods/fresh_labels/round-2/samples", "methods/fresh_labels/round-1/labels"),
    ]


@pytest.mark.parametrize(("arm", "made"), [("metarm_paper", "groups"), ("fresh_labels", "samples")])
def test_an_arm_samples_from_the_previous_rounds_policy(arm, made):
    found = by_name("rounds=3")
    policies = [str(job_of(found[f"methods/{arm}/round-{k}/{made}"]).policy) for k in (1, 2, 3)]
    before = [f"methods/{arm}/round-{k}/policy/model" for k in (1, 2)]
    assert policies == ["sft/model", *before]


def test_arms_get_the_same_policy_training_and_the_same_reward_training():
    found = by_name()
    for number in (1, 2, 3):
        jobs = [
            job_of(found[f"methods/{arm}/round-{number}/policy"])
            for arm in ("fixed", *TRAINED, "gold")
        ]
        shaped = [job.settings.get("reward_shaping") for job in jobs]
        assert shaped == [None, None, None, "log_sigmoid", None, None]
        settings = [
            {key: value for key, value in job.settings.items() if key != "reward_shaping"}
            for job in jobs
        ]
        assert len({str(one) for one in settings}) == 1
        assert len({(str(job.prompts), str(job.scale), job.watch) for job in jobs}) == 1
    settings = [dict(job_of(found[f"methods/{a}/round-1/reward_model"]).settings) for a in TRAINED]
    own = ("preset", "meta_batch_size", "contrast_negatives", "contrast_share")
    assert len({str({k: v for k, v in s.items() if k not in own}) for s in settings}) == 1
    assert settings[0]["seed"] == random_seed(0, "reward/1")


def test_a_method_shapes_the_reward_and_an_arm_resets_the_reference():
    arms = "{shaped: {reward: log_sigmoid}, reset: {reward: fixed, reference_reset: true}}"
    found = by_name("rounds=2", f"methods={arms}")
    shaped, reset = (job_of(found[f"methods/{arm}/round-2/policy"]) for arm in ("shaped", "reset"))
    assert shaped.settings["reward_shaping"] == "log_sigmoid"
    assert "reward_shaping" not in reset.settings
    assert str(shaped.reference) == "sft/model"
    assert str(reset.reference) == str(reset.policy) == "methods/reset/round-1/policy/model"
    measured = found["methods/reset/round-2/evaluation"].settings["inputs"]
    assert measured["reference"] == {"stage": "sft", "file": "model"}


def test_the_gold_arm_trains_on_gold_and_no_reward_model():
    found = by_name("methods=[gold]")
    assert job_of(found["methods/gold/round-1/policy"]).reward == "gold"
    assert "methods/gold/round-1/reward_model" not in found


def test_the_world_follows_the_runs_seed():
    assert by_name("seed=5")["data"].settings["files"]["seed"] == 5


@pytest.mark.parametrize("arm", ["retrained", "metarm_paper"])
def test_later_rounds_change_no_earlier_reward_model_but_its_data(arm):
    """Another number of rounds is another run: the prompts of all rounds are drawn at the start."""
    short, long = (by_name(f"rounds={k}") for k in (1, 2))
    for made in ("reward_model", "policy", "evaluation"):
        name = f"methods/{arm}/round-1/{made}"
        assert short[name].settings == long[name].settings
