"""Meta-test by RLOO: what it learns, what it leaves alone, and its rewards and KL by hand."""

import copy

import pytest
import torch

from shiftrm.data.domains import Domain
from shiftrm.errors import UserError
from shiftrm.models.sampling import SamplingConfig
from shiftrm.oodpl.meta_test import support_prompts
from shiftrm.oodpl.rloo import RLOOSettings, guide_by_rloo
from tests.oodpl.domains import make_domain

SMALL = {
    "steps": 10,
    "prompts_per_step": 4,  # of the 3 that the domain has
    "rollouts_per_prompt": 8,
    "minibatch_size": 16,
    "learning_rate": 5e-3,
    "sampling": SamplingConfig(max_new_tokens=5),
}


class LikesRuns:
    """Rewards of its own scale; remembers what it was asked."""

    def __init__(self, scale=100.0):
        self.scale = scale
        self.asked, self.batches = set(), []

    def __call__(self, prompts, responses, *, finished):
        self.asked.update(prompts)
        rewards = [7.0 + self.scale * response.count("runs") for response in responses]
        self.batches.append(rewards)
        return rewards


def guided(policy, tokenizer, *, scale=100.0, **changes):
    trained, reward, logs = copy.deepcopy(policy), LikesRuns(scale), []
    guide_by_rloo(
        trained,
        policy,
        tokenizer,
        make_domain("cats"),
        RLOOSettings(**{**SMALL, **changes}),
        reward_fn=reward,
        on_step=logs.append,
    )
    return trained, reward, logs


def test_rloo_raises_the_reward_on_the_domains_prompts_and_keeps_the_reference(policy, tokenizer):
    before = [p.detach().clone() for p in policy.parameters()]
    trained, reward, logs = guided(policy, tokenizer)
    assert reward.asked == set(support_prompts(make_domain("cats"))), "not the evaluation prompts"
    assert [log.step for log in logs] == list(range(1, 11))
    assert logs[-1].score_mean - 7.0 > 2 * (logs[0].score_mean - 7.0)
    # Of the reference's responses there is one batch; then one a step, as they were given.
    assert len(reward.batches[-1]) == 32
    for log, batch in zip(logs, reward.batches[-10:], strict=True):
        assert log.score_mean == pytest.approx(sum(batch) / len(batch))
    assert logs[0].kl == pytest.approx(0.0, abs=1e-6)
    assert logs[-1].kl > 0.5
    for p, kept in zip(policy.parameters(), before, strict=True):
        assert torch.equal(p, kept)
    for model in (policy, trained):  # as before TRL had them
        assert "forward" not in model.__dict__
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_is_the_same_policy_and_the_rewards_scale_does_not_matter(policy, tokenizer):
    first, again, scaled, other = (
        torch.cat(
            [p.detach().flatten() for p in guided(policy, tokenizer, steps=1, **c)[0].parameters()]
        )
        for c in ({}, {}, {"scale": 0.5}, {"seed": 1})
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(scaled, first, rtol=0, atol=2e-4)  # of steps of 5e-3
    assert float((other - first).abs().max()) > 2e-3


def test_a_stronger_penalty_keeps_the_policy_nearer(policy, tokenizer):
    _, _, free = guided(policy, tokenizer, steps=1, kl_coefficient=0.0)
    _, _, loose = guided(policy, tokenizer, steps=10, kl_coefficient=0.01)
    _, _, tight = guided(policy, tokenizer, steps=10, kl_coefficient=2.0)
    assert free[-1].kl is None, "no reference is asked"
    assert tight[-1].kl < 0.5 * loose[-1].kl


def test_rewards_that_are_not_finite_and_long_prompts_stop_with_the_domain(policy, tokenizer):
    def broken(prompts, responses, *, finished):
        return [float("nan")] * len(responses)

    arguments = (copy.deepcopy(policy), policy, tokenizer)
    config = RLOOSettings(**SMALL, reward_mean=0.0, reward_std=1.0)
    with pytest.raises(UserError, match="domain 'cats': the reward is nan for the prompt"):
        guide_by_rloo(*arguments, make_domain("cats"), config, reward_fn=broken)
    long = Domain("cats", support=({"prompt": "the " * 500, "response": "cat"},))
    with pytest.raises(UserError, match="domain 'cats': prompt 0 has 500 tokens"):
        guide_by_rloo(*arguments, long, config, reward_fn=LikesRuns())
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts_per_prompt": 1}, "rollouts_per_prompt is 1; it must be at least 2"),
        ({"minibatch_size": 5}, "minibatch_size is 5; it must divide the 32 sequences"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0; it must not be negative"),
        ({"reward_std": 0.0}, "reward_std is 0.0; it must be above 0, or None"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be finite"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        RLOOSettings(**{**SMALL, **options})
