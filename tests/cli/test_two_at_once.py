"""Two real processes on one output: one writes, the other says who does."""

import subprocess
import sys
import time

import pytest

from shiftrm.files import read_jsonl, write_jsonl


def until(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never began")


@pytest.mark.slow
def test_two_samplings_of_one_file(files, shiftrm):
    write_jsonl("many.jsonl", [{"prompt": "the red"}, {"prompt": "a dog"}] * 400)
    words = ["sample", "--policy", "policy", "--prompts", "many.jsonl", "--output", "o.jsonl"]
    words += ["--responses", "2", "--max-new-tokens", "8", "--batch-size", "4"]
    first = subprocess.Popen(
        [sys.executable, "-m", "shiftrm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until((files / "o.jsonl.partial").exists, first)
        status, output = shiftrm(*words)
        assert status == 2
        assert f"another command is writing it (process {first.pid}" in output.err
        assert output.err.count("\n") == 1
        _, said = first.communicate(timeout=300)
        assert first.returncode == 0, said
    finally:
        first.kill()
    rows = read_jsonl("o.jsonl")
    assert len(rows) == 800
    assert all(len(row["response_ids"]) == 2 for row in rows)


@pytest.mark.slow
def test_a_killed_command_blocks_nobody(files, shiftrm):
    words = ["train", "--model", "policy", "--pairs", "pairs.jsonl", "--output", "out"]
    words += ["max_steps=2", "per_device_train_batch_size=2"]
    first = subprocess.Popen(
        [sys.executable, "-m", "shiftrm", *words, "max_steps=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until((files / ".out.work" / "progress.log").exists, first)
        status, output = shiftrm(*words)
        assert status == 2
        assert f"another command is writing it (process {first.pid}" in output.err
    finally:
        first.kill()
        first.wait()
    status, output = shiftrm(*words[:-2], "max_steps=100000", "--output", "other", "max_steps=1")
    assert status == 0, output.err
    status, output = shiftrm(*words)
    assert status == 2, "another run's work is not thrown away"
    assert "holds an unfinished training with other settings" in output.err
