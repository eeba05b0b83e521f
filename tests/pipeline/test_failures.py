"""A stage that fails is one line with its name and the cause; finished stages are kept."""

import errno

import pytest
import torch

from shiftrm.cli import main
from shiftrm.files import write_jsonl
from shiftrm.pipeline import evaluating
from shiftrm.policies import trl_run as policy_run
from tests.pipeline.gold_world import recipe, write_recipe


@pytest.fixture
def fails(world, tmp_path, here, capsys):
    """fails(words..., sections...) -> the error's line; stages before it are finished."""

    def run(*words, status=2, **sections):
        path = write_recipe(tmp_path / "mine.yaml", world, **sections)
        assert main(["run", str(path), "--output", str(tmp_path / "run"), *words]) == status
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("shiftrm")
        ]
        assert len(lines) == 1
        return lines[0]

    return run


def test_bad_data(fails, world, tmp_path):
    data = recipe(world)["data"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"\n')
    data["pairs"]["source"] = str(tmp_path / "bad.jsonl")
    said = fails(data=data)
    assert said.startswith("shiftrm: error: stage data: ")
    assert "bad.jsonl:1" in said
    assert not (tmp_path / "run" / "data").exists()


def test_all_rows_are_evaluated_on(fails, world, tmp_path):
    rows = [{"prompt": "the same", "completion": f"answer {k}"} for k in range(3)]
    write_jsonl(tmp_path / "same.jsonl", rows)
    source = {"format": "preference", "source": str(tmp_path / "same.jsonl")}
    data = {**recipe(world)["data"], "prompts": source, "eval_prompts": source}
    said = fails(data=data)
    assert "stage data: data.prompts: no rows are left" in said
    assert "in_evaluation" in said


def test_out_of_memory_in_a_training(fails, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(policy_run, "run_trl", full)
    monkeypatch.setattr("shiftrm.policies.commands.run_trl", full)
    said = fails()
    assert said.startswith("shiftrm: error: stage sft: out of memory; give execution.micro_batch")
    assert "execution.micro_batch_size=2 (now 4)" in said
    assert (tmp_path / "run" / "data" / "stage.json").is_file()
    monkeypatch.undo()


@pytest.mark.slow
def test_out_of_memory_in_measuring_and_a_full_disk(fails, tmp_path, monkeypatch, world):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "open_watch", full)
        said = fails()
    assert "stage evaluation: out of memory; give execution.sampling_batch_size=16 (now 32)" in said
    assert (tmp_path / "run" / "responses" / "stage.json").is_file()

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "write_jsonl", no_space)
        said = fails("execution.sampling_batch_size=16")
    assert "stage evaluation: the disk is full at" in said
    assert "finished stages are kept" in said
