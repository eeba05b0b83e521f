"""Shared prompts in sampling and in PPO's passes on a GPU: equal to rows computed alone, and to a
CPU. FSDP2 on one process.
"""

import copy
import random

import pytest
import torch

from shiftrm.models.sampling import Sample, SamplingConfig, generate
from shiftrm.policies.ppo import make_critic
from shiftrm.policies.ppo_rows import Rows
from tests.gpu.conftest import DEVICE, policy
from tests.trainers.distributed_run import LOGGED, train, write_inputs
from tests.trainers.test_distributed import FSDP2, LAUNCH, launch

V = 500
PROMPTS = [[(7 * i + j) % (V - 10) + 5 for j in range(n)] for i, n in enumerate((180, 3, 64, 97))]


@pytest.mark.parametrize("shape", ["small", "smol"])
def test_prompts_read_once_give_the_same_draws(tokenizer, shape):
    model = policy(shape, vocabulary=V)
    config = SamplingConfig(max_new_tokens=24, temperature=0.8, top_p=0.95)
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    once, each = (
        generate(
            model,
            tokenizer,
            PROMPTS,
            config=config,
            num_responses=5,
            seed=3,
            share_prompts=sharing,
        )
        for sharing in (True, False)
    )
    assert 20 not in seen[:1], "every prompt was read once"
    same = sum(a.response_ids == b.response_ids for a, b in zip(once, each, strict=True))
    # Sums of other shapes round differently on a GPU, and a draw near an edge may then fall out.
    assert same >= (20 if DEVICE == "cpu" else 18), f"{same} of 20"


def test_bf16_draws_are_repeatable(tokenizer):
    model = policy("small", vocabulary=V, dtype=torch.bfloat16)
    config = SamplingConfig(max_new_tokens=24)
    first, second = (
        generate(model, tokenizer, PROMPTS, config=config, num_responses=5, seed=3)
        for _ in range(2)
    )
    assert first == second
    assert len({tuple(s.response_ids) for s in first}) == 20


def rollouts():
    rng = random.Random(0)
    samples = []
    for prompt in PROMPTS:
        for _ in range(6):
            response = [rng.randrange(1, V) for _ in range(rng.randint(1, 40))]
            samples.append(Sample(prompt, response, True))
    return samples


def passes(actor, critic, rows, *, bf16=False):
    """Log-probabilities and values at the response tokens, and the gradient of their sums."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        logprobs, values = rows.logprobs(actor), rows.values(critic)
    mask = rows.response_mask.to(logprobs.device)
    (logprobs[mask].sum() + values[mask].sum()).backward()
    gradient = torch.cat([p.grad.flatten().float() for p in actor.parameters()])
    return [t.detach().float().cpu() for t in (logprobs[mask], values[mask], gradient)]


@pytest.mark.parametrize("bf16", [False, True])
def test_ppo_passes_with_shared_prompts(bf16):
    actor = policy("small", vocabulary=V)
    critic = make_critic(actor)
    torch.nn.init.normal_(critic.score.weight, std=0.02)
    on_cpu = [copy.deepcopy(model).cpu() for model in (actor, critic)]
    expected = passes(*on_cpu, Rows.pack(rollouts()))
    plain = Rows.pack(rollouts(), device=DEVICE)
    shared = plain.sharing()
    assert shared.packed is not None
    assert shared.packed.rows.input_ids.shape[0] == len(PROMPTS)
    limit = 2e-2 if bf16 else 1e-4
    for rows in (plain, shared):
        found = passes(*copy.deepcopy((actor, critic)), rows, bf16=bf16)
        for mine, right in zip(found, expected, strict=True):
            assert (mine - right).norm() <= limit * right.norm()


def test_fsdp2_on_one_process(tmp_path, reward_model, tokenizer, pairs, groups):
    write_inputs(tmp_path, reward_model, tokenizer, pairs, groups)
    one_gpu = LAUNCH.replace("num_processes: 2", "num_processes: 1")
    if DEVICE != "cpu":
        one_gpu = one_gpu.replace("use_cpu: true\n", "")
    found = launch(tmp_path, "fsdp2", FSDP2, "cuda", start=one_gpu)
    for case in ("reward", "scale_free"):
        _, expected = train(tmp_path, tmp_path / "plain", case, processes=1)
        assert found[case]["wrapped"].startswith("FSDP")
        assert found[case]["sharing"]
        for key, weight in expected["weights"].items():
            # Rewards are fp32, whose sums another device rounds differently.
            difference = (found[case]["weights"][key] - weight).abs().max()
            assert difference <= (1e-9 if DEVICE == "cpu" else 1e-5), (case, key, difference)
        for what in LOGGED:
            assert found[case][what] == pytest.approx(expected[what], abs=1e-5), what
