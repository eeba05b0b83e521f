"""What a dry run says, against real networks, real data and real trainers' counts."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)
from trl import ModelConfig, get_peft_config

from shiftrm.cli import main
from shiftrm.config import from_mapping
from shiftrm.files import write_jsonl
from shiftrm.models.rendering import encode_prompt
from shiftrm.pipeline.data_sets import assembled
from shiftrm.pipeline.engine import random_seed, run_stages
from shiftrm.pipeline.estimate import estimate, judging_cost, sizes_of
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.jobs import from_plain, located, plain
from shiftrm.pipeline.memory import LIBRARIES, stage_memory
from shiftrm.pipeline.passes import count_passes, guess_passes
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.row_lengths import Spelling, lengths_of, spelling_of
from shiftrm.pipeline.run import read_recipe
from shiftrm.trainers.machine import activation_bytes
from shiftrm.trainers.reward import RewardConfig
from tests.byte_level import byte_level
from tests.conftest import llama_config
from tests.docs.test_build import ROOT
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


def models_of(world, sizes, **sections):
    """Bytes of each stage's models."""
    stages = plan(from_mapping(Experiment, recipe(world, **sections)))
    return {stage.name: stage_memory(stage, sizes) for stage in stages}


def test_memory_by_stage(world):
    found, stages = estimated(world, methods=ARMS, rounds=2)
    policy, reward = found.sizes.policy, found.sizes.reward
    trained, held = 16, 4  # bytes a parameter: with gradient and AdamW's moments, or weights alone
    memory = models_of(world, found.sizes, methods=ARMS, rounds=2)
    for name, stage in stages.items():  # passes and libraries come on top
        more = stage.memory - memory[name]
        assert more == 0 if memory[name] == 0 else LIBRARIES < more < LIBRARIES + 2**22
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
    assert stages["sft"].memory > LIBRARIES
    memory = models_of(world, sizes, methods=ARMS, rounds=2, lora={"lora_r": 4})
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
    config, passes = from_mapping(Experiment, recipe(world)), found.sizes.passes
    rows = assembled_rows(config)
    tokenizer = AutoTokenizer.from_pretrained(world / "base_model")
    texts = [r["prompt"] + r["completion"] for r in rows["demonstrations"]]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(texts)
    each = passes.training + 3 * passes.head
    # Tokens are guessed from the prompts' spelling; completions have other words.
    assert stages["sft"].operations == pytest.approx(7 * 5 * tokens * each, rel=0.35)
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows["prompts"]]
    length, new = sum(prompts) / len(prompts), config.sampling.max_new_tokens
    answered = min(config.evaluation.prompts, len(rows["eval_prompts"]))
    sampled = config.evaluation.responses * new * (passes.forward + passes.head)
    expected = answered * (length * passes.forward + sampled)  # a prompt is read once
    assert stages["responses"].operations == pytest.approx(expected, rel=0.1)
    assert stages["data"].operations == 0


