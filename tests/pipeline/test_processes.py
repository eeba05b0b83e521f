"""Stages in processes of their own: commands, accelerate, kill -9, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.pipeline.children import run_child
from tests.pipeline.gold_world import recipe, write_recipe

pytestmark = pytest.mark.slow


def started(path, output, *words):
    """`shiftrm run` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "shiftrm", "run", str(path), "--output", str(output), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def killed_when(process, seen, how=signal.SIGKILL):
    """Kill it as soon as `seen()`; returns its errors."""
    end = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    with process:
        return process.stderr.read()


LONG = {
    "reward": {
        "batch_size": 4,
        "settings": {
            "max_steps": 8,
            "max_length": 64,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    },
    "methods": {"fixed": {"reward": "fixed"}},
    "sft": None,
}


def test_killed_and_continued_is_as_if_never_killed(world, tmp_path, here, capsys):
    path = write_recipe(tmp_path / "mine.yaml", world, **LONG)
    assert main(["run", str(path), "--output", str(tmp_path / "straight")]) == 0
    straight = (tmp_path / "straight" / "records.jsonl").read_bytes()
    capsys.readouterr()

    output = tmp_path / "run"
    killed_when(started(path, output), lambda: list(output.glob(".work/data-*")))
    assert not (output / "data").exists()

    def in_training():
        return list(output.glob(".unfinished/reward_model-*/.model.work/checkpoint-3/complete"))

    killed_when(started(path, output), in_training)
    assert not (output / "reward_model").exists()

    errors = killed_when(
        started(path, output),
        lambda: (output / "methods/fixed/round-1/policy").exists(),
        how=signal.SIGINT,
    )
    lines = [line for line in errors.splitlines() if not line.startswith("[")]
    assert lines == ["shiftrm: interrupted; give the same command again to continue"]
    log = (output / "reward_model" / "log.txt").read_text()
    assert "Continuing from" in log
    assert "step 8 of 8" in log
    assert "step 1 of 8" not in log

    assert main(["run", str(path), "--output", str(output)]) == 0
    assert "already there" in capsys.readouterr().err
    assert (output / "records.jsonl").read_bytes() == straight
    assert not (output / ".unfinished").exists()


def test_commands_run_by_themselves_and_on_two_processes(world, tmp_path, here, capsys):
    """The default: each command a process; trainings by `accelerate launch`."""
    path = write_recipe(
        tmp_path / "mine.yaml",
        world,
        sft=None,
        methods={"dpo": {"reward": "fixed", "policy": "dpo"}},
        execution={"processes": 2, "bf16": False, "gradient_checkpointing": False},
    )
    output = tmp_path / "run"
    status = main(["run", str(path), "--output", str(output)])
    said = capsys.readouterr()
    assert status == 0, said.err
    policy = output / "methods" / "dpo" / "round-1" / "policy" / "model"
    assert "rocesses: 2" in (policy / "README.md").read_text()
    card = (output / "reward_model" / "model" / "README.md").read_text()
    assert "rocesses: 2" in card
    assert str(output) in card
    assert ".unfinished" not in card
    log = read_jsonl(output / "reward_model" / "model" / "training_log.jsonl")
    assert max(row["step"] for row in log) == 2
    assert recipe(world)["reward"]["settings"]["max_steps"] == 2


def test_a_child_ends_with_its_parent(tmp_path):
    """kill -9 of a worker, too."""
    script = (
        "import sys; from shiftrm.pipeline.children import run_child; import os\n"
        "run_child([sys.executable, '-c', 'import os, time; "
        'open("pid", "w").write(str(os.getpid())); time.sleep(60)\'], env=os.environ)'
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    file = tmp_path / "pid"
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    child = int(file.read_text())
    while _alive(child):
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.01)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_childs_status_is_its_own():
    words = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run_child(words, env=os.environ) == 3
