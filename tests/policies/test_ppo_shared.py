"""The roll-outs of a prompt share it: equal to rows computed alone, where the models can."""

import copy
import logging
import random
from dataclasses import asdict

import pytest
import torch

from shiftrm.models.sampling import Sample, SamplingConfig
from shiftrm.policies import ppo, ppo_passes, ppo_rows
from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic
from shiftrm.policies.ppo_before import can_share
from shiftrm.policies.ppo_math import kl_and_entropy
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.ppo_update import activity
from tests.policies.test_ppo import WORDS, make_tokenizer
from tests.policies.test_ppo_passes import V, gradients, make, with_lora

A, B = [2, 3, 4, 5, 6, 7], [9, 8, 7, 6]
SAMPLES = [
    Sample(A, [10, 11, 12, 1], True),
    Sample(A, [10, 11, 13, 14, 15], False),  # begins like the one before
    Sample(B, [1], True),
    Sample(A, [1], True),
    Sample(B, [16, 17], False),
    Sample(B, [16, 17], False),  # drawn twice
    Sample([3, 3, 3, 3, 3], [18, 19, 20], False),  # nobody to share with
]


@pytest.fixture(autouse=True)
def short_prompts_too(monkeypatch):
    monkeypatch.setattr(ppo_rows, "LEAST_SHARED", 1)
    monkeypatch.setattr(ppo_rows, "LEAST_SHARE", 0.0)


def test_packed_rows_by_hand():
    rows = Rows.pack([SAMPLES[0], SAMPLES[2], SAMPLES[1], SAMPLES[4]]).sharing()
    packed = rows.packed
    # The prefix is the longest common one, so it holds what both responses to A begin with.
    assert packed.rows.input_ids.tolist() == [
        [2, 3, 4, 5, 6, 7, 10, 11, 12, 1, 13, 14, 15],
        [9, 8, 7, 6, 1, 16, 17, 0, 0, 0, 0, 0, 0],
    ]
    before = [5, 6, 7, 8, 13 + 3, 5, 6, 7, 10, 11, 13 + 3, 13 + 5]
    assert packed.places.tolist() == before
    assert rows.tokens.tolist() == [10, 11, 12, 1, 1, 10, 11, 13, 14, 15, 16, 17]


def random_samples(rng, *, count=12, vocabulary=V):
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))] for _ in range(3)]
    return [
        Sample(rng.choice(prompts), [rng.randrange(1, 4) for _ in range(rng.randint(1, 6))], False)
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [4096, 14])
def test_every_place_holds_the_token_before_at_its_position(monkeypatch, seed, longest):
    monkeypatch.setattr(ppo_rows, "LONGEST_PACKED", longest)
    samples = random_samples(random.Random(seed))
    rows = Rows.pack(samples).sharing()
    packed = rows.packed
    if packed is None:
        assert longest == 14
        return
    assert packed.rows.input_ids.shape[1] <= max(longest, 15)
    ids, positions = (t.flatten() for t in (packed.rows.input_ids, packed.rows.position_ids))
    places = packed.places.tolist()
    for sample in samples:
        whole = sample.prompt_ids + sample.response_ids
        for token in range(len(sample.prompt_ids) - 1, len(whole) - 1):
            place = places.pop(0)
            assert (int(ids[place]), int(positions[place])) == (whole[token], token)
    assert places == []


def make_pair(name, *, lora=False):
    """A policy, its critic with a head that is not zero, and another policy as reference."""
    policy = make(name)
    if lora:
        policy = with_lora(policy, target_modules=["q_proj", "v_proj"])
    critic = make_critic(policy)
    torch.nn.init.normal_(critic.score.weight, generator=torch.manual_seed(1))
    return policy, critic, make(name, seed=1)


