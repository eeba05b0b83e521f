"""Two processes, under DDP and under FSDP2, give what one gives on the same global batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from shiftrm.scoring import Scorer
from tests.trainers.distributed_run import CASES, LOGGED, run

pytestmark = pytest.mark.slow

# What a user gives `accelerate launch --config_file`; on GPUs without the line use_cpu.
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""

NAMES = [*CASES, "resumed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def inputs(folder, reward_model, tokenizer, pairs, groups):
    if not (folder / "data.pt").exists():
        reward_model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        torch.save({"pairs": [*pairs, *pairs[:4]], "groups": groups}, folder / "data.pt")
    return folder


def launch(folder, name, launcher):
    """Every case on two processes; what `distributed_run.run` returns on the first of them."""
    output = folder / name
    output.mkdir()
    script = str(Path(__file__).with_name("distributed_run.py"))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, script, str(folder), str(output)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output / "results.pt")


@pytest.fixture(scope="module")
def finished():
    """Results by mode, so that each mode runs once for all tests."""
    return {}


@pytest.fixture
def results(inputs, finished):
    def of(mode):
        if mode not in finished:
            if mode == "one":
                finished[mode] = run(inputs, inputs / mode, processes=1)
            elif mode == "ddp":
                finished[mode] = launch(
                    inputs, mode, ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
                )
            else:
                (inputs / "fsdp2.yaml").write_text(FSDP2)
                command = ["accelerate.commands.accelerate_cli", "launch", "--config_file"]
                finished[mode] = launch(inputs, mode, [*command, str(inputs / "fsdp2.yaml")])
        return finished[mode]

    return of


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_does(results, name, mode):
    one, two = results("one")[name], results(mode)[name]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["weights"].keys() == one["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-9, msg=key)
    for what in LOGGED:
        assert two[what] == pytest.approx(one[what], abs=1e-6), what
    assert max(one["grad_norm"]) > 0.2, "clipping was on"


def test_influence_under_fsdp2_is_that_of_one_process(results):
    one, two = results("one")["scale_free"], results("fsdp2")["scale_free"]
    assert two["meta_influence"] == pytest.approx(one["meta_influence"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_sharded_under_fsdp2(results, name):
    left = results("fsdp2")[name]
    assert left["wrapped"].startswith("FSDP")
    assert len(left["sharded"]) == (5 if name != "resumed" else 2), "looked at after every step"
    for all_dtensors, share in left["sharded"]:
        assert all_dtensors
        assert 0.49 < share < 0.51, "each process holds a half"
    assert not any(all_dtensors for all_dtensors, _ in results("ddp")[name]["sharded"])
    assert results("ddp")[name]["wrapped"] == "DistributedDataParallel"


def test_the_meta_step_moves_what_forward_passes_see_and_returns(results):
    one, two = results("one")["scale_free"], results("fsdp2")["scale_free"]
    theta, shifted, again = two["seen"]
    assert theta == again, "also where a pass without gradients left gathered copies"
    assert abs(shifted - theta) > 0.1
    assert two["seen"] == pytest.approx(one["seen"], abs=1e-6)
    assert two["in_shards"], "the last act of training was such a pass, too"


@pytest.mark.parametrize("name", ["arguments", "arguments_resumed"])
def test_fsdp2_by_training_arguments_is_the_same(results, name):
    one, two = results("one")["adaptive"], results("ddp")[name]
    assert all(all_dtensors for all_dtensors, _ in two["sharded"])
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-9, msg=key)


def test_the_meta_step_matters_in_these_runs(results):
    one = results("one")
    assert min(one["scale_free"]["meta_influence"]) > 1e-3
    assert one["scale_free"]["meta_objective"] != one["scale_free"]["meta_objective_after"]


@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp2"])
def test_resumed_is_as_if_never_stopped(results, mode):
    straight, resumed = results(mode)["adaptive"], results(mode)["resumed"]
    for key, weight in straight["weights"].items():
        torch.testing.assert_close(resumed["weights"][key], weight, rtol=0, atol=1e-12, msg=key)


def test_what_is_saved_under_fsdp2_is_an_ordinary_checkpoint(inputs, results):
    expected = results("fsdp2")["scale_free"]["weights"]
    saved = inputs / "fsdp2" / "scale_free-saved"
    assert AutoConfig.from_pretrained(saved).architectures == ["LlamaForSequenceClassification"]
    model = Scorer.from_pretrained(saved).model
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), expected[key], rtol=0, atol=0, msg=key)


def test_adapters_saved_under_fsdp2_score_as_those_of_one_process(inputs, results):
    results("one"), results("fsdp2")
    scores = [
        Scorer.from_pretrained(inputs / mode / "lora-saved")(["the red cat"], [" runs small"])
        for mode in ("one", "fsdp2")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
