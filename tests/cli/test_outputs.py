"""Where commands write: new places only, never an input by any name, one command at a time."""

import argparse
import fcntl
import os
import shutil
import socket
from pathlib import Path

import pytest

from shiftrm.cli.checks import WORK, output_file, output_folder, output_rows
from shiftrm.errors import UserError
from shiftrm.files import iterate_jsonl, write_jsonl
from shiftrm.locks import exclusive, hold, holding
from shiftrm.records import Record, write_records


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an input file, a model and everything that is no file."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("precious")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    os.link("data.jsonl", "hard.jsonl")
    os.symlink("data.jsonl", "link.jsonl")
    os.symlink("nowhere.jsonl", "dangling.jsonl")
    os.symlink("model", "linked")
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    return tmp_path


def everything(folder):
    """Every name with its bytes, links as links."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
    }


SAME = ("data.jsonl", "./data.jsonl", "model/../data.jsonl", "linked/../data.jsonl", "DATA.jsonl")
SAME = (*SAME, "hard.jsonl")
OUTPUTS = {
    **dict.fromkeys(SAME, "already reads or writes it"),
    **dict.fromkeys(("link.jsonl", "dangling.jsonl", "loop"), "is a link"),
    "pipe": "is a device, pipe or socket",
    "model": "is a folder",
    "model/config.json": "lies in model, which this command reads",
    "model/new/x.jsonl": "lies in model, which this command reads",
    "linked/x.jsonl": "lies in model, which this command reads",
    "data.jsonl/x": "is not a folder",
    "loop/x": "Too many levels of symbolic links",
    "": "is a folder",
    "/": "is the root folder",
    "o\0": "is not a valid file name",
    "x" * 256: "the name has 256 bytes",
    "ü" * 125: "the name has 250 bytes, and at most 2",
    "x" * 300 + "/y": "File name too long",
}


@pytest.mark.parametrize("option", OUTPUTS)
def test_files_that_are_no_outputs(here, option):
    before = everything(here)
    with holding(["test"]), pytest.raises(UserError) as error:
        output_file(option, apart_from=["data.jsonl", "model", None, "owner/name"])
    assert OUTPUTS[option] in str(error.value)
    assert everything(here) == before


def test_a_file_that_is_there(here):
    Path("old.jsonl").write_text("precious, too")
    with pytest.raises(UserError, match=r"old\.jsonl: already there"):
        output_file("old.jsonl")
    assert output_file("old.jsonl", may_exist=True) == Path("old.jsonl")
    assert output_file("data.JSON") == Path("data.JSON"), "no input, so another file"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model", "already there and not empty"),
        ("Model", "lies in|already reads or writes it"),
        ("model/below", "lies in model, which this command reads"),
        ("linked", "is a link"),
        ("pipe", "is not a folder"),
        ("data.jsonl", "is not a folder"),
        ("/", "is the root folder"),
        ("x" * 250, "the name has 250 bytes"),
    ],
)
def test_folders_that_are_no_outputs(here, option, message):
    before = everything(here)
    with holding(["test"]), pytest.raises(UserError, match=message):
        output_folder(option, apart_from=["model"], beside=[WORK])
    assert everything(here) == before


def test_what_a_command_writes_beside_its_output_is_no_input(here):
    Path(".out.work/checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.out\.work, which is written beside it"):
        output_folder("out", apart_from=[".out.work/checkpoint-2"], beside=[WORK])
    Path("o.jsonl.partial").write_text("{}")
    with pytest.raises(UserError, match=r"o\.jsonl\.partial, which is written beside it"):
        output_file("o.jsonl", apart_from=["o.jsonl.partial"], beside=["{name}.partial"])
    os.rename("pipe", "p.jsonl.partial")
    with pytest.raises(UserError, match=r"p\.jsonl\.partial: is a device, pipe or socket"):
        output_file("p.jsonl", beside=["{name}.partial"])
    Path(".q.jsonl.lock").write_text('{"prompt": "the"}')
    with pytest.raises(UserError, match=r"\.q\.jsonl\.lock, which is written beside it"):
        output_file("q.jsonl", apart_from=[".q.jsonl.lock"])
    with holding(["test"]), pytest.raises(UserError, match=r"q\.jsonl\.lock: in the way"):
        output_file("q.jsonl")
    assert Path(".q.jsonl.lock").read_text() == '{"prompt": "the"}'


def test_a_place_is_held_until_the_command_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with holding(["score", "--output", "a b/o.jsonl"]):
        output_file("a b/o.jsonl")
        with holding(["score"]), pytest.raises(UserError) as error:
            output_file(str(tmp_path / "a b" / "o.jsonl"))
        with holding(["score"]):
            output_file("a b/p.jsonl")
    who = f"process {os.getpid()} on {socket.gethostname()}: shiftrm score --output 'a b/o.jsonl'"
    assert f"another command is writing it ({who}); wait for it" in str(error.value)
    assert os.listdir() == [], "neither locks nor the folders made for them stay"
    with holding(["score"]):
        output_file("a b/o.jsonl")


def test_folders_that_were_written_into_stay(tmp_path):
    with holding(["x"]):
        hold(tmp_path / "a" / "b" / "o.jsonl")
        (tmp_path / "a" / "o.txt").touch()
    assert everything(tmp_path) == {str(tmp_path / "a"): False, str(tmp_path / "a/o.txt"): b""}


def test_a_dead_process_holds_nothing(tmp_path):
    lock = tmp_path / ".o.lock"
    lock.write_text("shiftrm: process 1 on nowhere: shiftrm sample\n")
    with exclusive(lock, tmp_path / "o"):
        assert f"process {os.getpid()} " in lock.read_text()
    assert not lock.exists()


def test_the_lock_is_of_the_file_that_has_the_name(tmp_path):
    """Who waits with the old file open, while its holder removes it, must not think it holds it."""
    lock = tmp_path / ".o.lock"
    lock.touch()
    with open(lock) as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        lock.unlink()
        with exclusive(lock, tmp_path / "o"), pytest.raises(UserError), exclusive(lock, tmp_path):
            pass


def test_other_processes_of_one_command_do_not_wait_for_the_first(tmp_path, monkeypatch):
    with holding(["train"]):
        hold(tmp_path / "o")
        monkeypatch.setenv("RANK", "1")
        with holding(["train"]):
            hold(tmp_path / "o")


def test_packed_rows(tmp_path):
    rows = [{"prompt": "the", "n": 1}, {"prompt": "über"}]
    with pytest.raises(UserError, match=r"call it o\.csv\.jsonl"):
        output_rows(str(tmp_path / "o.csv.gz"))
    path = output_rows(str(tmp_path / "o.jsonl.gz"))
    content = write_jsonl(path, rows).read_bytes()
    assert content[:2] == b"\x1f\x8b"
    assert content == write_jsonl(tmp_path / "other.jsonl.gz", rows).read_bytes()
    assert [row for _, row in iterate_jsonl(path)] == rows


# -- every command ---------------------------------------------------------------------------


def commands(parser, name=()):
    """Every command of the parser, as its words and its parser."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        return [(name, parser)]
    return [c for n, p in below[0].choices.items() for c in commands(p, (*name, n))]


