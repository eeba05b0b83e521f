"""Measuring stages: small folders made by hand, numbers worked out by hand."""

import pytest
import torch

from shiftrm.core.discrimination import difference_variance
from shiftrm.files import write_jsonl
from shiftrm.models.loading import load_reward_model
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.rewards import score_head
from shiftrm.models.sampling import SamplingConfig, as_samples
from shiftrm.models.scoring import mean_and_spread, score_rows
from shiftrm.pipeline.engine import Stage, StageContext
from shiftrm.pipeline.evaluating import compare
from shiftrm.records import Recorder
from shiftrm.world.gold import gold_reward
from shiftrm.world.language import build_tokenizer

PROMPTS = ["describe the garden :", "review the ocean :"] * 2
GOOD, BAD = " the garden has lovely roses .", " the the the"


def answers(folder, good):
    """Responses to the four prompts, of which those at `good` win."""
    rows = [
        {"prompt": prompt, "responses": [GOOD if n in good else BAD, BAD], "finished": [True] * 2}
        for n, prompt in enumerate(PROMPTS)
    ]
    write_jsonl(folder / "responses.jsonl", rows)


def test_the_best_round_is_chosen_on_one_half_and_measured_on_the_other(tmp_path):
    assert all(gold_reward(p, GOOD, finished=True) > gold_reward(p, BAD, finished=True) + 0.25
               for p in PROMPTS)  # fmt: skip
    answers(tmp_path / "responses", ())
    answers(tmp_path / "a1/responses", (0, 1, 2))  # best on the first half; wins 1 of 2 then
    answers(tmp_path / "a2/responses", (0, 2, 3))
    answers(tmp_path / "dpo/responses", (2,))
    for name, wins in (("a1", "11"), ("a2", "10"), ("dpo", "00")):
        rows = [{"outcome": "win" if w == "1" else "tie"} for w in wins + "00"]
        method = "dpo" if name == "dpo" else "a"
        write_jsonl(tmp_path / name / "judgement" / f"verdicts-{method}-vs-sft.jsonl", rows)
    judge = {"kind": "gold", "model": None, "base_url": None, "template": "helpful"}
    judge |= {"parameters": {}, "tie_margin": 0.25}
    asked = {"concurrency": 1, "price_in": None, "price_out": None, "max_requests": None}
    needs = [f"{n}/{kind}" for n in ("a1", "a2", "dpo") for kind in ("responses", "judgement")]
    stage = Stage(
        "here",
        "",
        {"judge": judge, "judged": 4, "arms": {"a": ["a1", "a2"], "dpo": ["dpo"]}},
        ("responses", *needs),
        {"stage": "compare", "method": "all", "round": 0},
        {**asked, "key_variable": "NONE"},
    )
    recorder = Recorder(stage="compare", method="all", round=0, seed=0)
    (tmp_path / "here").mkdir()
    compare(StageContext(stage, tmp_path, tmp_path / "here", tmp_path / "keep", 0, recorder))
    found = {(r.method, r.round, r.metric): r for r in recorder.records}
    assert found["a", 1, "win_vs_sft"].value == 0.5
    assert found["a", 1, "lose_vs_sft"].value == 0.0
    assert (found["a", 1, "win_vs_dpo"].value, found["a", 1, "tie_vs_dpo"].value) == (0.0, 1.0)
    assert ("sft", 0, "win_vs_a") not in found
    assert {r.n for (_, _, metric), r in found.items() if metric.startswith("win_vs")} == {2}


def test_reward_spread_by_hand():
    rows = [
        {"prompt": "p", "responses": ["a", "bb"], "finished": [True, True]},
        {"prompt": "p", "responses": ["ccc", "d"], "finished": [True, False]},
    ]

    def length(prompts, texts, *, finished):
        assert prompts == ["p"] * 4
        assert finished == [True, True, True, False]
        return [float(len(t)) for t in texts]

    rewards = score_rows(length, rows)
    assert rewards == [[1.0, 2.0], [3.0, 1.0]]
    mean, std = mean_and_spread(rewards)
    assert mean == pytest.approx(7 / 4)
    assert std == pytest.approx((2.75 / 3) ** 0.5)
    assert difference_variance(rewards) == pytest.approx((1 + 4) / 2)


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
    first, again, other = (load_reward_model(tmp_path, seed=s) for s in (1, 1, 2))
    assert torch.equal(score_head(first).weight, score_head(again).weight)
    assert not torch.equal(score_head(first).weight, score_head(other).weight)
    assert score_head(first).weight.abs().max() < 5 / 32
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, first.model.get_parameter(name))
