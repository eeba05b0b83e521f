"""PPO: its equations against hand-derived numbers, its passes against plain ones, its optimum."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from shiftrm.errors import UserError
from shiftrm.models.rewards import token_values
from shiftrm.models.sampling import PAPER_SAMPLING, Sample, SamplingConfig, generate
from shiftrm.models.scoring import Scorer
from shiftrm.policies import ppo, ppo_math, ppo_rows
from shiftrm.policies.configs import ppo_config
from shiftrm.policies.ppo import (
    KLController,
    PPOConfig,
    PPOTrainer,
    Problem,
    clipped_policy_loss,
    clipped_value_loss,
    exact_token_kl,
    gae,
    make_critic,
    policy_logprobs,
    token_rewards,
    whiten,
)
from shiftrm.policies.ppo_math import kl_and_entropy
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.shaping import shape

WORDS = ("go", "on", "a", "b", "c", "d", "e", "f", "g")
V = len(WORDS) + 2


def make_tokenizer(*, pad_is_eos=False):
    ids = {word: i for i, word in enumerate(("<pad>", "<eos>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_llama(seed=0, *, vocab_size=V, scale=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
            )
        )
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # further from uniform
    return model.eval()


def make_gpt2(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V,
                n_embd=32,
                n_layer=1,
                n_head=2,
                n_positions=32,
                bos_token_id=None,
                eos_token_id=1,
                initializer_range=0.3,
            )
        )
    return model.train()  # with dropout on, unless the trainer turns it off


def share_of_a(prompts, responses, *, finished):
    """Share of the word "a"; 0 for a response without words or without an end."""
    words = [response.split() for response in responses]
    return [w.count("a") / len(w) if w and f else 0.0 for w, f in zip(words, finished, strict=True)]


def make_trainer(policy=None, *, reward_fn=share_of_a, tokenizer=None, prompts=("go",), **settings):
    policy = policy or make_llama()
    settings = {"sampling": SamplingConfig(max_new_tokens=6), "steps": 2, **settings}
    settings = {"prompts_per_step": 4, "rollouts_per_prompt": 4, **settings}
    on_step, checkpoints = settings.pop("on_step", None), settings.pop("checkpoints", None)
    tokenizer = tokenizer or make_tokenizer()
    problem = Problem(policy, copy.deepcopy(policy), tokenizer, list(prompts), reward_fn)
    return PPOTrainer(problem, make_critic(policy), PPOConfig(**settings), on_step, checkpoints)


def bools(*rows):
    return torch.tensor(rows, dtype=torch.bool)


# Equations


def test_gae_by_hand():
    # Row 1: three tokens. Row 2: begins late (a longer prompt) and ends early; junk off the mask.
    rewards = torch.tensor([[1.0, 0.0, 2.0], [math.nan, 4.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 1.5], [7.0, 1.0, math.inf]], dtype=torch.float64)
    mask = bools([1, 1, 1], [0, 1, 0])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # delta = [1 + .5*1 - .5, 0 + .5*1.5 - 1, 2 - 1.5] = [1, -.25, .5]
    # A = [1 + .25*(-.125), -.25 + .25*.5, .5] = [.96875, -.125, .5]
    expected = torch.tensor([[0.96875, -0.125, 0.5], [0.0, 3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    expected = torch.tensor([[1.46875, 0.875, 2.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-12)


def test_gae_with_lambda_one_is_reward_to_go():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 1, 6])[:, None]
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row in range(5):
        for t in range(7):
            togo = sum(float(rewards[row, u]) for u in range(t, 7) if mask[row, u])
            assert float(returns[row, t]) == pytest.approx(togo * bool(mask[row, t]), abs=1e-12)


def test_token_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [5.0, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0, 9.0], [9.0, -1.5, -4.0]])
    mask = bools([1, 1, 0], [0, 1, 1])
    rewards = token_rewards(
        torch.tensor([10.0, 20.0]), logprobs, reference, mask, kl_coefficient=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 10.1, 0.0], [0.0, -0.05, 19.7]]))


def test_policy_loss_by_hand():
    # ratios 1.5, 0.5, 1.5, 0.5, 1.1 with e = 0.2; the last place is masked.
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 3.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, 5.0]], dtype=torch.float64)
    old = torch.full_like(ratios, -1.0)
    logprobs = (old + ratios.log()).requires_grad_()
    mask = bools([1, 1, 1, 1, 1, 0])
    loss, outside = clipped_policy_loss(logprobs, old, advantages, mask, clip_ratio=0.2)
    # min terms: 1.2, 0.5, -1.5, -0.8, 2.2
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5, abs=1e-12)
    assert float(outside) == pytest.approx(4 / 5)
    loss.backward()
    # Where the clipped side is the minimum there is no gradient; else -rho A / n.
    expected = torch.tensor([[0.0, -0.5, 1.5, 0.0, -2.2, 0.0]], dtype=torch.float64) / 5
    torch.testing.assert_close(logprobs.grad, expected)


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 1.0, 0.1, 8.0]])
    old, returns = torch.zeros(1, 4), torch.tensor([[2.0, 0.9, 1.0, 0.0]])
    mask = bools([1, 1, 1, 0])
    # clipped values .2, .2, .1 -> squared errors max(1, 3.24), max(.01, .49), .81
    loss = clipped_value_loss(values, old, returns, mask, value_clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (3.24 + 0.49 + 0.81) / 3, abs=1e-6)
    loss = clipped_value_loss(values, old, returns, mask, value_clip=None)
    assert float(loss) == pytest.approx(0.5 * (1.0 + 0.01 + 0.81) / 3, abs=1e-6)


def test_whiten_by_hand():
    white = whiten(
        torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, math.nan]]), bools([1, 1, 0], [1, 1, 0])
    )
    s = math.sqrt(5.0)  # mean 4, population variance (9 + 1 + 1 + 9) / 4
    expected = torch.tensor([[-3 / s, -1 / s, 0.0], [1 / s, 3 / s, 0.0]])
    torch.testing.assert_close(white, expected)
    equal = whiten(torch.full((2, 2), 3.0), bools([1, 1], [1, 1]))
    torch.testing.assert_close(equal, torch.zeros(2, 2))


def test_kl_controller_by_hand():
    controller = KLController(0.05, target=6.0, rate=0.2)
    assert controller.update(9.0) == pytest.approx(0.05 * math.exp(0.1))  # half too much
    assert controller.update(3.0) == pytest.approx(0.05)  # and back
    assert controller.update(60.0) == pytest.approx(0.05 * math.exp(0.2))  # clipped
    assert controller.update(0.0) == pytest.approx(0.05)
    assert KLController(0.05).update(1000.0) == 0.05


def test_kl_controller_counters_a_moving_kl():
    controller = KLController(1.0, target=4.0, rate=0.1, damping=2.0)
    assert controller.update(2.0) == pytest.approx(math.exp(-0.05))  # nothing to compare with yet
    # From e = -1/2 to 0: KL is right but rising, so the penalty grows by exp(2 * 1/2).
    assert controller.update(4.0) == pytest.approx(math.exp(-0.05 + 1.0))
    assert controller.update(4.0) == pytest.approx(math.exp(-0.05 + 1.0))
    assert controller.update(3.0) == pytest.approx(math.exp(-0.05 + 1.0 - 0.025 - 0.5))


# Passes through models


def plain_logprobs(model, sample):
    """Row by row, unpadded, with nothing of the code under test."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].log_softmax(-1)
    P = len(sample.prompt_ids)
    return torch.stack([table[P - 1 + t, w] for t, w in enumerate(sample.response_ids)])


