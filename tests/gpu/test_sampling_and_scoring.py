"""Sampling from a policy and scoring on a GPU."""

import copy

import pytest
import torch

from shiftrm.models.sampling import SamplingConfig, generate
from shiftrm.models.scoring import Scorer
from tests.gpu.conftest import DEVICE, policy, reward_model, word_rows

PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 5, 9, 10, 11, 12, 13]]


def drawn(model, tokenizer, seed=0):
    config = SamplingConfig(max_new_tokens=24)
    return generate(model, tokenizer, PROMPTS, config=config, num_responses=4, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_is_repeatable_and_scored_as_on_the_cpu(tokenizer, dtype):
    model = policy(vocabulary=len(tokenizer), dtype=dtype)
    samples = drawn(model, tokenizer)
    assert [s.prompt_ids for s in samples] == [p for p in PROMPTS for _ in range(4)]
    assert all(1 <= len(s.response_ids) <= 24 for s in samples)
    assert len({tuple(s.response_ids) for s in samples}) > 6, "draws differ"
    again = drawn(model, tokenizer)
    assert [s.response_ids for s in again] == [s.response_ids for s in samples]

    sequences = [[*s.prompt_ids, *s.response_ids] for s in samples]
    on_gpu = reward_model()
    on_cpu = Scorer(copy.deepcopy(on_gpu).cpu(), tokenizer)
    scorer = Scorer(on_gpu, tokenizer)
    rewards = torch.tensor(scorer.score_ids(sequences))
    expected = torch.tensor(on_cpu.score_ids(sequences))
    torch.testing.assert_close(rewards, expected, rtol=0, atol=5e-3 * float(expected.std()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_size_changes_no_reward(tokenizer, dtype):
    scorer = Scorer(reward_model(dtype=dtype), tokenizer)
    rows = word_rows(60, 40, rows=12)
    prompts, responses = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    alone = torch.tensor(scorer(prompts, responses, batch_size=1))
    together = torch.tensor(scorer(prompts, responses, batch_size=64))
    limit = {torch.float32: 5e-3, torch.bfloat16: 0.3}[dtype] * float(alone.std())
    assert (alone - together).abs().max() <= limit


def test_the_device_is_used(tokenizer):
    scorer = Scorer(reward_model("small"), tokenizer)
    assert next(scorer.model.parameters()).device.type == DEVICE
    assert scorer(["the red cat"], [" runs"])[0] == pytest.approx(
        scorer(["the red cat", "a dog"], [" runs", " sits on the fish"])[0], abs=1e-4
    )
