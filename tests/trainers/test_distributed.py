"""Two processes, under DDP and under FSDP2, give what one gives on the same global batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from shiftrm.models.scoring import Scorer
from tests.trainers.distributed_run import CASES, LOGGED, run, write_inputs

pytestmark = pytest.mark.slow

# What a user gives `accelerate launch --config_file`; on GPUs without the line use_cpu. (For DDP
# on CPUs it is MULTI_GPU, too: with MULTI_CPU and no MPI, accelerate starts one process.)
LAUNCH = """
compute_environment: LOCAL_MACHINE
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: "no"
"""
DDP = "distributed_type: MULTI_GPU"
FSDP2 = """distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""

NAMES = [*CASES, "resumed"]
MODES = [(mode, name) for mode in ("ddp", "fsdp2") for name in NAMES]
MODES.remove(("fsdp2", "encoder"))  # under FSDP2 by training arguments
BY_DIFFERENCES = ("second_order", "midpoint")  # under FSDP2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def inputs(folder, reward_model, tokenizer, pairs, groups):
    if not (folder / "data.pt").exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes["initializer_range"] = 0.3
        config = BertConfig(num_attention_heads=2, vocab_size=32, num_labels=1, **sizes)
        BertForSequenceClassification(config).save_pretrained(folder / "encoder")
        write_inputs(folder, reward_model, tokenizer, pairs, groups)
    return folder


def launch(folder, mode, configuration, *arguments, start=LAUNCH):
    """Every case on the processes of `start`; what the first of them found."""
    output = folder / mode
    output.mkdir()
    file = folder / f"{mode}.yaml"
    file.write_text(start + configuration)
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    script = str(Path(__file__).with_name("distributed_run.py"))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, script, str(folder), str(output), *arguments],
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
        assert finished.get(mode) != "failed", f"the run of {mode} failed in an earlier test"
        if mode not in finished:
            finished[mode] = "failed"
            if mode == "one":
                finished[mode] = run(inputs, inputs / mode, processes=1)
            else:
                configuration = {"ddp": DDP, "fsdp2": FSDP2}[mode]
                finished[mode] = launch(inputs, mode, configuration)
        return finished[mode]

    return of


@pytest.mark.parametrize(("mode", "name"), MODES)
def test_two_processes_train_what_one_does(results, name, mode):
    one, two = results("one")[name], results(mode)[name]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["weights"].keys() == one["weights"].keys()
    rough = mode == "fsdp2" and name in BY_DIFFERENCES
    for key, weight in one["weights"].items():
        tolerance = 2e-3 if rough else 1e-9
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=tolerance, msg=key)
    for what in LOGGED:
        assert two[what] == pytest.approx(one[what], rel=1e-2 if rough else 0, abs=1e-6), what
    assert max(one["grad_norm"]) > 0.2, "clipping was on"
    assert one["sharing"] == two["sharing"] == (name != "encoder"), "of prefixes"


def test_influence_under_fsdp2_is_that_of_one_process(results):
    one, two = results("one")["scale_free"], results("fsdp2")["scale_free"]
    assert two["meta_influence"] == pytest.approx(one["meta_influence"], rel=1e-5)


@pytest.mark.parametrize("name", [name for mode, name in MODES if mode == "fsdp2"])
def test_parameters_are_sharded_under_fsdp2(results, name):
    left = results("fsdp2")[name]
    assert left["wrapped"].startswith("FSDP")
    assert len(left["sharded"]) == {"resumed": 2, "uneven": 4}.get(name, 5), "after every step"
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


@pytest.mark.parametrize("name", ["arguments", "arguments_resumed", "arguments_encoder"])
def test_fsdp2_by_training_arguments_is_the_same(results, name):
    one = results("one")["encoder" if name == "arguments_encoder" else "adaptive"]
    two = results("ddp")[name]
    assert all(all_dtensors for all_dtensors, _ in two["sharded"])
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_mixed_precision_is_near_full_precision(results, mode):
    full, half = results("one")["scale_free"], results(mode)["bf16"]
    assert half["sharing"]
    assert {w.dtype for w in half["weights"].values()} == {torch.float32}
    assert half["meta_objective"] == pytest.approx(full["meta_objective"], abs=1e-3)
    assert half["meta_influence"] == pytest.approx(
        full["meta_influence"], rel=0.1 if mode == "fsdp2" else 1
    )
    assert half["eval_loss"] == pytest.approx(full["eval_loss"], abs=5e-3)


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