def plain_states(policy, reference, sample):
    """KL to the reference and entropy at each state of one row, plainly and in fp64."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    states = slice(len(sample.prompt_ids) - 1, -1)
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=ids).logits[0, states].double().log_softmax(-1)
            for model in (policy, reference)
        )
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("make_model", [make_llama, make_gpt2])
def test_old_logprobs_are_the_unmodified_policys(monkeypatch, make_model, pad_is_eos):
    seen = {}

    def spy(scores, logprobs, ref_logprobs, mask, *, kl_coefficient):
        seen.update(old=logprobs, reference=ref_logprobs, mask=mask, scores=scores)
        seen["rewards"] = token_rewards(
            scores, logprobs, ref_logprobs, mask, kl_coefficient=kl_coefficient
        )
        return seen["rewards"]

    monkeypatch.setattr(ppo, "token_rewards", spy)
    policy = make_model()
    before = copy.deepcopy(policy).eval()
    trainer = make_trainer(
        policy,
        tokenizer=make_tokenizer(pad_is_eos=pad_is_eos),
        prompts=("go", "go on a b", "on go"),
        sampling=replace(PAPER_SAMPLING, max_new_tokens=8),
        rollouts_per_prompt=8,
        learning_rate=1e-2,
        forward_batch_size=8,
        kl_coefficient=0.0,
    )
    log, rollouts = trainer.step(1)
    assert {len(s.prompt_ids) for s in rollouts.samples} == {1, 2, 4}
    assert 0 < sum(rollouts.finished) < len(rollouts.finished)
    assert log.kl == pytest.approx(0.0, abs=1e-5)
    assert log.length_mean == sum(len(s.response_ids) for s in rollouts.samples) / 32
    entropies = [plain_states(before, before, sample)[1] for sample in rollouts.samples]
    assert log.entropy == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-5)
    assert log.explained_variance == pytest.approx(0.0, abs=1e-6)  # the critic still says 0
    for row, sample in enumerate(rollouts.samples):
        mask = seen["mask"][row]
        expected = plain_logprobs(before, sample)  # its closing EOS included
        torch.testing.assert_close(seen["old"][row][mask], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen["reference"][row][mask], expected, rtol=0, atol=1e-5)
        rewards = seen["rewards"][row][mask]  # the score stands on the last real token
        assert rewards.tolist() == [0.0] * (len(expected) - 1) + [float(seen["scores"][row])]
        if sample.finished:
            assert sample.response_ids[-1] == 1
            assert 1 not in sample.response_ids[:-1]
        else:
            assert 1 not in sample.response_ids
            assert rollouts.rewards[row] == 0.0
    logprobs, mask = policy_logprobs(before, rollouts.samples, batch_size=5)
    torch.testing.assert_close(logprobs, seen["old"], rtol=0, atol=1e-5)
    assert torch.equal(mask, seen["mask"])


def test_scores_are_standardised_clipped_and_penalised_in_this_order(monkeypatch):
    seen = {}

    def spy(scores, *args, **options):
        seen["scores"] = scores
        return token_rewards(scores, *args, **options)

    monkeypatch.setattr(ppo, "token_rewards", spy)
    numbers = [float(i) for i in range(16)]
    trainer = make_trainer(
        reward_fn=lambda p, r, *, finished: numbers,
        reward_mean=3.0,
        reward_std=2.0,
        reward_clip=0.8,
        truncation_penalty=0.5,
    )
    log, rollouts = trainer.step(1)
    expected = [
        max(-0.8, min(0.8, (x - 3) / 2)) - 0.5 * (not finished)
        for x, finished in zip(numbers, rollouts.finished, strict=True)
    ]
    assert seen["scores"].tolist() == pytest.approx(expected)
    assert log.score_mean == pytest.approx(7.5)
    assert log.standardised_mean == pytest.approx(2.25)
    assert log.truncated_share == pytest.approx(1 - sum(rollouts.finished) / 16)
    # Mean squared difference over pairs of one prompt's four: (3*1 + 2*4 + 9) / 6.
    assert log.difference_variance == pytest.approx(20 / 6)


def test_batch_whitening_makes_scores_of_mean_0_and_variance_1():
    numbers = torch.arange(16, dtype=torch.float64) ** 2
    trainer = make_trainer(reward_whitening="batch")
    scores = trainer._scores(numbers, [True] * 16)
    expected = (numbers - numbers.mean()) / numbers.std(correction=0)
    torch.testing.assert_close(scores, expected)


def test_critic_starts_at_zero_with_the_policys_backbone():
    policy = make_llama()
    critic = make_critic(policy)
    ids = torch.tensor([[2, 4, 5, 1]])
    assert token_values(critic, ids, torch.ones_like(ids)).tolist() == [[0.0] * 4]
    for name, parameter in policy.base_model.named_parameters():
        copied = critic.base_model.get_parameter(name)
        assert torch.equal(copied, parameter)
        assert copied.data_ptr() != parameter.data_ptr()


def test_values_are_of_the_state_before_each_token():
    critic = make_critic(make_llama())
    with torch.no_grad():
        critic.score.weight.fill_(0.5)
    samples = [Sample([2], [4, 5, 1], True), Sample([2, 3, 4], [6, 7], False)]
    rows = Rows.pack(samples)
    assert rows.response_mask.tolist() == [[True] * 3 + [False], [False, False, True, True]]
    values = rows.values(critic)
    for row, sample in enumerate(samples):
        whole = sample.prompt_ids + sample.response_ids
        expected = []
        for t in range(len(sample.response_ids)):
            state = torch.tensor([whole[: len(sample.prompt_ids) + t]])
            hidden = critic.base_model(input_ids=state).last_hidden_state[0, -1]
            expected.append(0.5 * hidden.sum().item())
        assert values[row][rows.response_mask[row]].tolist() == pytest.approx(expected, abs=1e-5)


def enumerate_sequences(policy, reference, prompt, *, vocab, eos, length):
    """All responses of up to `length` tokens with log-probabilities: a plain walk of the tree."""
    found = []

    def walk(response, lp, lq):
        if response and (response[-1] == eos or len(response) == length):
            found.append((Sample(prompt, response, response[-1] == eos), lp, lq))
            return
        ids = torch.tensor([prompt + response])
        p = policy(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        q = reference(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        for token in range(vocab):
            walk([*response, token], lp + float(p[token]), lq + float(q[token]))

    with torch.no_grad():
        walk([], 0.0, 0.0)
    return found


def test_kl_estimates_against_the_exact_sequence_kl():
    policy, reference = (make_llama(seed, vocab_size=4, scale=8.0) for seed in (1, 2))
    table = enumerate_sequences(policy, reference, [2], vocab=4, eos=1, length=3)
    assert len(table) == 1 + 3 + 9 * 4  # EOS at once, after one word, or three tokens
    p = torch.tensor([math.exp(lp) for _, lp, _ in table])
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    kl = sum(math.exp(lp) * (lp - lq) for _, lp, lq in table)
    assert kl > 0.3

    samples = [sample for sample, _, _ in table]
    k1 = (policy_logprobs(policy, samples)[0] - policy_logprobs(reference, samples)[0]).sum(1)
    full = exact_token_kl(policy, reference, samples, batch_size=7)
    assert bool((full >= 0).all())
    # The expectations, exactly; then the same from samples.
    assert float((p * k1).sum()) == pytest.approx(kl, abs=1e-5)
    assert float((p * full).sum()) == pytest.approx(kl, abs=1e-5)

    tokenizer = make_tokenizer(pad_is_eos=True)
    drawn = generate(
        policy,
        tokenizer,
        [[2]],
        config=SamplingConfig(max_new_tokens=3),
        num_responses=4000,
        seed=0,
    )
    k1 = (policy_logprobs(policy, drawn)[0] - policy_logprobs(reference, drawn)[0]).sum(1)
    full = exact_token_kl(policy, reference, drawn)
    for estimate in (k1, full):
        assert abs(float(estimate.mean()) - kl) < 4 * float(estimate.std()) / math.sqrt(4000)
    assert float(full.var()) < 0.5 * float(k1.var())


@pytest.mark.parametrize("sampling", [SamplingConfig(8), SamplingConfig(8, 0.8, 0.9, 1.1)])
@pytest.mark.parametrize("at_once", [ppo_rows.LOGITS_AT_ONCE, 3 * V, 1])
def test_logged_kl_and_controller_do_not_depend_on_how_responses_are_drawn(
    monkeypatch, sampling, at_once
):
    """Sharper samples than the policy's own make log pi/pi_ref fall where the KL grows."""
    monkeypatch.setattr(ppo_rows, "LOGITS_AT_ONCE", at_once)
    reference = make_llama(scale=30.0)
    policy = make_llama(scale=15.0)
    settings = {"steps": 1, "prompts_per_step": 16, "rollouts_per_prompt": 8}
    settings |= {"learning_rate": 1e-12, "critic_learning_rate": 1e-12, "kl_target": 0.2}
    config = PPOConfig(sampling=sampling, kl_coefficient=0.05, **settings)
    prompts = ["go", "go on a b", "on go"]
    problem = Problem(copy.deepcopy(policy), reference, make_tokenizer(), prompts, share_of_a)
    trainer = PPOTrainer(problem, make_critic(policy), config)
    log, rollouts = trainer.step(1)
    found = [plain_states(policy, reference, sample) for sample in rollouts.samples]
    assert len({len(sample.response_ids) for sample in rollouts.samples}) > 2
    assert log.kl == pytest.approx(sum(float(kl.sum()) for kl, _ in found) / 128, rel=1e-5)
    assert log.kl > 0.25
    assert log.entropy == pytest.approx(float(torch.cat([h for _, h in found]).mean()), rel=1e-5)
    k1 = [plain_logprobs(policy, s) - plain_logprobs(reference, s) for s in rollouts.samples]
    assert log.kl_sampled == pytest.approx(sum(float(d.sum()) for d in k1) / 128, abs=1e-5)
    assert (log.kl_sampled < 0) == (sampling.temperature != 1)
    assert trainer.controller.coefficient > 0.05


