"""Every way to make a round's reward model, as arms of one small run."""

import shutil

import pytest

from shiftrm.cli import main
from shiftrm.config import from_mapping
from shiftrm.files import read_jsonl
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings
from shiftrm.records import read_records
from tests.pipeline.gold_world import recipe, write_recipe

LATER = ("policy_init", "ocrm", "self_labelled", "reference_reset")
"""What these do in the second round depends on the first."""

ARMS = {
    **{name: {"reward": name, "rounds": 2} for name in LATER},
    **{name: {"reward": name} for name in ("retrained", "bsr", "grm", "clip")},
    "mine": {"reward": "contrast", "policy_settings": {"reward_shaping": "log_sigmoid"}},
}


def stages(world, **sections):
    found = plan(from_mapping(Experiment, recipe(world, **sections)))
    check_settings(found)
    return {stage.name: stage for stage in found}


def test_a_combination_is_one_line_of_yaml(world):
    found = stages(world, methods={"mine": ARMS["mine"]})
    reward = job_of(found["methods/mine/round-1/reward_model"])
    policy = job_of(found["methods/mine/round-1/policy"])
    assert reward.adaptation == "contrast"
    assert str(reward.groups) == "methods/mine/round-1/groups/groups.jsonl"
    assert policy.settings["reward_shaping"] == "log_sigmoid"
    plain = stages(world, methods={"contrast": {"reward": "contrast"}})
    alone = job_of(plain["methods/contrast/round-1/policy"])
    assert {**alone.settings, "reward_shaping": "log_sigmoid"} == policy.settings


def test_where_rounds_start_and_what_the_kl_is_to(world):
    found = stages(world, rounds=2, methods=ARMS)

    def reward(name):
        return job_of(found[f"methods/{name}/round-2/reward_model"])

    def first(name, stage):
        return f"methods/{name}/round-1/{stage}/model"

    assert str(reward("policy_init").model) == first("policy_init", "policy")
    assert reward("policy_init").adaptation is None
    assert str(reward("self_labelled").model) == first("self_labelled", "reward_model")
    ocrm = reward("ocrm")
    assert (str(ocrm.model), str(ocrm.reference)) == ("sft/model", "sft/model")
    assert str(ocrm.policy) == first("ocrm", "policy")
    for name in ARMS:
        job = job_of(found[f"methods/{name}/round-2/policy"])
        reset = name in ("ocrm", "reference_reset")
        assert str(job.reference) == (first(name, "policy") if reset else "sft/model"), name
    assert job_of(found["methods/clip/round-1/policy"]).settings["reward_shaping"] == "clip"


@pytest.mark.slow
def test_a_run_of_all_and_a_stage_that_was_killed(world, tmp_path, here, capsys, monkeypatch):
    path = write_recipe(tmp_path / "mine.yaml", world, methods=ARMS)
    output = tmp_path / "run"
    assert main(["run", str(path), "--output", str(output)]) == 0, capsys.readouterr().err
    records = read_records(output / "records.jsonl")
    seen = {(r.method, r.round) for r in records if r.stage == "evaluate" and r.metric == "kl"}
    expected = {(name, k) for name in ARMS for k in range(1, ARMS[name].get("rounds", 1) + 1)}
    assert expected <= seen

    def weights(name, number=1):
        folder = output / "methods" / name / f"round-{number}" / "reward_model" / "model"
        return (folder / "model.safetensors").read_bytes()

    # In round 1 today's policy is the SFT policy: both are plain retraining there.
    assert weights("policy_init") == weights("ocrm") == weights("retrained") == weights("clip")
    assert len({weights(n) for n in ("retrained", "bsr", "grm", "self_labelled", "mine")}) == 5
    assert weights("policy_init", 2) != weights("reference_reset", 2) != weights("ocrm", 2)
    shares = [
        r.value for r in records if r.method == "ocrm" and r.metric == "effective_sample_share"
    ]
    assert shares[0] == pytest.approx(1.0)
    assert 0 < shares[-1] <= 1

    stage = output / "methods" / "ocrm" / "round-2" / "reward_model"
    before, log = weights("ocrm", 2), read_jsonl(stage / "model" / "training_log.jsonl")
    again = redo(stage, monkeypatch)
    assert (again / "model.safetensors").read_bytes() == before
    assert read_jsonl(again / "training_log.jsonl")[-1]["loss"] == log[-1]["loss"]


def redo(stage, monkeypatch):
    """Train the stage's reward model again, by its command, stopped at its second step once."""
    import json
    import shlex

    from transformers import Trainer

    card = (stage / "model" / "README.md").read_text()
    [command] = [line for line in card.splitlines() if line.startswith("shiftrm train")]
    words = shlex.split(command)[1:]
    out = stage.parent / "again"
    words[words.index("--output") + 1] = str(out)
    words += ["save_strategy=steps", "save_steps=1"]
    plain = Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    assert main(words) != 0
    work = out.with_name(f".{out.name}.work")
    assert (work / "checkpoint-1").is_dir()
    assert "policy" in json.loads((work / "run.json").read_text())["data"]
    monkeypatch.setattr(Trainer, "training_step", plain)
    assert main(words) == 0
    shutil.rmtree(stage.parent / "unused", ignore_errors=True)
    return out
