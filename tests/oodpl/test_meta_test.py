"""Meta-test: weighted fine-tuning by hand, PPO on a domain's prompts, and what is measured."""

import copy
import random

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.models.sampling import SamplingConfig
from shiftrm.oodpl.fine_tuning import FineTuningConfig, fine_tune
from shiftrm.oodpl.meta_test import (
    EvaluationConfig,
    evaluate_policy,
    guide_by_ppo,
    guide_by_weights,
)
from shiftrm.policies.ppo_config import PPOConfig
from tests.oodpl.domains import make_domain, make_models

SHORT = EvaluationConfig(sampling=SamplingConfig(max_new_tokens=6))


def likes_runs(prompts, responses, *, finished=None):
    return [float(response.count("runs")) for response in responses]


def log_likelihood(policy, tokenizer, row):
    ids = tokenizer.convert_tokens_to_ids(f"{row['prompt']}{row['response']}".split())
    ids += [2] if row["finished"] else []
    logs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(row["prompt"].split())
    return sum(logs[t - 1, ids[t]] for t in range(start, len(ids)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reward_fn", [None, likes_runs])
def test_updates_by_hand(tokenizer, normalize, reward_fn):
    domain = make_domain("cats")
    config = FineTuningConfig(
        updates=2,
        batch_size=3,
        optimizer="sgd",
        learning_rate=0.1,
        beta=0.7,
        normalize_weights=normalize,
        max_grad_norm=0.0,
        seed=5,
    )
    policy, _ = make_models()
    by_hand = copy.deepcopy(policy)
    logs = fine_tune(policy, tokenizer, domain.support, config, reward_fn=reward_fn)
    order = random.Random("fine-tuning/5").sample(range(8), 8)
    for step in range(2):
        rows = [domain.support[i] for i in order[3 * step : 3 * step + 3]]
        weights = torch.ones(3)
        if reward_fn is not None:
            weights = torch.exp(torch.tensor([r["response"].count("runs") for r in rows]) / 0.7)
            weights = weights / weights.mean() if normalize else weights
        loss = (
            -sum(
                w * log_likelihood(by_hand, tokenizer, r)
                for w, r in zip(weights, rows, strict=True)
            )
            / 3
        )
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p -= 0.1 * (1 - step / 2) * g
        assert logs[step].loss == pytest.approx(loss.item(), rel=1e-5)
        share = float(weights.sum() ** 2 / (weights**2).sum()) / 3
        assert logs[step].effective_sample_share == pytest.approx(share, rel=1e-5)
    for ours, theirs in zip(policy.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_reward_model_turns_the_policy_towards_what_it_likes(policy, tokenizer):
    domain = make_domain("cats", rows=32)
    measure = EvaluationConfig(
        responses_per_prompt=64, sampling=SamplingConfig(max_new_tokens=6), seed=3
    )
    config = FineTuningConfig(updates=40, batch_size=8, learning_rate=5e-3, beta=0.3)
    found = {}
    for name, reward_fn in (("plain", None), ("weighted", likes_runs)):
        trained = copy.deepcopy(policy)
        guide_by_weights(trained, tokenizer, domain, config, reward_fn=reward_fn)
        found[name] = evaluate_policy(
            trained, policy, tokenizer, domain, measure, judge=likes_runs, proxy=likes_runs
        )
    numbers = {name: e.numbers for name, e in found.items()}
    assert numbers["weighted"]["judged"] > 2 * numbers["plain"]["judged"]
    assert numbers["weighted"]["kl"] > 0.1
    assert numbers["weighted"]["proxy"] == numbers["weighted"]["judged"]
    rows = found["weighted"].rows
    judged = [value for row in rows for value in row["judged"]]
    assert numbers["weighted"]["judged"] == pytest.approx(sum(judged) / len(judged))
    assert judged == [float(r.count("runs")) for row in rows for r in row["responses"]]
    assert (found["weighted"].pairs, found["weighted"].responses) == (5, 128)


def test_the_reference_has_no_kl_and_its_own_accuracy(policy, tokenizer):
    domain = make_domain("cats")
    found = evaluate_policy(policy, policy, tokenizer, domain, SHORT)
    assert found.numbers["kl"] == 0.0
    assert "judged" not in found.numbers
    assert 0 <= found.numbers["accuracy_sum"] <= 1
    empty = make_domain("cats")
    object.__setattr__(empty, "eval_pairs", ())
    object.__setattr__(empty, "prompts", ())
    with pytest.raises(UserError, match="domain 'cats': neither eval_pairs"):
        evaluate_policy(policy, policy, tokenizer, empty, SHORT)


def test_ppo_raises_the_reward_on_the_domains_prompts_and_keeps_the_reference(policy, tokenizer):
    domain = make_domain("cats")
    trained = copy.deepcopy(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    config = PPOConfig(
        steps=12,
        prompts_per_step=4,
        rollouts_per_prompt=8,
        minibatch_size=16,
        learning_rate=5e-3,
        critic_learning_rate=5e-3,
        sampling=SamplingConfig(max_new_tokens=5),
    )
    asked, logs = set(), []

    def reward(prompts, responses, *, finished):
        asked.update(prompts)
        return likes_runs(prompts, responses)

    guide_by_ppo(trained, policy, tokenizer, domain, config, reward_fn=reward, on_step=logs.append)
    assert asked == {row["prompt"] for row in domain.support}, "not the evaluation prompts"
    assert len(logs) == 12
    assert logs[-1].score_mean > 2 * logs[0].score_mean
    for p, kept in zip(policy.parameters(), before, strict=True):
        assert torch.equal(p, kept)


def test_bad_input_is_named(policy, tokenizer):
    domain = make_domain("cats")
    for options, message in (
        ({"updates": 0}, "updates is 0; it must be at least 1"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"optimizer": "adam"}, r"optimizer is 'adam'; did you mean 'adamw'\?"),
    ):
        with pytest.raises(UserError, match=message):
            FineTuningConfig(**options)
    with pytest.raises(UserError, match="domain 'cats': 8 fine-tuning rows, but a batch takes 9"):
        guide_by_weights(policy, tokenizer, domain, FineTuningConfig(batch_size=9), reward_fn=None)
    config = FineTuningConfig(updates=1, batch_size=8, normalize_weights=False)

    def huge(prompts, responses, *, finished):
        return [1000.0 if i == 6 else 0.0 for i in range(len(responses))]

    with pytest.raises(UserError, match=r"domain 'cats': fine-tuning row 7: its weight"):
        guide_by_weights(policy, tokenizer, domain, config, reward_fn=huge)

    def tiny(prompts, responses, *, finished):
        return [-1000.0] * len(responses)

    with pytest.raises(
        UserError, match=r"row \d: its weight .* of its whole batch are 0 in float32"
    ):
        guide_by_weights(policy, tokenizer, domain, config, reward_fn=tiny)
