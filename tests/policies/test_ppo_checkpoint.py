"""Checkpoints of PPO: continued is as never stopped, bit for bit; whole or not there."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from shiftrm.errors import UserError
from shiftrm.policies import ppo_runtime
from tests.policies.test_ppo import make_llama, make_trainer

SETTINGS = {
    "prompts": ("go", "on", "go on"),
    "steps": 7,
    "save_steps": 2,
    "minibatch_size": 8,
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "kl_target": 1.0,
    "epochs": 2,
}


class Killed(Exception):
    pass


def run(checkpoints, *, kill_at=None, **settings):
    """Logs (None if killed), weights, and the texts on_step saw, by step."""
    seen = {}

    def on_step(log, rollouts):
        assert log.step not in seen
        seen[log.step] = rollouts.responses
        if log.step == kill_at:
            raise Killed

    trainer = make_trainer(
        make_llama(), on_step=on_step, checkpoints=checkpoints, **{**SETTINGS, **settings}
    )
    try:
        logs = trainer.train()
    except Killed:
        logs = None
    weights = [p.tolist() for m in (trainer.policy, trainer.critic) for p in m.parameters()]
    return logs, weights, seen


@pytest.fixture(scope="module")
def straight():
    return run(None)


@pytest.mark.parametrize(("kill_at", "saved"), [(1, 0), (2, 0), (3, 2), (6, 4), (7, 6)])
def test_resumed_is_as_if_never_stopped(tmp_path, straight, kill_at, saved):
    folder = tmp_path / "state"
    _, _, before = run(folder, kill_at=kill_at)
    assert sorted(before) == list(range(1, kill_at + 1))
    logs, weights, after = run(folder)
    assert (logs, weights) == straight[:2]
    assert sorted(after) == list(range(saved + 1, 8)), "finished steps are not repeated"
    assert {**before, **after} == straight[2]
    assert [p.name for p in folder.iterdir()] == ["checkpoint-7"]
    logs, weights, after = run(folder)
    assert (logs, weights, after) == (*straight[:2], {}), "a finished run has nothing left to do"


def test_saving_changes_nothing_and_more_steps_may_be_asked_for(tmp_path, straight):
    assert run(tmp_path / "each", save_steps=1) == straight
    run(tmp_path / "longer", steps=3)
    logs, weights, after = run(tmp_path / "longer", save_steps=5)
    assert (logs, weights) == straight[:2]
    assert sorted(after) == [4, 5, 6, 7]
    with pytest.raises(UserError, match="the checkpoint is of step 7, but steps is 3"):
        run(tmp_path / "longer", steps=3)


def test_what_a_checkpoint_holds(tmp_path):
    logs, _, _ = run(tmp_path, steps=2)
    folder = tmp_path / "checkpoint-2"
    names = {"state.json", "complete"}
    names |= {f"{m}{o}.safetensors" for m in ("policy", "critic") for o in ("", "_optimizer")}
    assert {p.name for p in folder.iterdir()} == names
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 2
    assert state["logs"] == [asdict(log) for log in logs]
    policy = load_file(folder / "policy.safetensors")
    assert policy.keys() == dict(make_llama().named_parameters()).keys()
    moments = load_file(folder / "policy_optimizer.safetensors")
    assert moments.keys() == {f"{k}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in policy}
    assert float(moments["step.model.norm.weight"]) == 8  # 2 steps of 2 epochs of 2 minibatches


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch, straight):
    run(tmp_path, steps=2)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ppo_runtime, "save_file", full)
        with pytest.raises(UserError, match="no space left for the checkpoint of step 4; free"):
            run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    # Killed while it wrote, and while it removed the older one.
    (tmp_path / ".checkpoint-4.0.tmp").mkdir()
    (tmp_path / ".checkpoint-4.0.tmp" / "policy.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    logs, weights, _ = run(tmp_path)
    assert (logs, weights) == straight[:2]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"other settings or data \(settings.gamma: 1.0 -> 0.9\)"):
        run(tmp_path, gamma=0.9)
    with pytest.raises(UserError, match=r"other settings or data \(prompts: "):
        run(tmp_path, prompts=("go",))
    with pytest.raises(UserError, match=r"other settings or data \(frozen_models: "):
        make_trainer(make_llama(seed=1), checkpoints=tmp_path, **SETTINGS).train()
    trainer = make_trainer(make_llama(), checkpoints=tmp_path, **SETTINGS)
    trainer._updater.trained["critic"].pop("score.weight")
    with pytest.raises(UserError, match="tensors are not those this run trains"):
        trainer.train()
    for file, content in (("policy.safetensors", b"x"), ("state.json", b"{"), ("state.json", b"")):
        (tmp_path / "checkpoint-2" / file).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a PPO checkpoint"):
            run(tmp_path)


def test_the_random_state_and_order_of_prompts_survive_as_plain_data(tmp_path):
    # Five draws of three prompts a step: every checkpoint is in the middle of an order.
    straight = run(None, prompts_per_step=5, steps=3)
    run(tmp_path, prompts_per_step=5, steps=3, kill_at=2, save_steps=1)
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())
    assert len(state["order"]) == 1
    assert run(tmp_path, prompts_per_step=5, steps=3)[:2] == straight[:2]
    assert torch.is_grad_enabled()