@pytest.fixture
def world(shiftrm, files, reward_model, tokenizer):
    """A file and a model for every option that reads something."""
    reward_model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    write_jsonl("bench.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "subset": "x"}])
    write_jsonl("demonstrations.jsonl", [{"prompt": "the", "completion": " cat"}])
    shutil.copy("groups.jsonl", "other.jsonl")
    Path("finished").mkdir()
    write_records("finished/records.jsonl", [Record("ppo", "fixed", 0, "kl", 1.0)])
    return files


READS = {
    "score": ["--model", "rm", "--data", "groups.jsonl"],
    "convert": ["preference", "pairs.jsonl", "--kind", "pairs"],
    "sample": ["--policy", "policy", "--prompts", "prompts.jsonl", "--max-new-tokens", "4"],
    "diagnose": ["--model", "rm", "--data", "groups.jsonl"],
    "report": ["finished"],
    "train": ["--model", "policy", "--pairs", "pairs.jsonl", "max_steps=1"],
    "adapt": ["--model", "rm", "--pairs", "pairs.jsonl", "--groups", "groups.jsonl"],
    "sft": ["--model", "policy", "--demonstrations", "demonstrations.jsonl"],
    "optimise": ["dpo", "--policy", "policy", "--pairs", "pairs.jsonl"],
    "demo": [],
    "run": [],
    "meta-train": ["--model", "policy", "--domains", "domains"],
    "meta-test": ["--policy", "policy", "--reward", "rm", "--domains", "domains"],
    "evaluate win-rate": [
        *("--ours", "groups.jsonl", "--theirs", "other.jsonl"),
        *("--judge", "reward-model", "--model", "rm"),
    ],
    "evaluate sheet": ["--ours", "groups.jsonl", "--theirs", "other.jsonl"],
    "evaluate answers": ["--key", "groups.jsonl", "--answers", "other.jsonl"],
    "evaluate diversity": ["groups.jsonl"],
    "evaluate best-of-n": ["--samples", "groups.jsonl", "--proxy", "rm", "--gold", "rm"],
    "evaluate rewardbench": ["--model", "rm", "--data", "bench.jsonl"],
}
"""What each command reads here; a new command has to say it."""


def every_command():
    from shiftrm.cli import build_parser

    names = [" ".join(name) for name, _ in commands(build_parser())]
    return [name for name in names if name != "serve"]  # it has no output


@pytest.mark.parametrize("name", every_command())
def test_no_command_writes_over_anything(world, shiftrm, name):
    """A file or a link of somebody's, an input, what lies in a model, a pipe, the root."""
    arguments = READS[name]
    suffix = {"report": ".html", "evaluate best-of-n": ".json"}.get(name, ".jsonl")
    Path(f"precious{suffix}").write_text("precious")
    os.symlink("groups.jsonl", f"link{suffix}")
    os.symlink(f"new{suffix}", f"dangling{suffix}")
    os.mkfifo(f"pipe{suffix}")
    if name == "run":
        arguments = [recipe()]
    before = everything(".")
    outputs = [f"{place}{suffix}" for place in ("precious", "link", "dangling", "pipe")]
    outputs += ["groups.jsonl", "./policy/../groups.jsonl", "rm/config.json", "policy/config.json"]
    for output in (*outputs, "/", "x" * 300):
        status, said = shiftrm(*name.split(), *arguments, "--output", output)
        assert (status, said.err.count("\n")) == (2, 1), (output, said)
        assert everything(".") == before, output


def recipe():
    """A recipe whose models and data are here."""
    Path("recipe.yaml").write_text(
        "model: policy\nsft: null\ndata:\n"
        "  pairs: {format: preference, source: pairs.jsonl}\n"
        "  prompts: {format: preference, source: pairs.jsonl}\n"
        "judge: {kind: reward-model, model: rm}\n"
    )
    return "recipe.yaml"


@pytest.mark.parametrize("name", every_command())
def test_no_command_writes_where_another_one_does(world, shiftrm, name):
    """One line that says who holds it, status 2, and nothing is read or written."""
    output = {"report": "o.html", "evaluate best-of-n": "o.json"}.get(name, "o.jsonl")
    arguments = [recipe()] if name == "run" else READS[name]
    before = everything(".")
    with holding(["sample", "--output", output]):
        hold(Path(output).absolute())
        status, said = shiftrm(*name.split(), *arguments, "--output", output)
    assert status == 2
    assert f"another command is writing it (process {os.getpid()}" in said.err
    assert said.err.count("\n") == 1
    assert everything(".") == before
