"""Two processes that share the tasks of a step train what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.oodpl.oodpl_distributed_run import run

pytestmark = pytest.mark.slow


def test_two_processes_train_what_one_does(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    one = run(tmp_path / "tokenizer", tmp_path / "one")
    (tmp_path / "two").mkdir()
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(__file__).with_name("oodpl_distributed_run.py"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            script,
            str(tmp_path / "tokenizer"),
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),  # for what the script shares with tests
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two" / "results.pt")
    for name in ("straight", "resumed"):
        assert (one[name]["processes"], two[name]["processes"]) == (1, 2)
        for key, weight in one["straight"]["weights"].items():
            for found in (one[name], two[name]):
                torch.testing.assert_close(
                    found["weights"][key], weight, rtol=0, atol=1e-9, msg=key
                )
        for ours, theirs in zip(one[name]["logs"], two[name]["logs"], strict=True):
            for key in ours.keys() - {"epoch", "step"}:
                assert theirs[key] == pytest.approx(ours[key], abs=1e-6), key
    assert "not finite" in one["error"]
    assert "fine-tuning row" in two["error"], "the process that did not fail says it, too"
    assert "too_few" not in one
    assert two["too_few"] == "domains_per_step is 1 on 2 processes; each process needs a task"
