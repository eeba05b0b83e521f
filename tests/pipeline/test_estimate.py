"""What a dry run says, against real networks, real data and real trainers' counts."""

import re

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, get_peft_config

from shiftrm.cli import main
from shiftrm.config import from_mapping
from shiftrm.pipeline.data_sets import assembled
from shiftrm.pipeline.engine import random_seed
from shiftrm.pipeline.estimate import estimate, judging_cost, sizes_of
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from shiftrm.trainers.reward import RewardConfig
from tests.pipeline.conftest import LOOP, RECIPES
from tests.pipeline.gold_world import recipe, write_recipe
from tests.pipeline.test_plan import ARMS


def numbers(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj", "up_proj"], "all-linear"])
def test_parameters_are_those_of_the_real_networks(world, targets):
    lora = {"lora_r": 4} | ({} if targets is None else {"lora_target_modules": targets})
    found = sizes_of(str(world / "base_model"), lora)
    for cls, task, total, adapters in (
        (AutoModelForCausalLM, "CAUSAL_LM", found.policy, found.policy_adapters),
        (AutoModelForSequenceClassification, "SEQ_CLS", found.reward, found.reward_adapters),
    ):
        options = {} if task == "CAUSAL_LM" else {"num_labels": 1}
        real = cls.from_pretrained(world / "base_model", **options)
        assert total == numbers(real)
        config = get_peft_config(ModelConfig(use_peft=True, lora_task_type=task, **lora))
        assert adapters == numbers(get_peft_model(real, config), trained=True)


def estimated(world, **sections):
    config = from_mapping(Experiment, recipe(world, **sections))
    found = estimate(config, plan(config))
    return found, {stage.stage: stage for stage in found.stages}


def test_memory_by_stage(world):
    found, stages = estimated(world, methods=ARMS, rounds=2)
    policy, reward = found.sizes.policy, found.sizes.reward
    trained, held = 16, 4  # bytes a parameter: with gradient and AdamW's moments, or weights alone
    memory = {name: stage.memory for name, stage in stages.items()}
    assert memory["data"] == 0
    assert memory["sft"] == trained * policy
    assert memory["reward_model"] == trained * reward
    assert memory["methods/metarm/round-1/reward_model"] == (trained + 8) * reward
    assert memory["responses"] == held * policy
    assert memory["evaluation"] == held * reward
    assert memory["methods/fixed/round-1/evaluation"] == 2 * held * policy
    assert memory["methods/dpo/round-1/policy"] == (trained + held) * policy
    # policy and critic are trained, reference and reward model held
    assert memory["methods/fixed/round-2/policy"] == (trained + held) * (policy + reward)


def test_memory_with_adapters(world):
    found, stages = estimated(world, methods=ARMS, rounds=2, lora={"lora_r": 4})
    sizes = found.sizes
    memory = {name: stage.memory for name, stage in stages.items()}
    assert memory["sft"] == 4 * sizes.policy + 16 * sizes.policy_adapters
    first = memory["methods/fixed/round-1/policy"]
    assert first == (
        4 * (sizes.policy + sizes.reward) + 16 * (sizes.policy_adapters + sizes.reward_adapters)
    )
    # From the second round on the reference is no longer the policy with its adapter off.
    assert memory["methods/fixed/round-2/policy"] == first + 4 * sizes.policy


def test_disk_by_stage(world):
    """A model each, and checkpoints of weights and two moments: PPO's of its critic, too."""
    settings = {"save_steps": 2, "max_steps": 7, "save_total_limit": 1}
    sections = {"methods": ARMS, "sft": {"settings": settings}}
    ppo = {**recipe(world)["policy"]["settings"], "steps": 5, "save_steps": 2}
    found, stages = estimated(world, policy={"settings": ppo}, **sections)
    policy, reward = found.sizes.policy, found.sizes.reward
    disk = {name: stage.disk for name, stage in stages.items()}
    assert disk["sft"] == (4 * policy, 2 * 12 * policy)
    assert disk["reward_model"].kept == 4 * reward
    # Checkpoints of steps 2 and 4; none of the last step.
    assert disk["methods/fixed/round-1/policy"] == (4 * policy, 2 * 12 * (policy + reward))
    assert disk["responses"] == disk["evaluation"] == (0, 0)
    half = {**settings, "dtype": "bfloat16"}
    _, stages = estimated(world, **{**sections, "sft": {"settings": half}})
    assert stages["sft"].disk == (2 * policy, 2 * 6 * policy)
    found, stages = estimated(world, lora={"lora_r": 4}, **sections)
    adapters = found.sizes.policy_adapters
    assert stages["sft"].disk == (4 * (policy + adapters), 2 * 12 * adapters)
    one = {**ppo, "steps": 1, "save_steps": 1}
    _, stages = estimated(world, policy={"settings": one})
    assert [s.disk.checkpoints for n, s in stages.items() if n.endswith("/policy")] == [0]


def test_operations_by_stage(world):
    found, stages = estimated(world, sft={"batch_size": 5, "settings": {"max_steps": 7}})
    config = from_mapping(Experiment, recipe(world))
    rows = assembled_rows(config)
    characters = sum(len(r["prompt"]) + len(r["completion"]) for r in rows["demonstrations"])
    tokens = characters / 4 / len(rows["demonstrations"])
    assert stages["sft"].operations == pytest.approx(7 * 5 * tokens * 6 * found.sizes.policy)
    length = sum(len(r["prompt"]) for r in rows["prompts"]) / 4 / len(rows["prompts"])
    length += config.sampling.max_new_tokens
    made = min(config.evaluation.prompts, len(rows["eval_prompts"])) * config.evaluation.responses
    assert stages["responses"].operations == pytest.approx(2 * found.sizes.policy * made * length)
    assert stages["data"].operations == 0


def assembled_rows(config):
    data = plan(config)[0]
    found = assembled(data.settings, seed=random_seed(config.seed, "splits"))
    return {name: loaded.rows for name, loaded in found.items()}


def test_a_dry_run_says_disk_and_time(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shiftrm.pipeline.run.speed", lambda: 1e9)
    path = write_recipe(tmp_path / "recipe.yaml", world)
    assert main(["run", str(path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "steps memory disk time" in said
    size = r"[\d.,]+ [MG]iB"
    assert re.search(rf"disk: {size} of models at the end, and up to {size} of checkpoints", said)
    assert re.search(r"time, one stage after the other: (under 1 s|[\d.,]+ (s|min|h)) ", said)
    assert "Time is a guess: parameters times tokens at the 1 billion operations a second" in said


def test_rows_are_counted_as_the_run_will(world, tmp_path):
    limits = {**recipe(world)["data"], "max_pairs": 20, "max_heldout": 3}
    found, _ = estimated(world, data=limits)
    assert found.exact
    assert found.rows["pairs"] == 20
    assert found.rows["heldout"] == 3
    assert 2 <= found.rows["eval_prompts"] <= 6


def test_what_is_on_the_hub_is_not_known(world, capsys, tmp_path):
    data = {**recipe(world)["data"], "prompts": {"format": "hh_rlhf"}}
    found, _ = estimated(world, data=data)
    assert not found.exact
    assert found.rows["prompts"] is None
    assert found.rows["pairs"] > 0
    path = write_recipe(tmp_path / "mine.yaml", world, data=data)
    assert main(["run", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "prompts: hh_rlhf, Anthropic/hh-rlhf: rows unknown before it is read" in said
    assert "pairs: preference" in said
    assert "at most" in said


def test_steps_of_epochs(world):
    """By the counts of transformers and TRL themselves: see test_variants for the real runs."""
    epochs = {"num_train_epochs": 2, "max_length": 64}
    grpo = {"reward": "fixed", "policy": "grpo"}
    grpo["policy_settings"] = {"num_generations": 4, "num_train_epochs": 1, "num_iterations": 2}
    found, stages = estimated(
        world,
        sft={"batch_size": 5, "settings": epochs},
        policy={"batch_size": 8, "settings": recipe(world)["policy"]["settings"]},
        methods={"fixed": {}, "grpo": grpo},
    )
    assert stages["sft"].steps == 2 * -(-found.rows["demonstrations"] // 5)
    assert stages["reward_model"].steps == 2  # max_steps
    assert stages["methods/fixed/round-1/policy"].steps == 2
    assert stages["methods/grpo/round-1/policy"].steps == found.rows["prompts"] // 2 * 2


def test_the_judges_requests(world):
    judge = {"kind": "endpoint", "model": "m", "price_in": 10.0, "price_out": 30.0}
    config = from_mapping(Experiment, recipe(world, judge=judge, methods=ARMS, rounds=2))
    said = judging_cost(config, 6)
    # 7 rounds of 6 prompts, and six pairs of arms on the other half, both orders
    assert f"requests: at most {2 * (7 * 6 + 6 * 3)} (" in said
    assert "at the given prices" in said
    free = from_mapping(Experiment, recipe(world, judge={"kind": "endpoint", "model": "m"}))
    assert "give judge.price_in" in judging_cost(free, None)


@pytest.mark.parametrize("name", LOOP)
def test_the_papers_warm_up_is_three_tenths_of_an_epoch(name, tmp_path):
    """As transformers understands it: `warmup_steps` below 1 is a share of all steps."""
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["model=x/y"])
    settings = recipe.sft.settings
    args = RewardConfig(
        output_dir=str(tmp_path), warmup_steps=settings["warmup_steps"], use_cpu=True, bf16=False
    )
    an_epoch = 1000
    steps = an_epoch * settings["num_train_epochs"]
    assert args.get_warmup_steps(steps) == 0.3 * an_epoch
    assert settings["lr_scheduler_type"] == "linear"
