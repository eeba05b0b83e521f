"""The words of every command, for each way a recipe can be set."""

import json
from pathlib import Path

import pytest

from shiftrm.config import from_mapping
from shiftrm.errors import UserError
from shiftrm.models.sampling import SamplingConfig
from shiftrm.models.templates import packaged
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.jobs import (
    Made,
    Optimise,
    Sample,
    Sft,
    TrainReward,
    from_plain,
    inputs_of,
    is_training,
    located,
    plain,
)
from shiftrm.pipeline.launch import Execution, accumulation, launcher, out_of_memory_line
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, read_recipe
from tests.pipeline.conftest import RECIPES
from tests.pipeline.gold_world import recipe


def stages(world, **sections):
    found = plan(from_mapping(Experiment, recipe(world, **sections)))
    check_settings(found)
    return {stage.name: stage for stage in found}


def all_words(stage):
    """The command of a stage, the settings of this machine included."""
    return job_of(stage).on_machine(stage.execution["way"]).command("out")


def words_of(stage):
    job = job_of(stage)
    return [] if job is None else job.command("out")


SFT, REWARD, SAMPLE = Sft("m", "d"), TrainReward("m", "p"), Sample("m", "p")

ARMS = {
    "fixed": {"reward": "fixed"},
    "retrained": {"reward": "retrained"},
    "metarm": {"reward": "metarm", "settings": {"meta_learning_rate": 1e-6}},
    "dpo": {"reward": "fixed", "policy": "dpo"},
}


def test_each_arm_has_its_stages(world):
    found = stages(world, methods=ARMS, rounds=2)
    assert [n for n in found if n.startswith("methods/fixed")] == [
        f"methods/fixed/round-{k}/{name}"
        for k in (1, 2)
        for name in ("policy", "responses", "evaluation")
    ]
    assert "methods/retrained/round-2/reward_model" in found
    assert "methods/retrained/round-2/groups" not in found
    assert "methods/dpo/round-2/policy" not in found
    retrained = words_of(found["methods/retrained/round-1/reward_model"])
    assert "--groups" not in retrained
    metarm = words_of(found["methods/metarm/round-2/reward_model"])
    assert "methods/metarm/round-2/groups/groups.jsonl" in metarm
    assert {"meta_learning_rate=1e-06", "preset=paper"} <= set(metarm)
    # The groups are of the policy that the round began with (arXiv 2405.00438, settings).
    sampled = words_of(found["methods/metarm/round-2/groups"])
    assert "methods/metarm/round-1/policy/model" in sampled
    first = words_of(found["methods/metarm/round-1/groups"])
    assert "sft/model" in first
    # Every round's reward model begins at SFT, every policy at the last one; the KL is to SFT.
    assert metarm[:3] == ["train", "--model", "sft/model"]
    policy = words_of(found["methods/metarm/round-2/policy"])
    assert policy[2:6] == [
        *("--policy", "methods/metarm/round-1/policy/model"),
        *("--reference", "sft/model"),
    ]


def test_arms_share_their_draws(world):
    found = stages(world, methods=ARMS, rounds=2)
    for what in ("policy", "responses"):
        seeds = {
            next(w for w in words_of(found[f"methods/{arm}/round-2/{what}"]) if "seed" in w)
            for arm in ("fixed", "retrained", "metarm")
        }
        assert len(seeds) == 1
    words = [words_of(found[f"methods/fixed/round-{k}/policy"]) for k in (1, 2)]
    assert words[0][-1] != words[1][-1]


@pytest.mark.parametrize("preset", ["paper", "scale_free", "adaptive"])
def test_presets_are_the_adapting_arms(world, preset):
    found = stages(world, methods=ARMS, preset=preset)
    said = [n for n, s in found.items() if f"preset={preset}" in words_of(s)]
    assert said == ["methods/metarm/round-1/reward_model"]


