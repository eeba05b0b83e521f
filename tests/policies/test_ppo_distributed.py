"""Two processes that share the work of PPO compute what one does, and fail as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shiftrm.errors import UserError
from shiftrm.policies import ppo_runtime
from shiftrm.policies.ppo_runtime import Processes
from tests.policies.ppo_distributed_run import CASES, run, train
from tests.trainers.test_distributed import DDP, LAUNCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ppo")


@pytest.fixture(scope="module")
def one(folder):
    (folder / "one").mkdir()
    return run(folder / "one")


@pytest.fixture(scope="module")
def two(folder):
    """What either process of `accelerate launch` found."""
    (folder / "two").mkdir()
    (folder / "ddp.yaml").write_text(LAUNCH + DDP)
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--config_file"]
    script = str(Path(__file__).with_name("ppo_distributed_run.py"))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(folder / "ddp.yaml"), script, str(folder / "two")],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((folder / f"two/processes-{i}.json").read_text()) for i in (0, 1)] == [2, 2]
    return [torch.load(folder / f"two/results-{i}.pt") for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_compute_what_one_does(one, two, name):
    theirs = one[name]
    tolerance = 1e-5 if name == "fp32" else 1e-9
    for ours in two:
        assert ours[name]["weights"].keys() == theirs["weights"].keys()
        for key, weight in theirs["weights"].items():
            found = ours[name]["weights"][key]
            torch.testing.assert_close(found, weight, rtol=0, atol=tolerance, msg=key)
        for log, expected in zip(ours[name]["logs"], theirs["logs"], strict=True):
            assert log == pytest.approx(expected, abs=1e-5 if name == "fp32" else 1e-8)
    assert two[0][name]["texts"] == theirs["texts"], "the same roll-outs"
    assert two[1][name]["texts"] == [], "the main process alone measures"
    for key, weight in two[0][name]["weights"].items():
        assert torch.equal(weight, two[1][name]["weights"][key]), "bit for bit on both"


@pytest.mark.slow
def test_resumed_on_two_processes_is_as_if_never_stopped(one, two):
    for results in (one, two[0], two[1]):
        for key, weight in results["fp64"]["weights"].items():
            assert torch.equal(results["resumed"]["weights"][key], weight)
        assert results["resumed"]["logs"] == results["fp64"]["logs"]
    assert two[0]["resumed"]["texts"] == two[0]["fp64"]["texts"][1:], "step 2 was lost"
    assert (one["killed"], two[0]["killed"]) == ("on purpose", "on purpose")
    assert two[1]["killed"] == "process 0 failed: Killed: on purpose"


@pytest.mark.slow
def test_a_failure_on_one_process_ends_both_in_the_same_words(two):
    first, second = (results["errors"] for results in two)
    for what, words in (
        ("reward", "UserError: the reward model has no words for it"),
        ("memory", "UserError: step 1: out of memory in an update; lower micro_batch_size"),
        ("disk", "no space left for the checkpoint of step 1"),
        ("nan", "UserError: step 1: the reward is nan for the prompt"),
    ):
        assert words in first[what]
        assert second[what] == first[what]
    assert first["bug"] == "UserError: process 1 failed: KeyError: 'a bug'"
    assert second["bug"] == "KeyError: 'a bug'"


@pytest.mark.slow
def test_processes_without_work_are_told_of(two):
    words = "forward_batch_size=100 makes fewer chunks to sample than there are processes (2); 6"
    assert [w.startswith(words) for w in two[0]["idle"]["warnings"]] == [True]
    assert two[1]["idle"]["warnings"] == two[0]["fp64"]["warnings"] == []


@pytest.mark.slow
def test_one_process_continues_what_two_began(one, two, folder):
    """And has nothing left to do: the weights are those two processes saved."""
    found = train("resumed", checkpoints=folder / "two")
    for key, weight in two[0]["resumed"]["weights"].items():
        assert torch.equal(found["weights"][key], weight)
    assert found["logs"] == two[0]["resumed"]["logs"]


def test_gradients_are_summed_in_buckets_and_missing_ones_are_zeros(monkeypatch):
    processes = Processes(torch.device("cpu"))
    processes.count = 2
    exchanged = []

    def double(tensor):  # as if the other process had the same
        exchanged.append(tensor.numel())
        return tensor.mul_(2)

    monkeypatch.setattr(processes, "sum_", double)
    monkeypatch.setattr(ppo_runtime, "BUCKET", 8)
    sizes = [(2, 3), (2,), (9,), (1,), (4, 2)]
    parameters = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in sizes]
    parameters.append(nn.Parameter(torch.zeros(3)))
    for i, parameter in enumerate(parameters):
        if i != 3:
            parameter.grad = torch.full_like(parameter, float(i))
    processes.sum_gradients(parameters)
    assert exchanged == [8, 9, 1, 8, 3]
    for i, parameter in enumerate(parameters):
        assert parameter.grad.tolist() == torch.full_like(parameter, 2.0 * i * (i != 3)).tolist()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_launches_are_refused(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"PPO does not run under {name}: each process samples"):
        Processes(torch.device("cpu"))
