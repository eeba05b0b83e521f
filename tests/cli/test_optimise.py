"""shiftrm optimise: every method from files to a folder, continued, logged; bad input in a line."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from shiftrm.cli.optimise import METHODS as CLI_METHODS
from shiftrm.cli.optimise import topic_help
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.sampling import load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.policies import ppo_command, ppo_runtime
from shiftrm.policies.commands import METHODS, Inputs, optimise
from shiftrm.policies.configs import refused as refused_settings
from shiftrm.policies.outcome import measure_kl
from shiftrm.policies.ppo import PPOTrainer, Problem
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.text_rewards import reward_scale
from tests.cli.conftest import refused
from tests.cli.test_sft import equal, weights
from tests.cli.test_train_interrupted import start
from tests.conftest import llama_config

TRL = [
    *("max_steps=4", "save_steps=2", "logging_steps=1", "learning_rate=1e-2"),
    *("per_device_train_batch_size=4", "activation_checkpointing=false"),
]
ONLINE = [*TRL, "num_generations=2", "max_completion_length=6", "beta=0.1"]
PPO = [
    *("steps=4", "save_steps=2", "prompts_per_step=2", "rollouts_per_prompt=2"),
    *("learning_rate=1e-2", "critic_learning_rate=1e-2", "max_new_tokens=6"),
]
DPO_SETTINGS = [*TRL, "max_completion_length=6"]
SETTINGS = {"dpo": DPO_SETTINGS, "rloo": ONLINE, "grpo": ONLINE, "ppo": PPO}
KL = ["kl_samples=8"]


@pytest.fixture
def run(shiftrm, files, reward_model, tokenizer):
    """run(method, *words) -> (status, output), with reward model and prompts or pairs."""
    reward_model.save_pretrained("reward")
    tokenizer.save_pretrained("reward")

    def optimised(method, *words, output="out"):
        return shiftrm(*command(method, output), *SETTINGS[method], *KL, *words)

    return optimised


def command(method, output="out"):
    data = ["--reward", "reward", "--prompts", "prompts.jsonl"]
    data = ["--pairs", "pairs.jsonl"] if method == "dpo" else data
    return ["optimise", method, "--policy", "policy", *data, "--output", output]


def last(folder="out"):
    return read_jsonl(f"{folder}/training_log.jsonl")[-1]


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_writes_a_policy_and_its_log(run, method):
    status, output = run(method)
    assert status == 0, output.err
    log = read_jsonl("out/training_log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    if method != "dpo":
        assert all("reward" in row and "sequence_kl" in row for row in log)
        assert re.search(r"step 3 of 4: .*reward -?[\d.e-]+, sequence_kl -?\d", output.out)
    assert not equal("out", "policy")
    again = measure_kl(
        Problem(
            load_policy("out")[0],
            *load_policy("policy"),
            [r["prompt"] for r in read_jsonl("pairs.jsonl" if method == "dpo" else PROMPTS)],
        ),
        samples=8,
        max_new_tokens=6,
        batch_size=256 if method == "ppo" else 4,
        seed=0 if method == "ppo" else 42,
    )
    assert log[-1]["final_sequence_kl"] == pytest.approx(again.kl, rel=1e-3, abs=1e-6)
    assert again.kl > 1e-4
    assert f"KL to the reference at the end: {again.kl:.1g}"[:-1] in output.out
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "| reference | `policy` |" in card
    assert ("| reward model | `reward` |" in card) == (method != "dpo")
    assert not Path(".out.work").exists()


PROMPTS = "prompts.jsonl"


def test_dpo_is_trls(run, pairs):
    assert run("dpo")[0] == 0
    model, tokenizer = load_policy("policy")
    args = trl.DPOConfig(
        "trl",
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        seed=42,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    trl.DPOTrainer(
        model,
        load_policy("policy")[0],
        args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    ).train()
    ours = weights("out")
    assert all(torch.equal(p, ours[name]) for name, p in model.named_parameters())


@pytest.fixture
def stop_ppo(monkeypatch):
    """stop_ppo(step, error): raise in that step of PPO; stop_ppo(None): no more."""
    plain = PPOTrainer.step

    def set_stop(at, error=None):
        def step(self, number):
            if number == at:
                raise error
            return plain(self, number)

        monkeypatch.setattr(PPOTrainer, "step", step)

    return set_stop


@pytest.mark.parametrize("method", ["dpo", "rloo", "ppo"])
def test_interrupted_and_continued_is_as_if_never_interrupted(run, method, stopping, stop_ppo):
    words = ("red", "blue", "green", "small", "large", "cat")
    write_jsonl(PROMPTS, [{"prompt": f"the {word}"} for word in words])  # whose order matters
    assert run(method, output="straight")[0] == 0
    stop = stop_ppo if method == "ppo" else stopping
    stop(4, KeyboardInterrupt())
    status, output = run(method)
    assert (status, "give the same command again to continue" in output.err) == (130, True)
    stop(None)
    status, output = run(method)
    assert status == 0, output.err
    assert equal("out", "straight")
    assert last()["final_sequence_kl"] == last("straight")["final_sequence_kl"]


@pytest.mark.parametrize("save_steps", [3, 2, 100])
def test_ppo_stores_no_checkpoint_of_its_last_step(run, monkeypatch, save_steps):
    """Killed before the policy is stored it does the last steps again, to the same end."""
    assert run("ppo", output="straight")[0] == 0
    plain, saved = ppo_runtime.save, []

    def save(folder, step, state, tensors):
        saved.append(step)
        return plain(folder, step, state, tensors)

    monkeypatch.setattr(ppo_runtime, "save", save)

    def killed(*args, **options):
        raise KeyboardInterrupt

    for name in ("_final_kl", "_write"):
        with monkeypatch.context() as patch:
            patch.setattr(ppo_command, name, killed)
            assert run("ppo", f"save_steps={save_steps}")[0] == 130
    before = [step for step in (save_steps,) if step < 4]
    assert saved == before, "and the second time there was nothing to save"
    status, output = run("ppo", f"save_steps={save_steps}")
    assert status == 0, output.err
    assert saved == before
    assert equal("out", "straight")
    assert read_jsonl("out/training_log.jsonl") == read_jsonl("straight/training_log.jsonl")


@pytest.mark.parametrize("method", SETTINGS)
def test_models_of_nan_are_one_line_and_leave_nothing(run, method):
    for name, parameter in (("policy", "model.norm.weight"), ("reward", "score.weight")):
        shutil.copytree(name, f"broken-{name}")
        weights = load_file(f"broken-{name}/model.safetensors")
        weights[parameter][..., 0] = float("nan")
        save_file(weights, f"broken-{name}/model.safetensors", {"format": "pt"})
    there = sorted(os.listdir())
    cases = [["--policy", "broken-policy"], ["--reference", "broken-policy"]]
    if method != "dpo":
        cases.append(["--reward", "broken-reward"])
    for words in cases:
        status, output = run(method, *words)
        assert (status, output.err.count("\n")) == (2, 1), output.err
        assert f"{words[1]}: its weight " in output.err
        assert "holds NaN or infinite numbers" in output.err
        assert sorted(os.listdir()) == there


def test_probabilities_that_are_not_finite_are_one_line(run, monkeypatch):
    """Of weights that are: as after an update that went wrong."""
    plain = LlamaForCausalLM.forward

    def overflowing(self, *args, **options):
        output = plain(self, *args, **options)
        output.logits = output.logits * float("inf")
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", overflowing)
    for method in ("ppo", "rloo", "grpo"):
        status, output = run(method)
        assert (status, output.err.count("\n")) == (2, 1), output.err
        assert "the policy's probabilities are not finite" in output.err
    assert not Path(".out.work").exists()


def test_the_help_of_a_method_lists_its_settings():
    """As the configuration classes have them, which are not loaded for it."""
    assert list(METHODS) == list(CLI_METHODS)
    model = {option.name for option in fields(trl.ModelConfig)}
    general = {option.name for option in fields(TrainingArguments)}
    for method, config in METHODS.items():
        said = topic_help([method])
        assert f"shiftrm optimise {method} --policy" in said
        listed = dict(re.findall(r"^  (\w+)=(\S*)", said, re.MULTILINE))
        known = {option.name: option for option in fields(config)}
        assert set(known) - general - model <= set(listed) | set(refused_settings(method))
        assert set(listed) <= set(known)
        assert not set(listed) & set(refused_settings(method))
        for name, default in listed.items():
            if default and known[name].default is not MISSING and not default.endswith((",", "(")):
                assert ast.literal_eval(default) == known[name].default, name
        assert max(len(line) for line in said.splitlines()) < 100


def test_help_needs_no_library():
    for words in (["ppo", "--help"], ["--policy", "x", "-h", "grpo"], ["--help"]):
        code = (
            "import sys; from shiftrm.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "optimise", *words], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert ("settings of" in done.stdout) == (len(words) > 1)


@pytest.mark.parametrize("method", SETTINGS)
def test_interrupted_after_training_makes_no_further_step(run, method, unpublished):
    within_an_epoch = ["num_iterations=2", "max_steps=3"]  # DPO's and PPO's 4 steps are so as well
    more = within_an_epoch if method in ("rloo", "grpo") else []
    assert run(method, *more, output="straight")[0] == 0
    unpublished(lambda: run(method, *more))
    assert run(method, *more)[0] == 0
    assert equal("out", "straight")
    logs = [read_jsonl(f"{folder}/training_log.jsonl") for folder in ("out", "straight")]
    steps = [[row["step"] for row in log] for log in logs]
    assert steps[0] == steps[1]
    assert logs[0][-1]["final_sequence_kl"] == logs[1][-1]["final_sequence_kl"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("grpo", "give per_device_train_batch_size=2 gradient_accumulation_steps=2"),
        ("ppo", "lower micro_batch_size (now 64, which changes memory only) or forward_batch_"),
    ],
)
def test_out_of_memory(run, method, said, stopping, stop_ppo):
    stop = stop_ppo if method == "ppo" else stopping
    stop(4, torch.OutOfMemoryError("CUDA out of memory."))
    status, output = run(method)
    assert (status, output.err.count("\n")) == (2, 1)
    assert f"out of memory; {said}" in output.err
    stop(None)
    lower = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    lower = ["micro_batch_size=2"] if method == "ppo" else lower
    status, output = run(method, *lower)
    assert status == 0, output.err
    assert "Continuing from" in output.out
    assert [row["step"] for row in read_jsonl("out/training_log.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", SETTINGS)
def test_lora_is_merged_and_the_reference_is_the_base(run, method):
    lora = [
        "use_peft=true",
        "lora_r=4",
        "learning_rate=0.1",
        "lora_target_modules=[q_proj, v_proj]",
    ]
    status, output = run(method, *lora)
    assert status == 0, output.err
    base = AutoModelForCausalLM.from_pretrained("policy")
    alone = PeftModel.from_pretrained(base, "out/adapter").merge_and_unload()
    merged = weights("out")
    for name, parameter in alone.named_parameters():
        assert torch.allclose(parameter, merged[name], atol=1e-6)
    changed = {n for n, p in weights("policy").items() if not torch.equal(p, merged[n])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    again = measure_kl(
        Problem(
            load_policy("out")[0],
            *load_policy("policy"),
            [r["prompt"] for r in read_jsonl("pairs.jsonl" if method == "dpo" else PROMPTS)],
        ),
        samples=8,
        max_new_tokens=6,
        batch_size=256 if method == "ppo" else 4,
        seed=0 if method == "ppo" else 42,
    )
    assert last()["final_sequence_kl"] == pytest.approx(again.kl, rel=1e-3, abs=1e-6)
    assert again.kl > 1e-4
    assert sorted(os.listdir("out/adapter"))[:2] == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_another_reference(run, method, lora, tokenizer):
    """The first step's KL is that of the policy to it, with an adapter too."""
    torch.manual_seed(9)
    LlamaForCausalLM(llama_config()).save_pretrained("sft")
    tokenizer.save_pretrained("sft")
    words = ["use_peft=true", "lora_r=2"] if lora else []
    status, output = run(method, "--reference", "sft", *words)
    assert status == 0, output.err
    assert read_jsonl("out/training_log.jsonl")[0]["sequence_kl"] != pytest.approx(0, abs=1e-3)
    assert last()["final_sequence_kl"] > 1e-3
    assert "| reference | `sft` |" in Path("out/README.md").read_text(encoding="utf-8")