@pytest.mark.parametrize("chunk", [2**24, 7 * V])
@pytest.mark.parametrize(
    ("name", "lora"),
    [("llama", False), ("qwen2", False), ("gemma2", False), ("gpt2", False), ("llama", True)],
)
def test_shared_passes_equal_rows_alone(monkeypatch, name, lora, chunk):
    monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", chunk)
    policy, critic, reference = make_pair(name, lora=lora)
    plain = Rows.pack(SAMPLES)
    shared = plain.sharing()
    assert plain.packed is None
    assert shared.packed.rows.input_ids.shape[0] == 3
    weights = torch.randn(plain.response_mask.shape, generator=torch.manual_seed(0)).double()
    found = []
    for rows in (plain, shared):
        policy.zero_grad()
        logprobs = rows.logprobs(policy)
        (logprobs * weights).sum().backward()
        results = [logprobs, *gradients(policy).values()]
        with torch.no_grad():
            numbers = kl_and_entropy(rows.logits(policy), rows.logits(reference))
        results += [rows.spread(number) for number in numbers]
        with activity(critic):
            critic.zero_grad()
            values = rows.values(critic).masked_fill(~rows.response_mask, 0.0)
            (values * weights).sum().backward()
        found.append([*results, values, *gradients(critic).values()])
    # Norms and rotary tables are in fp32, also in a model of doubles; GPT-2's are not.
    near = 1e-10 if name == "gpt2" else 1e-5
    for ours, theirs in zip(found[1], found[0], strict=True):
        size = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near * size)


def test_prompts_are_shared_where_it_saves_enough(monkeypatch):
    monkeypatch.undo()  # the limits as they are

    def shared(prompt, response, count):
        samples = [Sample([2] * prompt, [3 + k] * response, True) for k in range(count)]
        return Rows.pack(samples).sharing().packed is not None

    assert shared(250, 50, 16)
    assert shared(100, 100, 4)
    assert not shared(50, 250, 4)  # less than three tenths
    assert not shared(30, 2, 8)  # short: as in the gold worlds
    assert not shared(250, 50, 1)


def test_parts_hold_every_row_once_and_keep_to_their_limits(monkeypatch):
    model = make("llama")
    for seed in range(5):
        samples = sorted(random_samples(random.Random(seed), count=30), key=lambda s: s.prompt_ids)
        rows = Rows.pack(samples).sharing()
        ix = random.Random(seed).sample(range(30), 17)
        parts = rows.micro_batches(ix, 5, model)
        assert sorted(i for part in parts for i in part) == sorted(ix)
        assert max(map(len, parts)) <= 5
        alone = Rows.pack(samples)
        assert alone.micro_batches(ix, 5, model) == [ix[:5], ix[5:10], ix[10:15], ix[15:]]
        monkeypatch.setattr(ppo_rows, "TOKENS_ON_CPU", 40)
        for most in (30, 4):
            portions = list(rows.portions(most))
            assert max(map(len, portions)) <= most
            for tensor in ("input_ids", "response_mask"):
                whole = torch.cat([getattr(portion, tensor) for portion in portions])
                assert torch.equal(whole, getattr(rows, tensor))


def test_rows_of_unequal_length_are_split_and_cut_to_the_longest(monkeypatch):
    monkeypatch.setattr(ppo_rows, "FEW_LOGITS", 0)
    seen = []

    def split(lengths, *, parameters, device):
        seen.append(lengths)
        return [[2, 0], [1]] if len(lengths) == 3 else [list(range(len(lengths)))]

    monkeypatch.setattr(ppo_rows, "cheap_split", split)
    policy, critic, _ = make_pair("gpt2")
    prompts = [[2] * n for n in (3, 20, 4, 30, 9)]
    rows = Rows.pack([Sample(p, [5, 6, 7][: len(p) % 3 + 1], False) for p in prompts])
    parts = rows.micro_batches([4, 3, 2, 1, 0], 3, policy)
    assert seen == [[10, 31, 6], [23, 4]]
    assert parts == [[4, 2], [3], [1, 0]]
    widths, whole = [], [rows.logprobs(policy), rows.values(critic)]
    for model in (policy.transformer, critic.transformer):
        model.wte.register_forward_hook(lambda module, args, output: widths.append(args[0].shape))
    for part in parts:
        some = rows.select(part)
        for ours, theirs in zip((some.logprobs(policy), some.values(critic)), whole, strict=True):
            mask = some.response_mask
            torch.testing.assert_close(ours[mask], theirs[part][mask], rtol=0, atol=1e-12)
    assert widths == [(2, 10), (2, 10), (1, 31), (1, 31), (2, 23), (2, 23)]