def test_an_arm_may_be_any_registered_method_or_one_from_outside(world, tmp_path, monkeypatch):
    (tmp_path / "my_arms.py").write_text(
        "from shiftrm.methods.method import Method\n"
        "from shiftrm.trainers.kinds import Training\n"
        "from shiftrm.trainers.reward import RewardConfig, RewardTrainer\n"
        "def mine(): return Training(RewardConfig, RewardTrainer)\n"
        "METHOD = Method('Mine', 'mine', '#112233', 'o', frozenset({'pairs'}), mine,\n"
        "                {'weight_decay': 0.1})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arms = {"free": {"reward": "metarm_scale_free"}, "mine": {"reward": "my_arms:METHOD"}}
    found = stages(world, methods=arms)
    free = words_of(found["methods/free/round-1/reward_model"])
    assert "preset=scale_free" in free
    assert "--groups" in free
    mine = words_of(found["methods/mine/round-1/reward_model"])
    assert mine[mine.index("--method") + 1] == "my_arms:METHOD"
    assert "weight_decay=0.1" in mine
    assert "--groups" not in mine
    assert "methods/mine/round-1/groups" not in found
    with pytest.raises(UserError, match="which needs labels"):
        stages(world, methods={"x": {"reward": "fresh_labels"}})


def test_lora_is_every_models(world):
    found = stages(world, methods=ARMS, lora={"lora_r": 4, "lora_target_modules": ["q_proj"]})
    trained = [s for s in found.values() if is_training(job_of(s))]
    assert len(trained) == 8
    for stage in trained:
        wanted = {"use_peft=true", "lora_r=4", 'lora_target_modules=["q_proj"]'}
        assert wanted <= set(words_of(stage)), stage.name


def test_trls_optimisers_have_the_recipes_batch_and_sampling(world):
    policy = {"method": "rloo", "batch_size": 8, "settings": {"num_generations": 4, "beta": 0.1}}
    found = stages(
        world,
        policy=policy,
        sampling={"temperature": 0.8, "max_new_tokens": 6},
        execution={"micro_batch_size": 2, "processes": 2},
    )
    words = all_words(found["methods/fixed/round-1/policy"])
    assert words[:2] == ["optimise", "rloo"]
    assert {
        *("num_generations=4", "beta=0.1", "temperature=0.8", "max_completion_length=6"),
        *("per_device_train_batch_size=2", "gradient_accumulation_steps=2"),
    } <= set(words)


def test_an_arm_may_have_another_optimiser(world):
    arm = {"reward": "fixed", "policy": "grpo", "policy_settings": {"num_generations": 4}}
    found = stages(world, methods={"fixed": {"reward": "fixed"}, "grpo": arm})
    words = all_words(found["methods/grpo/round-1/policy"])
    assert words[:2] == ["optimise", "grpo"]
    assert "num_generations=4" in words
    assert not any(word.startswith("rollouts_per_prompt") for word in words)


def test_a_fine_tuned_model_is_taken_as_it_is(world):
    found = stages(world, sft=None, data={**recipe(world)["data"], "demonstrations": None})
    assert "sft" not in found
    words = words_of(found["reward_model"])
    assert words[:3] == ["train", "--model", str(world / "base_model")]


def test_gold_watches_the_policy(world):
    found = stages(world, methods=ARMS, evaluation={"gold": "gold", "best_of_n": 8})
    words = words_of(found["methods/metarm/round-1/policy"])
    assert words[words.index("--watch") + 1] == "gold"
    assert "--watch" not in words_of(found["methods/dpo/round-1/policy"])
    sampled = words_of(found["best_of_n/responses"])
    assert sampled[sampled.index("--responses") + 1] == "8"


def test_execution_changes_no_stage(world):
    plain = list(stages(world, methods=ARMS).values())
    other = list(
        stages(
            world,
            methods=ARMS,
            execution={"processes": 2, "micro_batch_size": 1, "sampling_batch_size": 3},
            judge={"concurrency": 1},
        ).values()
    )
    assert stage_keys(plain, 0) == stage_keys(other, 0)
    assert [all_words(s) for s in plain if job_of(s)] != [all_words(s) for s in other if job_of(s)]


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "expected"),
    [
        (32, 1, 4, (4, 8)),
        (32, 8, 4, (4, 1)),
        (6, 1, 4, (3, 2)),
        (7, 1, 4, (1, 7)),
        (2, 2, 4, (1, 1)),
    ],
)
def test_accumulation_makes_the_batch(batch, processes, micro, expected):
    execution = Execution(processes=processes, micro_batch_size=micro)
    found = accumulation(batch, execution, section="sft")
    assert found == expected
    assert found[0] * found[1] * processes == batch


