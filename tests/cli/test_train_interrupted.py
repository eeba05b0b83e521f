"""Training interrupted, killed, without space or with a loss of nan: what stays, what goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.trainers import work_folder
from tests.conftest import move_weights

SETTINGS = [
    *("preset=adaptive", "meta_learning_rate=0.1", "learning_rate=1e-2", "warmup_steps=2"),
    *("per_device_train_batch_size=2", "max_steps=6", "save_steps=2", "logging_steps=1"),
]
TRAIN = ["train", "--model", "policy", "--pairs", "pairs.jsonl", "--groups", "groups.jsonl"]
TRAIN += ["--eval-pairs", "pairs.jsonl"]
WORK = Path(".out.work")


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_interrupted_and_continued_is_as_if_never_interrupted(shiftrm, stopping):
    assert shiftrm(*TRAIN, "--output", "straight", *SETTINGS)[0] == 0
    stopping(4, KeyboardInterrupt())
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert status == 130
    assert "give the same command again to continue from the last checkpoint" in output.err
    assert not Path("out").exists()
    (WORK / "checkpoint-4").mkdir()  # half-written: not marked as complete
    (WORK / "checkpoint-4" / "model.safetensors").write_text("cut of")
    stopping(None)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert status == 0
    [said] = [line for line in output.out.splitlines() if line.startswith("Continuing from ")]
    assert "checkpoint-2" in said
    assert weights("out") == weights("straight")
    last = [line for line in output.out.splitlines() if line.startswith(("Trained", "Accuracy"))]
    shutil.rmtree("straight")
    _, straight = shiftrm(*TRAIN, "--output", "straight", *SETTINGS)
    assert "\n".join(last) in straight.out, "the mean loss is over all steps"
    assert not WORK.exists()


@pytest.mark.parametrize("steps", [4, 6])  # an epoch has 6
def test_interrupted_after_training_makes_no_further_step(shiftrm, unpublished, steps):
    settings = [*SETTINGS, f"max_steps={steps}", "deploy=adapted"]
    assert shiftrm(*TRAIN, "--output", "straight", *settings)[0] == 0
    unpublished(lambda: shiftrm(*TRAIN, "--output", "out", *settings))
    status, output = shiftrm(*TRAIN, "--output", "out", *settings)
    assert (status, f"checkpoint-{steps}" in output.out) == (0, True), output.err
    assert f"for {steps} steps" in output.out
    assert weights("out") == weights("straight")
    logs = [read_jsonl(f"{folder}/training_log.jsonl") for folder in ("out", "straight")]
    found, expected = ([(r["step"], r.get("loss")) for r in log] for log in logs)
    assert found == expected
    assert logs[0][-1]["deploy_objective_after"] == logs[1][-1]["deploy_objective_after"]


def test_before_the_first_checkpoint_nothing_stays(shiftrm, stopping):
    before = sorted(os.listdir())
    stopping(2, KeyboardInterrupt())
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS)[0] == 130
    assert sorted(os.listdir()) == before


def test_another_run_in_the_work_folder_is_refused(shiftrm, stopping, files):
    stopping(4, KeyboardInterrupt())
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS)[0] == 130
    stopping(None)
    kept = sorted(WORK.rglob("*"))
    for change, words in (
        (["learning_rate=2e-2"], "(settings.learning_rate: 0.01 -> 0.02)"),
        (["--weight-decay", "0.1"], "(settings.weight_decay: None -> 0.1)"),
        (["--model", "./policy"], "(model: policy -> ./policy)"),
    ):
        status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, *change)
        assert status == 2
        assert f"holds an unfinished training with other settings or data {words}" in output.err
        assert output.err.count("\n") == 1
    write_jsonl("groups.jsonl", read_jsonl("groups.jsonl")[1:])
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert (status, "(data.groups.sha256: " in output.err) == (2, True)
    assert sorted(WORK.rglob("*")) == kept


def test_a_base_model_that_changed_in_place_is_refused(shiftrm, stopping):
    """A LoRA checkpoint is worth nothing on another base; a full one would hide the change."""
    lora = ["use_peft=true", "lora_r=2"]
    stopping(4, KeyboardInterrupt())
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS, *lora)[0] == 130
    stopping(None)
    template = Path("policy/chat_template.jinja")
    before, written = weights("policy"), template.read_text()
    move_weights("policy")
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, *lora)
    assert (status, "other settings or data (model_files: " in output.err) == (2, True), output.err
    Path("policy/model.safetensors").write_bytes(before)
    template.write_text(written + " ")
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, *lora)
    assert (status, "other settings or data (model_files: " in output.err) == (2, True), output.err
    template.write_text(written)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, *lora)
    assert (status, "Continuing from" in output.out) == (0, True), output.err


def test_the_same_settings_in_other_words_continue(shiftrm, stopping):
    stopping(4, KeyboardInterrupt())
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS)[0] == 130
    stopping(None)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, "--learning-rate", "0.01")
    assert (status, "Continuing from" in output.out) == (0, True)


def test_the_same_batch_divided_otherwise_continues(shiftrm, stopping):
    """As after running out of memory; the mean loss of a step is rounded otherwise."""
    divided = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    assert shiftrm(*TRAIN, "--output", "straight", *SETTINGS)[0] == 0
    stopping(4, KeyboardInterrupt())
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS)[0] == 130
    stopping(None)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS, *divided)
    assert (status, "Continuing from" in output.out) == (0, True), output.err
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("out", "straight"))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-5), name


def test_a_folder_of_ones_own_is_left_alone(shiftrm):
    WORK.mkdir()
    (WORK / "thesis.tex").write_text("precious")
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert (status, "is not the work folder of a training" in output.err) == (2, True)
    assert [p.name for p in WORK.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite(shiftrm, stopping):
    stopping(5, UserError("step 5: the loss is nan (rows 3 and 4)"))
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert status == 2
    assert "step 5: the loss is nan (rows 3 and 4); the last good checkpoint is" in output.err
    assert output.err.count("\n") == 1
    assert f"to start with other settings, delete {WORK.resolve()}" in output.err
    checkpoint = Path(output.err.split("checkpoint is ")[1].split(";")[0])
    assert checkpoint.name == "checkpoint-4"
    stopping(None)
    calmer = ["--model", checkpoint, "--output", "calmer", "learning_rate=1e-4", "max_steps=1"]
    status, output = shiftrm("train --pairs pairs.jsonl", *calmer)
    assert status == 0, "training goes on from there with other settings"


def test_a_learning_rate_that_is_far_too_high(shiftrm):
    """The real thing: the first step makes weights whose loss is not finite."""
    high = ["learning_rate=1e38", "optim=sgd", "max_grad_norm=0", "warmup_steps=0", "save_steps=1"]
    status, output = shiftrm(
        "train --model policy --pairs pairs.jsonl --output out lr_scheduler_type=constant "
        "max_steps=4",
        *high,
    )
    assert status == 2
    assert "step 2: the gradient is not finite" in output.err
    assert "Last good checkpoint: none was saved" in output.err, "checkpoint-1 has these weights"
    assert output.err.count("\n") == 1
    assert (WORK / "checkpoint-1" / "model.safetensors").exists()
    assert not Path("out").exists()


def test_weights_alone_are_kept_but_not_continued_from(shiftrm, stopping):
    options = ["--output", "out", *SETTINGS, "save_only_model=true"]
    stopping(5, UserError("nan"))
    status, output = shiftrm(*TRAIN, *options)
    assert (status, "the last good checkpoint is" in output.err) == (2, True)
    assert (WORK / "checkpoint-4" / "model.safetensors").exists()
    stopping(None)
    status, output = shiftrm(*TRAIN, *options)
    assert (status, "Continuing" in output.out) == (0, False)


def test_no_space_for_a_checkpoint(shiftrm, monkeypatch):
    """The third save fails half-way; the second is kept, and continued from."""
    plain = Trainer._save_optimizer_and_scheduler

    def fails(self, folder):
        if self.state.global_step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        plain(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fails)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert status == 2
    assert "no space left on the disk; free some, then give the same command again" in output.err
    assert output.err.count("\n") == 1
    assert sorted(p.name for p in WORK.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", plain)
    status, output = shiftrm(*TRAIN, "--output", "out", *SETTINGS)
    assert (status, "checkpoint-4" in output.out) == (0, True)


@pytest.fixture
def small_disk(files):
    """A file system of 300 kB, where one may be mounted."""
    (files / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(files / "disk")]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield files / "disk"
    subprocess.run(["umount", str(files / "disk")], check=True)


@pytest.mark.parametrize(
    ("save", "taken"),
    [
        ("steps", 150_000),  # the weights fit, Adam's moments of the first checkpoint do not
        ("no", 250_000),  # the weights themselves do not
    ],
)
def test_a_really_full_disk(shiftrm, small_disk, save, taken):
    (small_disk / "big").write_bytes(bytes(taken))
    options = ["--output", "disk/out", *SETTINGS, f"save_strategy={save}"]
    status, output = shiftrm(*TRAIN, *options)
    assert status == 2
    assert "no space left on the disk" in output.err
    assert output.err.count("\n") == 1
    assert os.listdir(small_disk) == ["big"]


def start(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(cwd / "said", "w") as said, open(cwd / "errors", "w") as errors:
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.Popen(command, stdout=said, stderr=errors, env=environment, cwd=cwd)


@pytest.mark.slow
def test_killed_in_a_real_process_and_continued(files, shiftrm):
    settings = [*SETTINGS, "max_steps=20"]
    process = start("shiftrm", *TRAIN, "--output", "out", *settings, cwd=files)
    deadline = time.monotonic() + 120
    while not list(WORK.glob("checkpoint-*/complete")):
        assert process.poll() is None, (files / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("out").exists()
    for output in ("out", "straight"):
        status, said = shiftrm(*TRAIN, "--output", output, *settings)
        assert status == 0
        assert ("Continuing from" in said.out) == (output == "out")
    assert weights("out") == weights("straight")


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(files):
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "-m", "shiftrm"]
    process = start(*launch, *TRAIN, "--output", "out", *SETTINGS, cwd=files)
    assert process.wait(timeout=240) == 0, (files / "errors").read_text()[-3000:]
    said = (files / "said").read_text()
    assert said.count("Trained on 12 pairs") == 1
    assert said.count("before training:") == 1
    assert "processes: 2" in (files / "out" / "README.md").read_text()
    assert not (files / WORK).exists()


def test_only_the_main_process_says_what_is_wrong(shiftrm, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    status, output = shiftrm("train", "--model", "policy")
    assert (status, output.err) == (2, "")


def test_words_for_a_full_disk():
    for error in (
        OSError(errno.ENOSPC, "x"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ):
        assert work_folder.is_disk_full(error)
    assert not work_folder.is_disk_full(OSError(errno.ENOENT, "x"))
    assert not work_folder.is_disk_full(RuntimeError("shapes do not fit"))


def test_the_work_folder_of_a_command_that_was_killed_at_once(shiftrm):
    WORK.mkdir()
    (WORK / ".run.json.0123.tmp").write_text(json.dumps({}))
    assert shiftrm(*TRAIN, "--output", "out", *SETTINGS)[0] == 0
    assert not WORK.exists()


def test_out_of_memory_names_the_settings_and_continues_with_them(shiftrm, stopping):
    plain = [*("train", "--model", "policy", "--pairs", "pairs.jsonl"), *SETTINGS[2:]]
    assert shiftrm(*plain, "--output", "straight")[0] == 0
    stopping(4, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines"))
    status, output = shiftrm(*plain, "--output", "out")
    assert (status, output.err.count("\n")) == (2, 1)
    lower = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    assert f"give {' '.join(lower)}, which trains the same" in output.err
    stopping(None)
    status, output = shiftrm(*plain, "--output", "out", *lower)
    assert (status, "Continuing from" in output.out) == (0, True), output.err
    found, expected = (load_file(f"{name}/model.safetensors") for name in ("out", "straight"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
