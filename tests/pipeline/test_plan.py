"""The words of every command, for each way a recipe can be set."""

import pytest

from shiftrm.config import from_mapping
from shiftrm.errors import UserError
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.experiment import Recipe
from shiftrm.pipeline.launch import Execution, accumulation, launcher, out_of_memory_line, spoken
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, read_recipe
from tests.pipeline.conftest import RECIPES
from tests.pipeline.gold_world import recipe


def stages(world, **sections):
    found = plan(from_mapping(Recipe, recipe(world, **sections)))
    check_settings(found)
    return {stage.name: stage for stage in found}


def all_words(stage):
    return [*stage.settings["words"], *stage.execution["words"]]


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
    retrained = found["methods/retrained/round-1/reward_model"].settings["words"]
    assert "--groups" not in retrained
    metarm = found["methods/metarm/round-2/reward_model"].settings["words"]
    assert "{stage:methods/metarm/round-2/groups}/groups.jsonl" in metarm
    assert {"meta_learning_rate=1e-06", "preset=paper"} <= set(metarm)
    # The groups are of the policy that the round began with (arXiv 2405.00438, settings).
    sampled = found["methods/metarm/round-2/groups"].settings["words"]
    assert "{stage:methods/metarm/round-1/policy}/model" in sampled
    first = found["methods/metarm/round-1/groups"].settings["words"]
    assert "{stage:sft}/model" in first
    # Every round's reward model begins at SFT, every policy at the last one; the KL is to SFT.
    assert metarm[:3] == ["train", "--model", "{stage:sft}/model"]
    policy = found["methods/metarm/round-2/policy"].settings["words"]
    assert policy[2:6] == [
        *("--policy", "{stage:methods/metarm/round-1/policy}/model"),
        *("--reference", "{stage:sft}/model"),
    ]


def test_arms_share_their_draws(world):
    found = stages(world, methods=ARMS, rounds=2)
    for what in ("policy", "responses"):
        seeds = {
            next(w for w in found[f"methods/{arm}/round-2/{what}"].settings["words"] if "seed" in w)
            for arm in ("fixed", "retrained", "metarm")
        }
        assert len(seeds) == 1
    words = [found[f"methods/fixed/round-{k}/policy"].settings["words"] for k in (1, 2)]
    assert words[0][-1] != words[1][-1]


@pytest.mark.parametrize("preset", ["paper", "scale_free", "adaptive"])
def test_presets_are_the_adapting_arms(world, preset):
    found = stages(world, methods=ARMS, preset=preset)
    said = [n for n, s in found.items() if f"preset={preset}" in s.settings.get("words", [])]
    assert said == ["methods/metarm/round-1/reward_model"]


def test_lora_is_every_models(world):
    found = stages(world, methods=ARMS, lora={"lora_r": 4, "lora_target_modules": ["q_proj"]})
    trained = [s for s in found.values() if s.settings.get("words", ["sample"])[0] != "sample"]
    assert len(trained) == 8
    for stage in trained:
        wanted = {"use_peft=true", "lora_r=4", 'lora_target_modules=["q_proj"]'}
        assert wanted <= set(stage.settings["words"]), stage.name


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
    words = found["reward_model"].settings["words"]
    assert words[:3] == ["train", "--model", str(world / "base_model")]


def test_gold_watches_the_policy(world):
    found = stages(world, methods=ARMS, evaluation={"gold": "gold", "best_of_n": 8})
    words = found["methods/metarm/round-1/policy"].settings["words"]
    assert words[words.index("--watch") + 1] == "gold"
    assert "--watch" not in found["methods/dpo/round-1/policy"].settings["words"]
    sampled = found["best_of_n/responses"].settings["words"]
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
    assert [all_words(s) for s in plain if "words" in s.settings] != [
        all_words(s) for s in other if "words" in s.settings
    ]


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
    words = launcher(["train", "x"], several)
    assert words[2:] == [
        *("accelerate.commands.launch", "--num_processes", "2", "--config_file", "my.yaml"),
        *("-m", "shiftrm", "train", "x"),
    ]
    assert "accelerate.commands.launch" not in launcher(["sample", "x"], several)
    plain = launcher(["sft"], {"processes": 2, "launch": ""})
    assert plain[3:6] == ["--multi_gpu", "--num_processes", "2"]


def test_out_of_memory_names_the_recipes_setting():
    execution = {"micro_batch_size": 4, "sampling_batch_size": 32, "gradient_checkpointing": True}
    assert out_of_memory_line(["sft"], execution) == (
        "out of memory; give execution.micro_batch_size=2 (now 4): the same command with it "
        "continues this run"
    )
    assert "execution.sampling_batch_size=16" in out_of_memory_line(["sample"], execution)
    both = out_of_memory_line(["optimise", "ppo"], {**execution, "gradient_checkpointing": False})
    assert "micro_batch_size=2" in both
    assert "sampling_batch_size=16" in both
    assert "gradient_checkpointing=true" in both
    least = {**execution, "micro_batch_size": 1}
    assert "lora={lora_r: 16}" in out_of_memory_line(["train"], least)


def test_places_are_said_at_the_end():
    folders = {"sft": "/runs/a b/sft"}
    words = ["--model", "{stage:sft}/model", "{out}/x", "chat_template_path={template:t}", "{x}"]
    model, out, template = spoken(words, folders, "/tmp/out")[1:4]
    assert (model, out) == ("/runs/a b/sft/model", "/tmp/out/x")
    assert template.endswith("loop/templates/t.jinja")


def test_a_model_with_an_equals_sign_in_its_name_is_no_setting(world):
    found = read_recipe(RECIPES / "hh_helpful.yaml", ["model=owner/a=b", "execution.bf16=false"])
    check_settings(plan(found))