def test_accumulation_refuses_what_does_not_divide():
    with pytest.raises(UserError, match=r"^sft.batch_size is 5; .* the 2 processes$"):
        accumulation(5, Execution(processes=2), section="sft")


def test_only_trainings_are_launched_on_several():
    several = {"processes": 2, "launch": "--config_file my.yaml"}
    words = launcher(REWARD, several, ["job.json", "error.json"])
    assert words[2:] == [
        *("accelerate.commands.launch", "--num_processes", "2", "--config_file", "my.yaml"),
        *("-m", "shiftrm.pipeline.child", "job.json", "error.json"),
    ]
    assert "accelerate.commands.launch" not in launcher(SAMPLE, several, ["x"])
    plain = launcher(SFT, {"processes": 2, "launch": ""}, ["x"])
    assert plain[3:6] == ["--multi_gpu", "--num_processes", "2"]


def test_out_of_memory_names_the_recipes_setting():
    execution = {"micro_batch_size": 4, "sampling_batch_size": 32, "gradient_checkpointing": True}
    assert out_of_memory_line(SFT, execution) == (
        "out of memory; give execution.micro_batch_size=2 (now 4): the same command with it "
        "continues this run"
    )
    assert "execution.sampling_batch_size=16" in out_of_memory_line(SAMPLE, execution)
    both = out_of_memory_line(Optimise("ppo", "a"), {**execution, "gradient_checkpointing": False})
    assert "micro_batch_size=2" in both
    assert "sampling_batch_size=16" in both
    assert "gradient_checkpointing=true" in both
    least = {**execution, "micro_batch_size": 1}
    assert "lora={lora_r: 16}" in out_of_memory_line(REWARD, least)


def test_what_other_stages_make_is_found_below_the_runs_folder(tmp_path):
    job = TrainReward(Made("sft"), "pairs.csv", {"": Made("data", "heldout.jsonl")}, Made("g", "g"))
    assert inputs_of(job) == ("sft", "data", "g")
    found = located(job, tmp_path)
    assert (found.model, found.pairs) == (str(tmp_path / "sft" / "model"), "pairs.csv")
    assert found.eval_pairs == {"": str(tmp_path / "data" / "heldout.jsonl")}
    assert inputs_of(found) == ()


@pytest.mark.parametrize(
    "job",
    [
        Sft(Made("a"), "d", settings={"learning_rate": 1e-6, "seed": 1, "x": None, "y": [1, "a"]}),
        TrainReward("m", "p", {"chat": Made("data", "h")}, Made("g", "groups.jsonl")),
        Optimise("dpo", "p", Made("sft"), pairs="pairs", settings={"beta": 0.1}, told="shiftrm x"),
        Sample("p", Made("d", "x"), sampling=SamplingConfig(top_p=0.9), vllm_arguments=("-a", "b")),
    ],
)
def test_a_job_is_the_same_after_its_file(job):
    assert from_plain(json.loads(json.dumps(plain(job)))) == job


def test_templates_of_the_package_have_names():
    assert Path(packaged("human_assistant")).is_file()
    assert packaged("mine/human_assistant.jinja") == "mine/human_assistant.jinja"


def test_a_model_with_an_equals_sign_in_its_name_is_no_setting(world):
    found = read_recipe(RECIPES / "hh_helpful.yaml", ["model=owner/a=b", "execution.bf16=false"])
    check_settings(plan(found))