def test_kl_and_entropy_in_slices_and_at_the_edges(monkeypatch):
    torch.manual_seed(0)
    logits, other = torch.randn(6, 5), torch.randn(6, 5)
    logits[0] = torch.tensor([0.0, 0.0, -math.inf, -math.inf, -math.inf])  # 2 of 5 words
    other[0] = torch.tensor([math.log(3.0), 0.0, -math.inf, 0.0, 0.0])
    kl, entropy = kl_and_entropy(logits, other)
    # KL((1/2, 1/2) || (1/2, 1/6)): the reference has 6 sixths, of which the last two are elsewhere.
    assert float(kl[0]) == pytest.approx(0.5 * math.log(3.0), abs=1e-6)
    assert float(entropy[0]) == pytest.approx(math.log(2.0), abs=1e-6)
    monkeypatch.setattr(ppo_math, "_SLICE", 11)
    for whole, part in zip((kl, entropy), kl_and_entropy(logits, other), strict=True):
        assert torch.equal(whole, part)
    low = kl_and_entropy(logits.bfloat16(), other.bfloat16())[0]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, kl, rtol=0.05, atol=0.02)
    logits[4, 0] = math.nan
    assert math.isnan(kl_and_entropy(logits, other)[0][4])


# Training

FAST = {
    "learning_rate": 3e-3,
    "critic_learning_rate": 3e-3,
    "epochs": 2,
    "prompts_per_step": 4,
    "rollouts_per_prompt": 16,
    "minibatch_size": 32,
}


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_reaches_the_known_optimum(pad_is_eos):
    # The best response is "a", any number of times, and an end: its reward is 1.
    trainer = make_trainer(
        tokenizer=make_tokenizer(pad_is_eos=pad_is_eos),
        prompts=("go", "go on"),
        kl_coefficient=0.0,
        steps=40,
        **FAST,
    )
    logs = trainer.train()
    assert logs[0].score_mean < 0.3
    assert sum(log.score_mean for log in logs[-5:]) / 5 >= 0.95
    assert logs[-1].kl > 1.0