def test_a_reference_of_other_tokens_is_refused(run, shiftrm, policy):
    vocabulary = {w: i for i, w in enumerate(["</s>", "<unk>", "the", "a", "red", "cat"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained("other")
    policy.save_pretrained("other")
    words = [*command("rloo"), "--reference", "other", *ONLINE]
    refused(shiftrm, words, "other: has another vocabulary than the policy")


def test_ppo_standardises_by_the_references_responses(run):
    status, output = run("ppo", "steps=1")
    assert status == 0, output.err
    policy, tokenizer = load_policy("policy")
    mean, spread = reward_scale(
        policy,
        tokenizer,
        [row["prompt"] for row in read_jsonl(PROMPTS)],
        reward_fn=Scorer.from_pretrained("reward"),
        sampling=PPOConfig().sampling.__class__(max_new_tokens=6),
        batch_size=256,
        seed=0,
    )
    row = last()
    assert row["standardised_mean"] == pytest.approx((row["reward"] - mean) / spread, rel=1e-5)
    status, output = run("ppo", "steps=1", "reward_mean=1", "reward_std=2", output="given")
    row = last("given")
    assert row["standardised_mean"] == pytest.approx((row["reward"] - 1) / 2)


def test_ppos_preset_and_settings_over_it(run):
    status, output = run("ppo", "preset=paper", "steps=1", "temperature=0.7")
    assert status == 0, output.err
    card = Path("out/README.md").read_text(encoding="utf-8")
    for words in (
        "temperature | `0.7`",
        "top_p | `0.9`",
        "reward_clip | `0.8`",
        "preset | `paper`",
    ):
        assert f"| {words} |" in card


def test_long_prompts_are_dropped_and_said(run, files):
    write_jsonl(
        files / PROMPTS, [{"prompt": "the red"}, {"prompt": "a " * 60}, {"prompt": "the a a"}]
    )
    status, output = run(
        "rloo", "max_steps=1", "max_prompt_length=2", "per_device_train_batch_size=2"
    )
    assert status == 0, output.err
    said = "Dropped from the prompts: 2 longer than max_prompt_length=2 tokens."
    assert said in output.out
    status, output = run("ppo", "steps=1", output="ppo")
    assert "1 that leave less than 6 of the 64 tokens of the context" in output.out


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_fewer_prompts_than_one_generation_takes(run, files, method):
    """TRL makes no step of them, and the policy would be written as it was."""
    write_jsonl(files / PROMPTS, [{"prompt": text} for text in ("the red", "a dog", "a cat")])
    status, output = run(method, "per_device_train_batch_size=8", "num_generations=2")
    assert (status, output.err.count("\n")) == (2, 1)
    assert "3 prompts are fewer than the 4 that one generation takes" in output.err
    assert not (files / "out").exists()
    status, output = run(method, "per_device_train_batch_size=6", "max_steps=1")
    assert status == 0, output.err
    assert "for 1 steps" in output.out


@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_tensorboard_files_are_in_the_output(run, method):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = "steps=1" if method == "ppo" else "max_steps=1"
    status, output = run(method, "report_to=tensorboard", one)
    assert status == 0, output.err
    [file] = Path("out/runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    [reward] = events.Scalars("train/reward")
    assert reward.value == pytest.approx(last()["reward"], abs=1e-6)


def test_rewards_that_are_not_finite(run, monkeypatch):
    monkeypatch.setattr(Scorer, "score_ids", lambda self, ids, **_: [float("nan")] * len(ids))
    for method in ("rloo", "ppo"):
        words = ["reward_mean=0", "reward_std=1"] if method == "ppo" else []
        status, output = run(method, *words)
        assert (status, output.err.count("\n")) == (2, 1)
        assert "response 0: the reward is nan; the checkpoint is broken" in output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimise"], "--method is missing"),
        (["optimise", "sac"], "unknown method 'sac'; known: dpo, grpo, ppo, rloo"),
        ([*command("rloo"), "max_steps=0"], "max_steps is 0; give at least 1, or leave it out"),
        ([*command("dpo"), "max_steps=-3"], "max_steps is -3; give at least 1, or leave it out"),
        (["optimise", "rlo"], "unknown method 'rlo'; did you mean 'rloo'?"),
        (["optimise", "ppo", "--pairs", "pairs.jsonl"], "ppo answers prompts; give --prompts"),
        (["optimise", "rloo", "--prompts", "prompts.jsonl"], "--reward is missing; rloo needs a"),
        (["optimise", "grpo", "--reward", "reward"], "--prompts is missing; grpo needs a reward"),
        (
            ["optimise", "dpo", "--prompts", "prompts.jsonl"],
            "dpo learns from preference pairs",
        ),
        ([*command("dpo"), "--reward", "reward"], "dpo learns from --pairs alone; leave out --rew"),
        ([*command("rloo"), "--policy", "reward"], "reward: is a reward model (LlamaForSequenceC"),
        ([*command("rloo"), "--reference", "reward"], "--reference takes a causal language model"),
        (
            [*command("ppo"), "--reward", "policy"],
            "policy: is not a reward model (LlamaForCausalLM)",
        ),
        ([*command("ppo"), "--reward", "nope"], "nope: no such folder; give --reward"),
        ([*command("ppo"), "step=1"], "unknown setting 'step'; did you mean 'steps'?"),
        ([*command("ppo"), "num_generations=2"], "ppo has none; it is a setting of "),
        ([*command("ppo"), "reward_whitening=x"], "reward_whitening is 'x'; it must be 'none' or"),
        ([*command("ppo"), "preset=papr"], "unknown preset 'papr'; did you mean 'paper'?"),
        ([*command("ppo"), "steps=0"], "steps is 0; it must be at least 1"),
        ([*command("ppo"), "max_new_tokens=0"], "max_new_tokens is 0; it must be at least 1"),
        ([*command("ppo"), "report_to=wandb"], "report_to=wandb: WandbCallback requires wandb"),
        ([*command("dpo"), "report_to=wandb"], "requires wandb to be installed"),
        ([*command("rloo"), "reward_weights=[1]"], "there is one reward model, given by --reward"),
        ([*command("rloo"), "num_generations=3"], "must be divisible by num_generations"),
        ([*command("rloo"), "--prompts", "none.jsonl"], "none.jsonl: no such file"),
        (
            [*command("dpo"), "sync_ref_model=true"],
            "the reference stays as it is",
        ),
        ([*command("rloo"), "temperature=0"], "temperature is 0.0; it must be above 0"),
        ([*command("grpo"), "top_p=2"], "top_p is 2.0; it must be above 0 and at most 1"),
        ([*command("grpo"), "loss_type=grop"], "loss_type is 'grop'; did you mean 'grpo'?"),
        ([*command("dpo"), "loss_type=hing"], "loss_type is 'hing'; did you mean 'hinge'?"),
        ([*command("dpo"), "beta=0"], "beta is 0.0; it must be above 0"),
        ([*command("dpo"), "label_smoothing=0.5"], "label_smoothing is 0.5; it must be at least"),
        ([*command("dpo"), "lora_r=2"], "lora_r is set without LoRA; add use_peft=true"),
        ([*command("dpo"), "--pairs", "prompts.jsonl"], "prompts.jsonl:1: column 'chosen' is miss"),
    ],
)
def test_bad_input(run, shiftrm, words, message):
    missing = [] if "--policy" in words else ["--policy", "policy"]
    output = [] if "--output" in words else ["--output", "out"]
    refused(shiftrm, [*words, *missing, *output], message)


def test_from_python(run, files):
    summary = optimise(
        "dpo",
        Inputs("policy", pairs="pairs.jsonl"),
        output=files / "out",
        settings={"max_steps": 1, "kl_samples": 0, "activation_checkpointing": False},
    )
    assert summary.startswith("Direct preference optimisation (DPO) on 12 pairs")
    with pytest.raises(UserError, match="already there and not empty"):
        optimise("dpo", Inputs("policy", pairs="pairs.jsonl"), output=files / "out", settings={})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_two_processes_make_one_policy(run, files, method):
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "-m", "shiftrm"]
    words = ["forward_batch_size=2"] if method == "ppo" else ["per_device_train_batch_size=2"]
    process = start(*launch, *command(method), *SETTINGS[method], *KL, *words, cwd=files)
    assert process.wait(timeout=240) == 0, (files / "errors").read_text()[-3000:]
    said = (files / "said").read_text()
    assert said.count("Policy: out") == 1
    assert said.count("step 4 of 4") == 1
    assert "processes: 2" in (files / "out" / "README.md").read_text()
    assert [row["step"] for row in read_jsonl(files / "out" / "training_log.jsonl")] == [1, 2, 3, 4]


def state_space_policy():
    config = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0
    )
    return MambaForCausalLM(config)


def test_ppo_of_a_policy_that_no_classifier_takes(shiftrm, run, tokenizer):
    state_space_policy().save_pretrained("other")
    tokenizer.save_pretrained("other")
    words = [*command("ppo"), "reward_mean=0", "reward_std=1", "--policy", "other"]
    refused(shiftrm, words, "other: PPO's critic begins as a copy of the policy, and tr")
    refused(shiftrm, words, "no sequence classifier of a mamba policy that takes its weights")


def test_ppo_of_a_policy_whose_modules_peft_does_not_know(shiftrm, run, tokenizer):
    state_space_policy().save_pretrained("other")
    tokenizer.save_pretrained("other")
    words = [*command("ppo"), "--policy", "other", "use_peft=true"]
    refused(shiftrm, words, "other: cannot be trained with these settings: Please specify `target")
