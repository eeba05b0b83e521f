"""Reward shaping: values by hand, and what PPO does with them."""

import math

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.policies.ppo_command import log_row
from shiftrm.policies.shaping import REFERENCES, SHAPINGS, shape
from tests.policies.test_ppo import make_llama, make_trainer

REWARDS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
OF_REFERENCE = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1.0, -2.0, 0.5]),
        # The 85th percentile of (0, 1) is 0.85.
        ("log_sigmoid", [math.log(sigmoid(x)) for x in (0.15, -2.85, 0.0)]),
        ("par", [(sigmoid(1) + 0.5) / 2, (sigmoid(-2) + sigmoid(-3)) / 2, 0.5]),
        ("clip", [1.0, 0.0, 0.5]),
    ],
)
def test_values_by_hand(name, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(shape(name, REWARDS, OF_REFERENCE), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SHAPINGS.names())
def test_a_higher_reward_is_never_shaped_to_a_lower_one(name):
    rewards = torch.linspace(-5, 5, 41, dtype=torch.float64)
    shaped = shape(name, rewards, OF_REFERENCE[:1].expand(41, 2))
    assert (shaped.diff() >= 0).all()


def minus_reward(rewards_B, references_BR):
    return -rewards_B


def total(rewards_B, references_BR):
    return rewards_B.sum()


def one_step(shaping, **settings):
    settings = {"reward_mean": 0.3, "reward_std": 2.0, "reward_shaping": shaping, **settings}
    trainer = make_trainer(make_llama(scale=10.0), learning_rate=0.01, **settings)
    trainer.controller.coefficient = 0.0
    scores, plain = [], trainer._scores
    trainer._scores = lambda found, finished: scores.append(found) or plain(found, finished)
    log, rollouts = trainer.step(1)
    return log, rollouts, scores[0], trainer.policy.lm_head.weight.detach()


def test_ppo_maximises_the_shaped_reward_and_logs_both():
    plain, plain_rollouts, plain_scores, plain_weight = one_step("none")
    log, rollouts, scores, weight = one_step("log_sigmoid")
    assert rollouts.responses == plain_rollouts.responses, "references have draws of their own"
    assert plain_rollouts.references == [[]] * 16
    assert {len(found) for found in rollouts.references} == {REFERENCES}
    raw = torch.tensor(rollouts.rewards, dtype=torch.float64)
    torch.testing.assert_close(plain_scores, (raw - 0.3) / 2.0)
    references = torch.tensor(rollouts.references, dtype=torch.float64)
    torch.testing.assert_close(scores, shape("log_sigmoid", raw, references))
    assert (log.score_mean, log.standardised_mean) == (plain.score_mean, plain.standardised_mean)
    assert log.shaped_mean == pytest.approx(float(scores.mean()))
    assert log_row(log)["shaped_mean"] == log.shaped_mean
    assert "shaped_mean" not in log_row(plain)
    assert not torch.equal(weight, plain_weight)


def test_references_are_the_references_responses_to_the_same_prompt():
    def length(prompts, responses, *, finished):
        return [
            100.0 * len(p.split()) + len(r.split()) for p, r in zip(prompts, responses, strict=True)
        ]

    _, rollouts, _, _ = one_step("par", prompts=("go", "go on a"), reward_fn=length)
    for prompt, found in zip(rollouts.prompts, rollouts.references, strict=True):
        assert {int(reward // 100) for reward in found} == {len(prompt.split())}


def test_a_function_from_outside():
    _, rollouts, scores, _ = one_step("tests.policies.test_shaping:minus_reward")
    assert scores.tolist() == [-reward for reward in rollouts.rewards]
    with pytest.raises(UserError, match=r"must return a tensor of shape \(16,\)"):
        one_step("tests.policies.test_shaping:total")
    with pytest.raises(UserError, match=r"unknown reward shaping 'log_sigmod'.*log_sigmoid"):
        make_trainer(reward_shaping="log_sigmod")


def test_the_shaped_mean_may_be_recorded():
    from shiftrm.metrics import metric

    assert metric("shaped_mean").label == "Mean shaped reward"


def test_an_interrupted_run_with_shaping_ends_the_same(tmp_path):
    settings = {"reward_shaping": "par", "steps": 3, "save_steps": 1}
    straight = make_trainer(make_llama(), **settings).train()
    make_trainer(make_llama(), **{**settings, "steps": 1}, checkpoints=tmp_path).train()
    assert make_trainer(make_llama(), **settings, checkpoints=tmp_path).train() == straight