def test_kl_regularised_bandit_reaches_the_closed_form():
    # One token: the optimum of E[r] - beta KL is pi_ref exp(r / beta), normalised.
    values = {word: 0.25 * i for i, word in enumerate(WORDS)}
    beta = 0.8

    def reward(prompts, responses, *, finished):
        return [values.get(response.strip(), 0.0) for response in responses]

    policy = make_llama(scale=8.0)
    ids = torch.tensor([[2]])
    with torch.no_grad():
        reference = policy(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    r = torch.tensor([0.0, 0.0, *values.values()], dtype=torch.float64)
    optimum = (reference + r / beta).softmax(-1)
    settings = {**FAST, "learning_rate": 2e-3, "rollouts_per_prompt": 64, "minibatch_size": 256}
    trainer = make_trainer(
        policy,
        reward_fn=reward,
        kl_coefficient=beta,
        steps=60,
        sampling=SamplingConfig(max_new_tokens=1),
        whiten_advantages=False,
        **settings,
    )
    trainer.train()
    with torch.no_grad():
        reached = policy(input_ids=ids).logits[0, -1].double().softmax(-1)
    distance = 0.5 * float((reached - optimum).abs().sum())
    start = 0.5 * float((reference.exp() - optimum).abs().sum())
    assert start > 0.35
    assert distance < 0.05


def test_kl_target_is_held():
    settings = {**FAST, "learning_rate": 1e-3, "kl_coefficient": 0.2, "kl_damping": 1.0}
    logs = make_trainer(kl_target=1.0, kl_rate=0.1, steps=40, **settings).train()
    assert sum(log.kl for log in logs[-20:]) / 20 == pytest.approx(1.0, rel=0.4)
    errors = [max(-1.0, min(1.0, log.kl - 1.0)) for log in logs]
    for t in range(1, 39):  # the rule, from the logs alone
        change = math.log(logs[t + 1].kl_coefficient / logs[t].kl_coefficient)
        assert change == pytest.approx(0.1 * errors[t] + errors[t] - errors[t - 1], abs=1e-9)


def test_two_runs_are_bit_identical_and_leave_the_global_random_state():
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    runs = []
    for seed in (3, 3, 4):
        texts = []
        trainer = make_trainer(
            prompts=("go", "on", "go on"),
            seed=seed,
            minibatch_size=8,
            learning_rate=1e-3,
            on_step=lambda log, rollouts, texts=texts: texts.append(rollouts),
        )
        logs = trainer.train()
        runs.append((logs, texts, [p.tolist() for p in trainer.policy.parameters()]))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_the_reference_is_not_trained_and_dropout_is_off():
    policy = make_gpt2()
    trainer = make_trainer(policy, learning_rate=1e-2)
    reference = [p.clone() for p in trainer.problem.reference.parameters()]
    trainer.train()
    assert not policy.training
    for before, after in zip(reference, trainer.problem.reference.parameters(), strict=True):
        assert torch.equal(before, after)
        assert after.grad is None


def test_every_prompt_is_drawn_equally_often_and_a_prompts_responses_stand_together():
    drawn = []
    trainer = make_trainer(
        prompts=("go", "on", "go on"),
        steps=3,
        on_step=lambda log, rollouts: drawn.extend(rollouts.prompts),
    )
    trainer.train()
    groups = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == sorted(["go", "on", "go on"] * 4)


def test_a_scorer_serves_as_the_reward_function():
    from transformers import AutoModelForSequenceClassification

    tokenizer = make_tokenizer()
    config = copy.deepcopy(make_llama().config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorer = Scorer(AutoModelForSequenceClassification.from_config(config), tokenizer)
    log, rollouts = make_trainer(reward_fn=scorer, tokenizer=tokenizer).step(1)
    expected = scorer(rollouts.prompts, rollouts.responses, finished=rollouts.finished)
    assert rollouts.rewards == expected
    assert log.score_mean == pytest.approx(sum(expected) / 16)


# Settings and bad input


def test_paper_preset():
    config = PPOConfig.preset("paper", steps=7)
    assert config.sampling == PAPER_SAMPLING
    assert (config.learning_rate, config.critic_learning_rate) == (5e-7, 1.5e-6)
    assert (config.kl_coefficient, config.reward_clip, config.rollouts_per_prompt) == (
        0.05,
        0.8,
        16,
    )
    assert config.steps == 7


@pytest.mark.parametrize(
    "shaping", ["log_sigmoid", "par", "clip", "tests.policies.test_ppo:halved"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda **more: PPOConfig.preset("paper", **more),
        lambda **more: ppo_config({"preset": "paper", **more}),
    ],
)
def test_the_presets_clip_is_not_of_shaped_rewards(make, shaping):
    config = make(reward_shaping=shaping)
    assert (config.reward_clip, config.kl_coefficient) == (None, 0.05)
    assert config.sampling == PAPER_SAMPLING
    assert make(reward_shaping="none").reward_clip == 0.8
    assert make(reward_shaping=shaping, reward_clip=None).reward_clip is None
    with pytest.raises(UserError, match=f"reward_clip is 0.5; .*reward_shaping={shaping}"):
        make(reward_shaping=shaping, reward_clip=0.5)


def halved(rewards_B, references_BR):
    return rewards_B / 2


def test_shaped_rewards_keep_their_order_under_the_preset():
    """log sigmoid(r - q) is strictly increasing; clipped, most responses would have one score."""
    rewards = torch.linspace(-6, 6, 16, dtype=torch.float64)
    shaped = shape("log_sigmoid", rewards, torch.zeros(16, 8, dtype=torch.float64))
    trainer = make_trainer()
    trainer.config = PPOConfig.preset("paper", reward_shaping="log_sigmoid")
    scores = trainer._scores(shaped, [True] * 16)
    torch.testing.assert_close(scores, -torch.log1p(torch.exp(-rewards)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOConfig.preset("papr"), r"unknown preset 'papr'; did you mean 'paper'\?"),
        (lambda: PPOConfig.preset("paper", kl_tagret=6), r"'kl_tagret'; did you mean 'kl_target'"),
        (lambda: PPOConfig(steps=0), r"steps is 0; it must be at least 1"),
        (lambda: PPOConfig(save_steps=0), r"save_steps is 0; it must be at least 1"),
        (lambda: PPOConfig(micro_batch_size=0), r"micro_batch_size is 0; .* at least 1, or None"),
        (lambda: PPOConfig(learning_rate=0.0), r"learning_rate is 0.0; it must be above 0"),
        (lambda: PPOConfig(gamma=1.5), r"gamma is 1.5; it must lie in \[0, 1\]"),
        (lambda: PPOConfig(reward_mean=math.nan), r"reward_mean is nan; it must be finite"),
        (lambda: PPOConfig(reward_whitening="row"), r"reward_whitening is 'row'"),
        (lambda: PPOConfig(kl_target=6.0, kl_coefficient=0.0), r"kl_coefficient is 0"),
        (lambda: make_trainer(prompts=()), r"there are no prompts"),
        (lambda: make_trainer(prompts=("go", "")), r"prompt 1 is empty"),
        (lambda: make_trainer(prompts=("go " * 30,)), r"prompt 0 has 30 tokens"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_rewards_that_are_no_numbers_stop_the_run_and_name_the_prompt():
    def reward(prompts, responses, *, finished):
        return [math.nan if prompt == "on" else 0.0 for prompt in prompts]

    trainer = make_trainer(reward_fn=reward, prompts=("go", "on"))
    with pytest.raises(UserError, match="step 1: the reward is nan for the prompt 'on'"):
        trainer.train()
    trainer = make_trainer(reward_fn=lambda p, r, *, finished: [1.0])
    with pytest.raises(UserError, match="gave 1 rewards for 16 responses"):
        trainer.train()


def test_a_diverged_model_stops_the_run():
    trainer = make_trainer(prompts=("go", "on"))
    with torch.no_grad():
        trainer.problem.reference.lm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="step 1: the KL to the reference is nan for the prompt"):
        trainer.train()
    trainer = make_trainer(reward_fn=lambda p, r, *, finished: [1e30] * 16, prompts=("go", "on"))
    before = [p.clone() for p in trainer.policy.parameters()]
    with pytest.raises(UserError, match="step 1: the loss or its gradient is not finite"):
        trainer.train()
    for old, new in zip(before, trainer.policy.parameters(), strict=True):
        assert torch.equal(old, new)
