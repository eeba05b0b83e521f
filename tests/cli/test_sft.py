"""shiftrm sft: what TRL would train, whole and continued, with LoRA; bad input in one line."""

import os
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.sampling import load_policy
from tests.cli.conftest import refused
from tests.data.test_sources import write

SFT = ["sft", "--model", "policy", "--demonstrations", "demos.jsonl", "--output", "out"]
SETTINGS = [
    *("max_steps=4", "save_steps=2", "logging_steps=1", "learning_rate=1e-2"),
    *("per_device_train_batch_size=2", "activation_checkpointing=false"),
]
WORK = Path(".out.work")


@pytest.fixture
def demos(files):
    rows = [
        {"prompt": f"the {a}", "completion": f" {b} runs"}
        for a in ("red", "blue", "green")
        for b in ("cat", "dog")
    ]
    write_jsonl(files / "demos.jsonl", rows)
    return rows


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def equal(a, b, atol=0.0):
    first, second = weights(a), weights(b)
    return all(torch.allclose(first[name], second[name], atol=atol, rtol=0) for name in first)


def test_the_folder_is_what_trl_trains(shiftrm, demos):
    status, output = shiftrm(*SFT, *SETTINGS)
    assert status == 0, output.err
    said = r"on 6 demonstrations \(0 dropped\) for 4 steps\.\nLoss: 3\.\d+ at the first"
    assert re.search(said, output.out)
    assert "step 2 of 4: loss 3." in output.out, "progress in words"
    model, tokenizer = load_policy("policy")
    args = trl.SFTConfig(
        "trl",
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        seed=42,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(demos), processing_class=tokenizer
    ).train()
    ours = weights("out")
    assert all(torch.equal(p, ours[name]) for name, p in model.named_parameters())
    log = read_jsonl("out/training_log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 for row in log)
    card = Path("out/README.md").read_text(encoding="utf-8")
    for words in ("| demonstrations | `demos.jsonl` | 6 |", "| learning_rate | `0.01` |"):
        assert words in card
    assert AutoTokenizer.from_pretrained("out").chat_template
    assert not WORK.exists()


def test_interrupted_and_continued_is_as_if_never_interrupted(shiftrm, demos, stopping):
    straight = [*SFT, *SETTINGS, "--output", "straight"]
    assert shiftrm(*straight)[0] == 0
    stopping(4, KeyboardInterrupt())
    status, output = shiftrm(*SFT, *SETTINGS)
    assert status == 130
    assert "give the same command again to continue from the last checkpoint" in output.err
    stopping(None)
    status, output = shiftrm(*SFT, *SETTINGS)
    assert (status, "Continuing from" in output.out) == (0, True)
    assert equal("out", "straight")
    found, expected = (read_jsonl(f"{name}/training_log.jsonl") for name in ("out", "straight"))
    assert [(r["step"], r["loss"]) for r in found] == [(r["step"], r["loss"]) for r in expected]


def test_interrupted_after_training_makes_no_further_step(shiftrm, demos, unpublished):
    assert shiftrm(*SFT, *SETTINGS, "--output", "straight")[0] == 0
    unpublished(lambda: shiftrm(*SFT, *SETTINGS))
    status, output = shiftrm(*SFT, *SETTINGS)
    assert (status, "checkpoint-4" in output.out) == (0, True)
    assert equal("out", "straight")


def test_out_of_memory_names_the_settings_and_continues_with_them(shiftrm, demos, stopping):
    assert shiftrm(*SFT, *SETTINGS, "--output", "straight")[0] == 0
    stopping(4, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines"))
    status, output = shiftrm(*SFT, *SETTINGS)
    assert status == 2
    assert output.err.count("\n") == 1
    said = "give per_device_train_batch_size=1 gradient_accumulation_steps=2, which trains the same"
    assert said in output.err
    assert "continues from its last checkpoint" in output.err
    stopping(None)
    lower = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    status, output = shiftrm(*SFT, *SETTINGS, *lower)
    assert (status, "Continuing from" in output.out) == (0, True), output.err
    assert equal("out", "straight", atol=1e-5)
    stopping(2, RuntimeError("[enforce fail at alloc_cpu.cpp:121] can't allocate memory"))
    status, output = shiftrm(*SFT, *SETTINGS, *lower, "--output", "other")
    assert (status, "per_device_train_batch_size is 1 already" in output.err) == (2, True)


def test_a_learning_rate_that_is_far_too_high(shiftrm, demos):
    high = ["learning_rate=1e38", "optim=sgd", "max_grad_norm=0", "lr_scheduler_type=constant"]
    words = [*SFT, *SETTINGS, *high]
    message = "the gradient is not finite; stopped before it reached the weights"
    refused(shiftrm, words, message)


def test_lora_is_merged_and_the_adapter_kept(shiftrm, demos):
    lora = ["use_peft=true", "lora_r=4", "learning_rate=0.1"]
    status, output = shiftrm(*SFT, *SETTINGS, *lora)
    assert status == 0, output.err
    base = AutoModelForCausalLM.from_pretrained("policy")
    alone = PeftModel.from_pretrained(base, "out/adapter").merge_and_unload()
    merged = weights("out")
    for name, parameter in alone.named_parameters():
        assert torch.allclose(parameter, merged[name], atol=1e-6)
    assert not equal("out", "policy")
    assert "LoRA was merged into these weights" in Path("out/README.md").read_text()


def test_long_demonstrations_are_dropped_and_said(shiftrm, demos, files):
    for words, dropped in (
        (["max_length=20"], "longer than max_length=20 tokens"),
        ([], "longer than the model's context of 64 tokens"),
    ):
        long = {"prompt": "the", "completion": " cat" * (30 if words else 90)}
        write_jsonl(files / "demos.jsonl", [*demos, long])
        output = f"out-{len(words)}"
        status, said = shiftrm(*SFT, *SETTINGS, *words, "--output", output)
        assert status == 0
        assert "on 6 demonstrations (1 dropped) for 4 steps" in said.out
        assert f"Dropped from the demonstrations: 1 {dropped}." in said.out
    refused(shiftrm, [*SFT, "--output", "o", "max_length=2"], "nothing is left of the demonstrat")


def test_conversations_with_a_template_for_a_model_that_has_none(shiftrm, files, tokenizer):
    """Also from CSV; the template is saved with the model."""
    for name in os.listdir("policy"):
        if "token" in name or "template" in name:
            (files / "policy" / name).unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained("policy")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    write(files / "chats.csv", [{"messages": chat}])
    chats = [*SFT, *SETTINGS, "--demonstrations", "chats.csv", "per_device_train_batch_size=1"]
    refused(shiftrm, chats, "the tokenizer has no chat template")
    (files / "t.jinja").write_text(tokenizer.chat_template)
    status, output = shiftrm(*chats, "chat_template_path=t.jinja", "max_steps=1")
    assert status == 0, output.err
    assert AutoTokenizer.from_pretrained("out").chat_template == tokenizer.chat_template


def test_tensorboard_files_are_in_the_output(shiftrm, demos):
    assert shiftrm(*SFT, *SETTINGS, "report_to=tensorboard", "max_steps=1")[0] == 0
    assert list(Path("out/runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nope"], "nope: no such folder; give a checkpoint folder or a hub name"),
        (["--model", "rm"], "rm: is a reward model (LlamaForSequenceClassification); --model"),
        (["learning_rat=1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["demonstration=x"], "unknown setting 'demonstration'; did you mean 'demonstrations'?"),
        (["truncation_mode=keep_end"], "are dropped and counted, not truncated"),
        (["push_to_hub=true"], "unknown setting 'push_to_hub'; this command writes a folder"),
        (["chat_template_path=nope"], "chat_template_path=nope: no such file or folder"),
        (["report_to=wandb"], "requires wandb to be installed"),
        (["dtype=float99"], "dtype is 'float99'; give auto, float32, bfloat16 or float16"),
        (["--demonstrations", "tools.jsonl"], "tools.jsonl:1: column 'tools' is 5; expected a li"),
        (["--demonstrations", "pairs.jsonl"], "pairs.jsonl:1: expected columns 'prompt' and 'co"),
        (["--demonstrations", "bad.jsonl"], "bad.jsonl:1: column 'messages' has no assistant mess"),
        (["--demonstrations", "mixed.jsonl"], "mixed.jsonl:2: column 'completion' is a list of me"),
        (["--demonstrations", "empty.jsonl"], "empty.jsonl:1: column 'completion' is empty"),
    ],
)
def test_bad_input(shiftrm, demos, files, reward_model, tokenizer, arguments, message):
    reward_model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    user = {"role": "user", "content": "a"}
    write_jsonl("tools.jsonl", [{"prompt": "a", "completion": "b", "tools": 5}])
    write_jsonl(files / "bad.jsonl", [{"messages": [user]}])
    write_jsonl(files / "mixed.jsonl", [demos[0], {"prompt": "a", "completion": [user]}])
    write_jsonl(files / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    refused(shiftrm, [*SFT, *arguments], message)


def test_options_from_a_file(shiftrm, demos, files):
    lines = ["model: policy", "demonstrations: demos.jsonl", "output: o", "max_steps: 1"]
    (files / "c.yaml").write_text("\n".join(lines))
    assert shiftrm("sft", "--config", "c.yaml", "--output", "out")[0] == 0
    refused(shiftrm, ["sft", "--model", "policy", "--output", "x"], "--demonstrations is missing")
