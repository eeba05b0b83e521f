"""The program that runs one job from a file: its status, and its error as data."""

import errno
import json

import pytest

from shiftrm.errors import UserError
from shiftrm.pipeline import child, launch
from shiftrm.pipeline.jobs import Sample, Sft, plain


@pytest.fixture
def run(tmp_path):
    """run(job) -> the status, and what stands in the error file (None if there is none)."""

    def start(job):
        data = {"job": plain(job), "output": str(tmp_path / "out")}
        (tmp_path / "job.json").write_text(json.dumps(data))
        error = tmp_path / "error.json"
        status = child.main(str(tmp_path / "job.json"), str(error))
        return status, json.loads(error.read_text()) if error.exists() else None

    return start


def test_bad_input_is_handed_over_as_data(run, capsys):
    status, said = run(Sft("no/such/model", "no-such-file.jsonl"))
    assert status == 2
    assert list(said) == ["message"]
    assert "no-such-file.jsonl" in said["message"] or "no/such/model" in said["message"]
    assert capsys.readouterr().err.splitlines()[-1] == f"shiftrm: error: {said['message']}"


def test_a_full_disk_keeps_its_number(run, monkeypatch):
    def full(job, output):
        raise OSError(errno.ENOSPC, "No space left on device", str(output))

    monkeypatch.setattr(child, "perform", full)
    status, said = run(Sample("p", "q"))
    assert (status, said["errno"]) == (2, errno.ENOSPC)


def test_a_mistake_in_the_code_is_no_message_for_the_user(run, monkeypatch):
    def broken(job, output):
        raise KeyError("a")

    monkeypatch.setattr(child, "perform", broken)
    with pytest.raises(KeyError):
        run(Sample("p", "q"))


def test_only_the_first_process_speaks(run, monkeypatch, capsys):
    def refused(job, output):
        raise UserError("bad")

    monkeypatch.setattr(child, "perform", refused)
    monkeypatch.setenv("RANK", "1")
    assert run(Sample("p", "q")) == (2, None)
    assert capsys.readouterr().err == ""


def test_a_job_that_succeeds_says_so_and_leaves_no_error(run, monkeypatch, capsys):
    monkeypatch.setattr(Sample, "run", lambda self, output: f"to {output.name}")
    assert run(Sample("p", "q")) == (0, None)
    assert capsys.readouterr().out == "to out\n"


def test_a_token_without_an_embedding_is_told_as_by_the_command(run, monkeypatch):
    def outside(self, output):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(Sample, "run", outside)
    status, said = run(Sample("p", "q"))
    assert status == 2
    assert said["message"].startswith("a token has no embedding: the tokenizer is not the model's")


def test_another_index_error_is_a_mistake_in_the_code(run, monkeypatch):
    def outside(self, output):
        raise IndexError("list index out of range")

    monkeypatch.setattr(Sample, "run", outside)
    with pytest.raises(IndexError, match="list index"):
        run(Sample("p", "q"))


def test_an_interrupted_stage_leaves_no_temporary_file_to_be_published(tmp_path):
    """A kill while a file is written leaves `.NAME.xxxxxxxx.tmp` beside what the job continues."""
    execution = {"processes": 1, "launch": "", "bf16": False, "report_to": "none"}
    keep = tmp_path / "keep"
    launch._begin_or_continue(keep, execution)
    (keep / "groups.jsonl.partial").write_text("two groups")
    (keep / ".model.work").mkdir()
    for left in (".groups.jsonl.partial.0123abcd.tmp", ".model.work/.run.json.0123abcd.tmp"):
        (keep / left).write_text("half")
    launch._begin_or_continue(keep, execution)
    found = {str(path.relative_to(keep)) for path in keep.rglob("*")}
    assert found == {"execution.json", "groups.jsonl.partial", ".model.work"}
