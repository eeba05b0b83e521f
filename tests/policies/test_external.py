"""Command lines with places, and the check of what a program made."""

import json
import shutil
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.policies.external import PLACES, check_made, parse_command
from tests.conftest import llama_config


def refused(given):
    with pytest.raises(UserError) as error:
        parse_command(given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_text_is_split_as_a_shell_would_and_a_list_is_taken_as_it_is():
    text = "A=1 B='x y' train.sh {policy} --out={output}/. \\\n 'two words' '{\"a\": {\"b\": 1}}'"
    command = parse_command(text)
    assert command.environment == (("A", "1"), ("B", "x y"))
    assert command.words == (
        "train.sh", "{policy}", "--out={output}/.", "two words", '{"a": {"b": 1}}',
    )  # fmt: skip
    assert parse_command(list(command.all_words)) == command
    listed = parse_command(["a b", "{policy}", "{output}", 3, True])
    assert listed.words == ("a b", "{policy}", "{output}", "3", "true")


def test_places_are_filled_once_and_doubled_braces_are_braces():
    command = parse_command("X={seed} run {policy} {output} {{policy}} {{any}}")
    filled = command.filled({"policy": "a {output} b", "output": "/o o", "seed": 7})
    assert filled.environment == (("X", "7"),)
    assert filled.words == ("run", "a {output} b", "/o o", "{policy}", "{any}")
    assert command.places == {"policy", "output", "seed"}


def test_every_place_can_be_filled():
    words = ["run", *(f"{{{name}}}" for name in PLACES)]
    filled = parse_command(words).filled({name: name.upper() for name in PLACES})
    assert filled.words == ("run", *(name.upper() for name in PLACES))


def test_what_cannot_be_run_is_refused_in_one_line():
    assert "unknown place {polcy}; did you mean 'policy'?" in refused("run {polcy} {output}")
    assert "no place {output}" in refused("run {policy}")
    assert "no place {policy}" in refused("run {output}")
    assert "names no program" in refused("A=1")
    assert "names no program" in refused("")
    assert "close the quotation" in refused("run '{policy} {output}")
    assert "no shell runs it" in refused("a {policy} {output} && b")
    assert "expected" in refused(3) or "give a text, or a list" in refused(3)
    assert "places in quotation marks" in refused(["run", {"policy": None}, "{output}"])


def test_the_program_must_be_there(tmp_path, monkeypatch):
    def check(program):
        parse_command([program, "{policy}", "{output}"]).check_program()

    file = tmp_path / "train.sh"
    file.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="cannot be run; give it the right with `chmod"):
        check(str(file))
    file.chmod(0o755)
    check(str(file))
    with pytest.raises(UserError, match=r"train.sh: no such program on the PATH"):
        check("train.sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    check("train.sh")
    check("{python}")
    check(sys.executable)
    with pytest.raises(UserError, match="is a folder"):
        check(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        check(str(tmp_path / "other"))


@pytest.fixture
def before(tmp_path, policy, tokenizer):
    policy.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    return tmp_path / "before"


@pytest.fixture
def made(tmp_path, policy, tokenizer):
    """A folder with one weight changed."""
    torch.manual_seed(0)
    other = LlamaForCausalLM(policy.config)
    other.load_state_dict(policy.state_dict())
    with torch.no_grad():
        next(other.parameters())[0, 0] += 0.5
    other.save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    return tmp_path / "made"


def test_a_changed_policy_is_taken(before, made):
    check_made(made, str(before))


def test_what_is_no_trained_policy_is_refused(before, made, policy, tokenizer, tmp_path):
    def said(folder=made):
        with pytest.raises(UserError) as error:
            check_made(folder, str(before))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "wrote no such folder" in said(tmp_path / "nothing")
    kept = shutil.copytree(made, tmp_path / "kept")

    def restored():
        shutil.rmtree(made)
        shutil.copytree(kept, made)

    for path in made.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in said()
    restored()
    (made / "model.safetensors").unlink()
    assert "has no weights" in said()
    (made / "config.json").unlink()
    assert "has no config.json" in said()
    (made / "adapter_config.json").write_text("{}")
    assert "holds an adapter alone" in said()
    restored()
    (made / "latest").symlink_to(before)
    assert "is a link" in said()
    restored()
    (made / "model.safetensors").write_bytes(b"half")
    assert "cannot be loaded" in said()
    restored()
    policy.save_pretrained(made)
    assert "nothing was trained" in said()
    restored()
    half = LlamaForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
    half.save_pretrained(made)  # rounded, and not trained
    assert "nothing was trained" in said()
    restored()
    broken = LlamaForCausalLM.from_pretrained(made)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    broken.save_pretrained(made)
    assert "finite" in said() or "nan" in said().lower()
    restored()
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(made)
    assert "is a reward model" in said()
    restored()
    data = json.loads((made / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (made / "tokenizer.json").write_text(json.dumps(data))
    assert "another vocabulary" in said()