# Whole runs


def share_of_a(prompts, responses, *, finished):
    return [response.split().count("a") / (1 + len(response.split())) for response in responses]


def trainer_of(*, models=None, checkpoints=None, on_step=None, **settings):
    policy, critic, reference = models or make_pair("gpt2")
    words = random.Random(0)
    prompts = [" ".join(words.choices(WORDS, k=n)) for n in (40, 35, 38)]
    config = PPOConfig(
        **{"steps": 3, "prompts_per_step": 3, "rollouts_per_prompt": 4, **settings},
        minibatch_size=5,
        epochs=2,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        save_steps=1,
        sampling=SamplingConfig(max_new_tokens=5),
    )
    problem = Problem(policy, reference, make_tokenizer(), prompts, share_of_a)
    return PPOTrainer(problem, critic, config, on_step, checkpoints)


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Models whose words are the tokenizer's, so that all samples have text."""
    monkeypatch.setitem(make.__globals__["SIZES"], "vocab_size", len(WORDS) + 2)


@pytest.mark.parametrize("micro", [None, 2])
def test_runs_with_shared_prompts_go_where_plain_runs_go(monkeypatch, small_vocabulary, micro):
    runs = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(ppo, "can_share", lambda *args: False)
        trainer = trainer_of(micro_batch_size=micro)
        logs = trainer.train()
        assert trainer._shares is shares
        weights = [p.detach() for m in (trainer.policy, trainer.critic) for p in m.parameters()]
        runs.append((logs, weights))
    for ours, theirs in zip(runs[0][0], runs[1][0], strict=True):
        assert asdict(ours) == pytest.approx(asdict(theirs), abs=1e-6)
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_resumed_run_shares_as_before(tmp_path, small_vocabulary):
    class Killed(Exception):
        pass

    def kill(log, _):
        if log.step == 2:
            raise Killed

    straight = trainer_of().train()
    with pytest.raises(Killed):
        trainer_of(checkpoints=tmp_path, on_step=kill).train()
    assert trainer_of(checkpoints=tmp_path).train() == straight


def test_adapters_and_recomputed_layers_share_too(small_vocabulary):
    runs = []
    for options in ({}, {"gradient_checkpointing": True, "micro_batch_size": 3}):
        policy, critic, _ = make_pair("llama", lora=True)
        trainer = trainer_of(models=(policy, critic, None), **options)
        runs.append(trainer.train())
        assert trainer._shares
    for ours, theirs in zip(*runs, strict=True):
        assert asdict(ours) == pytest.approx(asdict(theirs), abs=1e-5)


def test_models_that_cannot_share_compute_rows_alone(caplog):
    rows = Rows.pack(SAMPLES)
    config = PPOConfig()
    policy, critic, reference = make_pair("llama")
    assert can_share(policy, reference, critic, rows, config)
    assert not caplog.records
    other = make("gpt2")
    with caplog.at_level(logging.WARNING):
        assert not can_share(policy, other, critic, rows, config)
        deaf = copy.deepcopy(critic)
        plain = deaf.model.forward
        deaf.model.forward = lambda ids, position_ids=None, **rest: plain(ids, **rest)
        assert not can_share(policy, reference, deaf, rows, config)
    first, second = (record.getMessage() for record in caplog.records)
    assert "the roll-outs of a prompt cannot share it: policy, reference and critic are" in first
    assert "cannot share it: its " in second
