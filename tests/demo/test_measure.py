"""Measuring stages: small folders made by hand, numbers worked out by hand."""

import pytest
import torch

from shiftrm.files import write_jsonl
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.rewards import score_head
from shiftrm.models.sampling import SamplingConfig, as_samples
from shiftrm.models.scoring import score_rows
from shiftrm.pipeline.demo_measure import compare
from shiftrm.pipeline.demo_stages import new_reward_model, reward_spread
from shiftrm.pipeline.engine import Stage, StageContext
from shiftrm.records import Recorder
from shiftrm.world.language import build_tokenizer


def context(root, settings, needs):
    stage = Stage("here", "", settings, needs, {"stage": "compare", "method": "all", "round": 0})
    recorder = Recorder(stage="compare", method="all", round=0, seed=0)
    return StageContext(stage, root, root / "here", root / "keep", 0, recorder)


def responses(path, golds):
    write_jsonl(path / "responses.jsonl", [{"gold": [g, 0.0]} for g in golds])


def test_the_best_round_is_chosen_on_one_half_and_measured_on_the_other(tmp_path):
    responses(tmp_path / "evaluation", [0, 0, 0, 0])
    responses(tmp_path / "a1", [5, 5, -1, 1])  # best on the first half; wins 1 of 2 on the second
    responses(tmp_path / "a2", [1, 1, 9, 9])
    responses(tmp_path / "dpo", [0, 0, -1, 1.1])
    settings = {"evaluations": {"a": ["a1", "a2"], "dpo": ["dpo"]}, "tie_margin": 0.25}
    here = context(tmp_path, settings, ("evaluation", "a1", "a2", "dpo"))
    compare(here)
    found = {(r.method, r.round, r.metric): r.value for r in here.recorder.records}
    assert found[("a", 1, "win_vs_sft")] == 0.5
    assert found[("a", 1, "lose_vs_sft")] == 0.5
    assert (found[("a", 1, "win_vs_dpo")], found[("a", 1, "tie_vs_dpo")]) == (0.0, 1.0)
    assert ("sft", 0, "win_vs_a") not in found
    assert all(r.n == 2 for r in here.recorder.records)


def test_reward_spread_by_hand():
    rows = [
        {"prompt": "p", "responses": ["a", "bb"], "finished": [True, True]},
        {"prompt": "p", "responses": ["ccc", "d"], "finished": [True, False]},
    ]

    def length(prompts, texts, *, finished):
        assert prompts == ["p"] * 4
        assert finished == [True, True, True, False]
        return [float(len(t)) for t in texts]

    assert score_rows(length, rows) == [[1.0, 2.0], [3.0, 1.0]]
    mean, std, variance = reward_spread(length, rows)
    assert mean == pytest.approx(7 / 4)
    assert std == pytest.approx((2.75 / 3) ** 0.5)
    assert variance == pytest.approx((1 + 4) / 2)


def test_responses_become_the_tokens_they_were(policy):
    """The KL of an evaluation is taken on text read back: it must be the sampled sequence."""
    from transformers import LlamaForCausalLM

    from shiftrm.models.rendering import decode_response
    from shiftrm.models.sampling import generate
    from tests.conftest import llama_config

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(len(tokenizer), eos_token_id=tokenizer.eos_token_id))
    prompts = ["describe the garden :", "review the ocean :"]
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    samples = generate(
        model,
        tokenizer,
        encoded,
        config=SamplingConfig(max_new_tokens=12),
        num_responses=20,
        seed=0,
    )
    special = {tokenizer.pad_token_id, tokenizer.unk_token_id}
    rows = [
        {
            "prompt": prompts[i // 20],
            "finished": [s.finished],
            "responses": [decode_response(tokenizer, s.prompt_ids, s.response_ids)],
        }
        for i, s in enumerate(samples)
    ]
    clean = [i for i, s in enumerate(samples) if not special & set(s.response_ids)]
    assert len(clean) > 20
    back = as_samples(tokenizer, [rows[i] for i in clean])
    assert back == [samples[i] for i in clean]


def test_a_new_head_is_seeded_and_small(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    first, again, other = (new_reward_model(tmp_path, seed=s) for s in (1, 1, 2))
    assert torch.equal(score_head(first).weight, score_head(again).weight)
    assert not torch.equal(score_head(first).weight, score_head(other).weight)
    assert score_head(first).weight.abs().max() < 5 / 32
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, first.model.get_parameter(name))
