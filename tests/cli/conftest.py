"""Checkpoints and data files, as a user would have them."""

import os
import subprocess

import pytest
from transformers import Trainer

from shiftrm.cli import main
from shiftrm.files import write_jsonl
from shiftrm.trainers import work_folder


@pytest.fixture
def files(tmp_path, policy, tokenizer, pairs, groups):
    """A policy checkpoint and data files."""
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "groups.jsonl", groups)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the red"}, {"prompt": "a dog"}])
    return tmp_path


def refused(shiftrm, arguments, message):
    """One line, status 2, nothing said or written; `arguments` is text or a list."""
    before = sorted(os.listdir())
    status, output = shiftrm(*([arguments] if isinstance(arguments, str) else arguments))
    assert status == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.fixture
def shiftrm(files, capsys, monkeypatch):
    """shiftrm("train --model m", ...) -> (status, output), in the folder of the files."""
    monkeypatch.chdir(files)

    def run(words, *arguments):
        capsys.readouterr()  # what making the files has printed
        status = main([*words.split(), *map(str, arguments)])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def disk(tmp_path):
    """disk("60k"): a file system of this size, where one may be mounted; again: resized."""
    folder = tmp_path / "disk"

    def mount(size):
        again = folder.exists()
        folder.mkdir(exist_ok=True)
        option = f"remount,size={size}" if again else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
        if (
            os.geteuid() != 0
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            folder.rmdir()
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    if folder.exists():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def unpublished(monkeypatch):
    """unpublished(command): interrupt it between its training and the renaming of the result."""

    def interrupted(command):
        def publish(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(work_folder, "publish_folder", publish)
            assert command()[0] == 130

    return interrupted


@pytest.fixture
def stopping(monkeypatch):
    """stopping(step, error): raise while that step is being trained; stopping(None): no more."""
    plain = Trainer.training_step

    def set_stop(step, error=None):
        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step:
                raise error
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return set_stop
