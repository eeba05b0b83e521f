"""Advantage estimators against numbers by hand; one from outside the package."""

import math

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.policies import ppo_update
from shiftrm.policies.advantages import ADVANTAGES, leave_one_out, reward_to_go
from shiftrm.policies.ppo import PPOConfig
from tests.policies.test_ppo import bools, make_trainer

OUTSIDE = '''
def above_mean(rewards_BT, values_BT, mask_BT, *, gamma, lam, group_size):
    """The score of a response minus the mean score of its group, on every token."""
    scores_GK = rewards_BT.sum(dim=1).view(-1, group_size)
    above_GK = scores_GK - scores_GK.mean(dim=1, keepdim=True)
    return above_GK.view(-1, 1) * mask_BT, rewards_BT


def one_number(rewards_BT, values_BT, mask_BT, **options):
    return rewards_BT.sum()
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_advantages.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


REWARDS = tensor([1.0, 0.0, 2.0], [math.nan, 4.0, 9.0])
VALUES = tensor([0.5, 1.0, 1.5], [7.0, 1.0, math.inf])
MASK = bools([1, 1, 1], [0, 1, 0])


def test_reward_to_go_by_hand():
    advantages, returns = reward_to_go(REWARDS, VALUES, MASK, gamma=0.5)
    # Row 1: [1 + .5*1, 0 + .5*2, 2]; row 2 has one token.
    assert advantages.tolist() == returns.tolist() == [[1.5, 1.0, 2.0], [0.0, 4.0, 0.0]]


def test_leave_one_out_by_hand():
    rewards = torch.cat([REWARDS, tensor([3.0, 1.0, 5.0], [7.0, 0.0, 0.0])])
    mask = torch.cat([MASK, bools([1, 1, 0], [1, 0, 0])])
    advantages, returns = leave_one_out(
        rewards, torch.zeros_like(rewards), mask, gamma=0.5, group_size=2
    )
    # Returns of the responses 1.5, 4, 3.5, 7; each minus the other's of its pair.
    expected = [[-2.5, -2.5, -2.5], [0.0, 2.5, 0.0], [-3.5, -3.5, 0.0], [3.5, 0.0, 0.0]]
    assert advantages.tolist() == expected
    assert returns.tolist() == [[1.5, 1.0, 2.0], [0.0, 4.0, 0.0], [3.5, 1.0, 0.0], [7.0, 0.0, 0.0]]
    # Of four: 1.5 - (4 + 3.5 + 7) / 3, and so on.
    advantages, _ = leave_one_out(rewards, rewards, mask, gamma=0.5, group_size=4)
    first = [float(row[m][0]) for row, m in zip(advantages, mask, strict=True)]
    assert first == pytest.approx([-10 / 3, 0.0, -2 / 3, 4.0])
    with pytest.raises(UserError, match="rollouts_per_prompt of at least 2"):
        leave_one_out(rewards, rewards, mask, gamma=0.5, group_size=1)


def test_an_advantage_from_outside_the_package_by_its_import_path(outside, monkeypatch):
    plain, seen = ppo_update.clipped_policy_loss, {}

    def spy(logprobs, old, advantages, mask, **options):
        seen["rows"] = [row[m].tolist() for row, m in zip(advantages, mask, strict=True)]
        return plain(logprobs, old, advantages, mask, **options)

    monkeypatch.setattr(ppo_update, "clipped_policy_loss", spy)
    trainer = make_trainer(
        reward_fn=lambda prompts, responses, *, finished: [1.0, 2.0, 6.0, 0.0, 4.0, 8.0],
        advantage="outside_advantages:above_mean",
        prompts_per_step=2,
        rollouts_per_prompt=3,
        kl_coefficient=0.0,
        whiten_advantages=False,
    )
    _, rollouts = trainer.step(1)
    # Group means 3 and 4. Minibatches are shuffled, so rows are compared in sorted order.
    by_hand = [-2.0, -1.0, 3.0, -4.0, 0.0, 4.0]
    lengths = [len(sample.response_ids) for sample in rollouts.samples]
    expected = [[a] * n for a, n in zip(by_hand, lengths, strict=True)]
    assert sorted(seen["rows"]) == sorted(expected)


@pytest.mark.parametrize("name", ["reward_to_go", "leave_one_out"])
def test_registered_advantages_train(name):
    assert ADVANTAGES.names() == ["gae", "reward_to_go", "leave_one_out"]
    logs = make_trainer(advantage=name).train()
    assert all(math.isfinite(log.policy_loss) for log in logs)


def test_wrong_advantages_are_one_line(outside):
    with pytest.raises(UserError, match="unknown advantage 'gea'; did you mean 'gae'"):
        PPOConfig(advantage="gea")
    with pytest.raises(UserError, match="outside_advantages has no 'above'"):
        PPOConfig(advantage="outside_advantages:above")
    trainer = make_trainer(advantage="outside_advantages:one_number")
    with pytest.raises(UserError, match=r"must return \(advantages, returns\), both of shape"):
        trainer.step(1)