@pytest.mark.parametrize(
    "lora", [None, {}, {"lora_target_modules": [r".*\.layers\.[12]\..*_proj"]}]
)
def test_passes_are_those_of_a_real_network(lora):
    """Operations and kept bytes without data are those of a pass on numbers."""
    torch.manual_seed(0)
    config = llama_config(160, hidden_size=64, num_hidden_layers=3)
    model, adapters = LlamaForCausalLM(config).eval(), None
    if lora is not None:
        peft = get_peft_config(ModelConfig(use_peft=True, lora_task_type="CAUSAL_LM", **lora))
        model = get_peft_model(model, peft).eval()
        adapters = numbers(model, trained=True)
    meta = copy.deepcopy(model).to("meta")
    found = count_passes(meta, numbers(model), adapters, tokens=48)

    body = (model if lora is None else model.get_base_model()).model
    ids = torch.zeros(1, 48, dtype=torch.long)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's own attention
    with FlopCounterMode(display=False) as forward, torch.no_grad(), plain:
        body(input_ids=ids, use_cache=False)
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        body(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert found.forward * 48 == pytest.approx(forward.get_total_flops(), rel=0.05)
    assert found.training * 48 == pytest.approx(both.get_total_flops(), rel=0.05)
    with sdpa_kernel(SDPBackend.MATH):
        kept = activation_bytes(
            lambda: body(input_ids=ids, use_cache=False).last_hidden_state, model.parameters()
        )
    assert found.kept * 48 == pytest.approx(kept, rel=0.25)  # the mask is one more there
    assert found.head == 2 * 64 * 160
    assert found.cache == 4 * 3 * 2 * config.num_key_value_heads * config.head_dim
    if lora:  # no gradient goes below the second of three layers
        assert found.training < 2 * found.forward


def test_a_network_that_cannot_run_without_data_is_guessed():
    class Odd(torch.nn.Module):
        config = llama_config()

        @property
        def base_model(self):
            raise RuntimeError("needs numbers")

    assert count_passes(Odd(), 100, None, tokens=8) == guess_passes(100, None)
    assert guess_passes(100, None).training == 600
    assert guess_passes(100, 5).training == 400


def test_lengths_are_the_tokenizers():
    spelling = Spelling(per_character=0.5, per_row=3.0)
    said = [{"role": "assistant", "content": "12345678"}]
    rows = {
        "prompts": [{"prompt": "1234"}, {"prompt": [{"role": "user", "content": "12345678"}]}],
        "pairs": [
            {"prompt": "12", "chosen": "12", "rejected": "123456"},
            {"prompt": "12", "chosen": said, "rejected": said},
        ],
    }
    found = lengths_of(rows, {"pairs": 7, "prompts": None}, spelling)
    assert found.mean == {"prompts": 6.0, "pairs": 3 + 0.5 * (10 + 18) / 2}
    assert found.longest == {"prompts": 7.0, "pairs": 8.0}  # of the pair with 3 + 4 tokens a side


def test_the_spelling_is_measured_on_the_prompts(tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    prompt = [{"role": "user", "content": "abcd"}]
    found = spelling_of(str(tmp_path), [{"prompt": prompt}, {"prompt": prompt}])
    around = len(encode_prompt(tokenizer, prompt)) - 4
    assert found == Spelling(1.0, around)
    assert spelling_of(str(tmp_path / "gone"), [{"prompt": prompt}]) == Spelling(0.25, 0.0)


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
    assert "Time is a guess: the operations of all passes at the 1 billion a second" in said


def test_no_checkpoints_are_not_said_to_take_space(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shiftrm.pipeline.run.speed", lambda: 1e9)
    saving = {"settings": {"max_steps": 2, "max_length": 64, "save_strategy": "no"}}
    path = write_recipe(tmp_path / "recipe.yaml", world, sft=saving, reward=saving)
    assert main(["run", str(path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "of models at the end (texts and logs are not counted)" in said


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


# -- against what stages take ----------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from process_memory import peak_bytes
from shiftrm.pipeline.jobs import from_plain
given = json.loads(sys.argv[1])
from_plain(given["job"]).on_machine(given["way"]).run(Path(sys.argv[2]))
print("peak", peak_bytes())
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A random policy of 45 million parameters, most of them in its layers, and data."""
    folder = tmp_path_factory.mktemp("middling")
    tokenizer = byte_level()
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    config = llama_config(len(tokenizer), **sizes, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = [
        {"prompt": f"{number} " * 40, "chosen": f"good {number} " * 12, "rejected": "bad " * 20}
        for number in range(40)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "lora"),
    [("reward_model", None), ("methods/ppo/round-1/policy", {"lora_r": 4})],
)
def test_a_stage_takes_the_memory_that_was_estimated(middling, tmp_path, stage, lora):
    """Peak memory of the stage's process, within a factor of 1.5."""
    source = {"format": "preference", "source": str(middling / "pairs.jsonl")}
    ppo = {"steps": 1, "prompts_per_step": 2, "rollouts_per_prompt": 8, "kl_samples": 0}
    ppo |= {"reward_mean": 0.0, "reward_std": 1.0}  # not measured
    config = from_mapping(
        Experiment,
        {
            "model": str(middling / "model"),
            "sft": None,
            "rounds": 1,
            "lora": lora,
            "data": {"pairs": source, "prompts": source, "heldout_share": 0.2},
            "methods": {"ppo": {"reward": "fixed"}},
            "reward": {"batch_size": 8, "settings": {"max_steps": 1, "max_length": 400}},
            "policy": {"settings": {**ppo, "minibatch_size": 16}},
            "sampling": {"max_new_tokens": 24},
            "execution": {
                "bf16": False,
                "gradient_checkpointing": False,
                "micro_batch_size": 8,
                "sampling_batch_size": 16,
            },
        },
    )
    stages = plan(config)
    expected = {found.stage: found.memory for found in estimate(config, stages).stages}[stage]
    made = tmp_path / "run"
    run_stages(stages[:1], made, seed=0)
    found = next(s for s in stages if s.name == stage)
    job = located(from_plain(found.settings["job"]), made)
    if stage != "reward_model":  # any reward model of that size will do
        reward = AutoModelForSequenceClassification.from_pretrained(
            middling / "model", num_labels=1
        )
        reward.save_pretrained(made / "reward_model/model")
        AutoTokenizer.from_pretrained(middling / "model").save_pretrained(
            made / "reward_model/model"
        )
    given = json.dumps({"job": plain(job), "way": found.execution["way"]})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, given, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.rsplit("peak ", 1)[1])
    assert expected / 1.5 < peak < expected * 1.5, (expected / 2**20, peak / 2**20)


def test_a_large_parent_does_not_make_its_child_large():
    """`ru_maxrss` would say so: the kernel carries the parent's peak through exec."""
    held = bytearray(512 << 20)
    held[:: 1 << 12] = b"1" * len(held[:: 1 << 12])
    code = "from process_memory import peak_bytes; print(peak_bytes())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},
    )
    assert int(told.stdout) < 256 << 20
