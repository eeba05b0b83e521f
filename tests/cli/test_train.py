"""shiftrm train: settings from everywhere, held-out sets, the card, LoRA, bad input."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import Scorer
from tests.cli.conftest import refused
from tests.conftest import llama_config
from tests.data.test_sources import write

TRAIN = ["train", "--model", "policy", "--pairs", "pairs.jsonl", "--output", "out"]


def test_no_steps_are_refused(shiftrm):
    status, output = shiftrm(*TRAIN, "max_steps=0")
    assert (status, output.err.count("\n")) == (2, 1)
    assert "max_steps is 0; give at least 1, or leave it out" in output.err


def test_pairs_that_are_trained_on_and_measured_on_are_said(shiftrm, caplog):
    status, output = shiftrm(*TRAIN, "--eval-pairs", "pairs.jsonl", "max_steps=1")
    assert status == 0
    [said] = [r.message for r in caplog.records if "trained on" in r.message]
    assert said.startswith("pairs.jsonl: 12 of its 12 pairs are among those trained on")
    words = r"Training all [\d,]+ weights: learning_rate 1e-05, the default for this; gradient "
    assert re.match(words + r"checkpointing off\.\n", output.out)


def test_the_file_and_over_it_the_command_line(shiftrm, files, pairs):
    write(files / "chat.csv", pairs)
    config = {
        "model": "policy",
        "pairs": "pairs.jsonl",
        "eval-pairs": {"chat": "chat.csv", "same": "pairs.jsonl"},
        "groups": "groups.jsonl",
        "output": "elsewhere",
        "preset": "scale_free",
        "learning_rate": "1e-3",
        "save_strategy": False,  # YAML's no
        "max_steps": 9,
        "seed": 7,
    }
    (files / "c.yaml").write_text(yaml.safe_dump(config))
    status, output = shiftrm(
        "train --config c.yaml max_steps=3 --output out --logging-steps 2 "
        "eval_strategy=steps --eval-steps 2"
    )
    assert status == 0
    assert "Trained on 12 pairs (0 dropped) for 3 steps" in output.out
    for name in ("chat", "same"):
        words = rf"Accuracy on 12 held-out pairs of {name}: \d\.\d+ before, \d\.\d+ after \(95 % "
        words += r"interval \d\.\d+ to \d\.\d+; a coin: 0\.5\): \d+ prompts; fewer than 30 show"
        assert re.search(words, output.out)
    assert re.search(r"step 2 of 3: loss \d", output.out), "progress in words"
    assert sorted(p for p in os.listdir() if "out" in p or "else" in p) == ["out"]
    log = read_jsonl("out/training_log.jsonl")
    assert [row["step"] for row in log] == [0, 2, 3]
    assert all("eval_chat_accuracy" in row for row in log)
    assert "meta_influence" in log[1]
    _check_card((files / "out" / "README.md").read_text())


def _check_card(card):
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["reward-model", "shiftrm", "metarm"]
    for words in (
        "| chat | 12 | accuracy |",
        "| preset | `scale_free` |",
        "| learning_rate | `0.001` |",
        "| max_steps | `3` |",
        "| deploy | `adapted` |",
        "| eval chat | `chat.csv` | 12 |",
        "Seed 7;",
        f"torch {torch.__version__}",
        "relative change of the gradient by the meta step",
    ):
        assert words in text, words
    assert "[More Information Needed]" not in text
    assert "save_steps" not in text, "it has its default value"


def test_what_was_dropped_is_said(shiftrm, files, pairs):
    long = {"prompt": "the", "chosen": " cat" * 30, "rejected": " dog"}
    same = {"prompt": "the", "chosen": " cat", "rejected": "  cat"}
    write_jsonl(files / "pairs.jsonl", [*pairs, long, same])
    status, output = shiftrm(*TRAIN, "max_steps=1", "max_length=20")
    assert status == 0
    assert "Trained on 12 pairs (2 dropped) for 1 steps" in output.out
    dropped = "1 longer than max_length=20 tokens; 1 whose two sides are the same tokens."
    assert f"Dropped from the train pairs: {dropped}" in output.out
    assert dropped in (files / "out" / "README.md").read_text()


def test_every_format_trains_the_same_model(shiftrm, files, pairs):
    weights = []
    for name in ("x.jsonl", "x.parquet", "x.csv", "disk"):
        write(files / name, pairs)
        output = f"out-{name}"
        status, _ = shiftrm(*TRAIN, "--pairs", name, "--output", output, "max_steps=1")
        assert status == 0
        weights.append((files / output / "model.safetensors").read_bytes())
    assert len(set(weights)) == 1


def test_sample_and_score_read_every_format(shiftrm, files, reward_model, tokenizer):
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    write(files / "p.csv", [{"prompt": "the red"}, {"prompt": "a, dog"}])
    options = ["--max-new-tokens", 3, "--responses", 2]
    status, _ = shiftrm("sample --policy policy --prompts p.csv --output g.jsonl", *options)
    assert status == 0
    rows = read_jsonl(files / "g.jsonl")
    write(files / "g.parquet", rows)
    for data, output in (("g.jsonl", "a.jsonl"), ("g.parquet", "b.jsonl")):
        status, _ = shiftrm("score", "--model", "rm", "--data", data, "--output", output)
        assert status == 0
    assert (files / "a.jsonl").read_bytes() == (files / "b.jsonl").read_bytes()


def test_scored_rows_must_be_writable(shiftrm, files):
    (files / "x.jsonl").write_text('{"response": "a", "old": NaN}\n')
    status, output = shiftrm("score", "--model", "rm", "--data", "x.jsonl", "--output", "o.jsonl")
    assert (status, "x.jsonl:1: holds NaN or an infinity" in output.err) == (2, True)


def test_models_of_several_labels_are_no_reward_models(shiftrm, files, tokenizer):
    LlamaForSequenceClassification(llama_config(num_labels=2)).save_pretrained(files / "two")
    tokenizer.save_pretrained(files / "two")
    score = ["score", "--model", "two", "--data", "pairs.jsonl", "--output", "o.jsonl"]
    refused(shiftrm, score, "two has num_labels=2; a reward model has num_labels=1")
    refused(shiftrm, [*score, "--model", "policy"], "policy: the checkpoint has no score head")
    refused(shiftrm, [*TRAIN, "--model", "two"], "do not fit a reward model of one label")


def test_lora_is_merged_and_the_adapter_kept(shiftrm, files, pairs):
    status, _ = shiftrm(
        *(*TRAIN, "--eval-pairs", "pairs.jsonl", "max_steps=3", "learning_rate=0.05"),
        *("use_peft=true", "--lora-r", "4", "--lora-target-modules", "q_proj", "v_proj"),
    )
    assert status == 0
    merged = Scorer.from_pretrained("out")
    base = AutoModelForSequenceClassification.from_pretrained("policy", num_labels=1)
    alone = Scorer(PeftModel.from_pretrained(base, "out/adapter"), merged.tokenizer)
    prompts, responses = [p["prompt"] for p in pairs], [p["chosen"] for p in pairs]
    assert merged(prompts, responses) == pytest.approx(alone(prompts, responses), abs=1e-6)
    policy = AutoModelForSequenceClassification.from_pretrained("policy", num_labels=1)
    changed = {
        name
        for (name, a), b in zip(policy.named_parameters(), merged.model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert {re.sub(r".*\.", "", name.removesuffix(".weight")) for name in changed} == {
        "q_proj",
        "v_proj",
        "score",
    }
    assert "LoRA was merged into these weights" in (files / "out" / "README.md").read_text()


CONFIGS = {
    "no mapping": ("- a\n", "c.yaml: expected settings as `key: value`"),
    "no YAML": ("a: [1\n", "c.yaml: not valid YAML"),
    "unknown": ("learning_rat: 1\n", "unknown setting 'learning_rat'; did you mean 'learning_r"),
    "option": ("eval_pair: x\n", "unknown setting 'eval_pair'; did you mean 'eval_pairs'?"),
    "not text": ("groups: 3\n", "--groups is 3; expected text"),
    "not a source": ("eval_pairs: {a: 3}\n", "eval_pairs a: 3; expected a file"),
    "nested": ("training: {seed: 1}\n", "unknown setting 'training'"),
    "another": ("config: d.yaml\n", "c.yaml: a configuration cannot name another one"),
    "bad value": ("seed: x\n", "seed is 'x'; expected a whole number"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_configurations(shiftrm, files, kind):
    content, message = CONFIGS[kind]
    (files / "c.yaml").write_text(content)
    refused(shiftrm, [*TRAIN, "--config", "c.yaml"], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--learning-rat", "1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["--zzzzzz", "1"], "unknown setting 'zzzzzz'; `shiftrm train --help` lists"),
        (["preset=paper"], "unknown setting 'preset'; it is MetaRM's: give --groups"),
        (["pairs=x"], "unknown setting 'pairs'; it is the option --pairs"),
        (["push_to_hub=true"], "unknown setting 'push_to_hub'; this command writes a folder"),
        (["--lora-r", "4"], "lora_r is set without LoRA; add use_peft=true"),
        (["model_init_kwargs={foo: 1}"], "policy: does not take these model_init_kwargs"),
        (["--chat-template-path", "nope"], "chat_template_path=nope: no such file"),
        (["--save-strategy", "sometimes"], "sometimes is not a valid SaveStrategy"),
        (["--report-to", "nonsense"], "nonsense is not supported"),
        (["eval_strategy=steps"], "you didn't pass an `eval_dataset`"),
        (["--attn-implementation", "foo"], 'Specified `attn_implementation="foo"` is not'),
        (["--eval-pairs", "a", "--eval-pairs", "b"], "several --eval-pairs need a name each"),
        (["--eval-pairs", "a/b=x"], "'a/b' is not a name"),
        (["--eval-pairs", "none.jsonl"], "none.jsonl: no such file"),
        (["--pairs", "pairs.txt"], "pairs.txt: no such file"),
        (["--pairs", "nobody/nothing"], "nobody/nothing: cannot be downloaded"),
        (["--model", "nobody/nothing"], "nobody/nothing: cannot be loaded"),
    ],
)
def test_bad_options(shiftrm, arguments, message):
    refused(shiftrm, [*TRAIN, *arguments], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "policy", "--output", "o"], "--pairs is missing; give it here or as pairs in"),
        (["--model", "m", "--pairs", "p", "output_dir=o"], "--output is missing"),
    ],
)
def test_missing_options(shiftrm, arguments, message):
    refused(shiftrm, ["train", *arguments], message)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_bad_rows_of_every_format(shiftrm, files, pairs, suffix):
    bad = {"prompt": "the", "chosen": " cat", "rejected": " cat"}
    write(files / f"bad.{suffix}", [*pairs[:2], bad])
    where = {"jsonl": ":3", "csv": ":4"}.get(suffix, ": row 3")
    message = f"bad.{suffix}{where}: chosen and rejected are equal"
    refused(shiftrm, [*TRAIN, "--pairs", f"bad.{suffix}"], message)


def test_chats_need_a_template(shiftrm, files, tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>"
    )
    for name in os.listdir("policy"):
        if "token" in name or "template" in name:
            (files / "policy" / name).unlink()
    bare.save_pretrained(files / "policy")
    chat = [{"role": "user", "content": "a"}]
    row = {"chosen": chat, "rejected": [{"role": "user", "content": "the"}]}
    write_jsonl(files / "pairs.jsonl", [row])
    refused(shiftrm, TRAIN, "the tokenizer has no chat template")


def test_what_the_card_says_can_be_repeated(shiftrm, files, monkeypatch):
    """The command on the card is the one that was given."""
    monkeypatch.setattr("sys.argv", ["shiftrm", *TRAIN, "max_steps=1", "run_name=a b"])
    assert shiftrm(*TRAIN, "max_steps=1", "run_name=a b")[0] == 0
    card = (files / "out" / "README.md").read_text()
    assert "shiftrm train --model policy --pairs pairs.jsonl --output out max_steps=1" in card
    assert "'run_name=a b'" in card
    assert json.loads((files / "out" / "config.json").read_text())["id2label"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_type=cosine_with_min_lr: One of"),
        ("lr_scheduler_kwargs={x: 1}", "lr_scheduler_kwargs: "),
        ("optim_args=x", "optim_args is 'x'"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_anything_is_read(
    shiftrm, files, word, message
):
    (files / "pairs.jsonl").write_text("{broken")
    refused(shiftrm, [*TRAIN, "max_steps=1", word], message)


BROKEN_BIN = {
    "pickle": pickle.dumps({"weights": [1, 2]}, protocol=4),
    "words": b"garbage garbage",
    "empty": b"",
}


@pytest.mark.parametrize("content", BROKEN_BIN)
def test_a_broken_pytorch_model_is_one_line(shiftrm, files, content):
    """In a process of its own, since torch also warns, and pytest catches warnings."""
    os.remove("policy/model.safetensors")
    (files / "policy" / "pytorch_model.bin").write_bytes(BROKEN_BIN[content])
    done = subprocess.run(
        [sys.executable, "-m", "shiftrm", *TRAIN, "max_steps=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    # A slow machine says how long it has been loading.
    said = [line for line in done.stderr.splitlines() if not line.endswith("so far")]
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    assert "policy: cannot be loaded (its pytorch_model.bin is cut off" in done.stderr
    assert not (files / "out").exists()
