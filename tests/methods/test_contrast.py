"""Prompt contrast: its pairs by definition, and a reward model that learns to read the prompt."""

import random

import pytest

from shiftrm.data.negatives import negative_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.methods.method import METHODS
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.jobs import TrainReward
from shiftrm.world.build import WorldConfig, label_pairs, write_base_model
from shiftrm.world.language import demonstration

GROUPS = [
    {"prompt": "a", "responses": ["x1", "x2222"], "finished": [True, False]},
    {"prompt": "b", "responses": ["y", "y3333"], "finished": [True, True]},
    {"prompt": " a ", "responses": ["z1"], "finished": [True]},  # the same prompt as the first
    {"prompt": "b", "responses": ["x1", "  "], "finished": [True, True]},
]
OWN = {"a": {"x1", "x2222", "z1"}, "b": {"y", "y3333", "x1"}}
ENDED = {"x2222": False}


@pytest.mark.parametrize("matching", ["random", "length"])
def test_pairs_prefer_a_response_to_the_own_prompt(matching):
    pairs = negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=1)
    assert len(pairs) == 300
    for pair in pairs:
        prompt = pair["prompt"].strip()
        other = {"a": "b", "b": "a"}[prompt]
        assert pair["chosen"] in OWN[prompt]
        assert pair["rejected"] in OWN[other]
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen_finished"] == ENDED.get(pair["chosen"], True)
        assert pair["rejected_finished"] == ENDED.get(pair["rejected"], True)
    assert {pair["chosen"] for pair in pairs} == OWN["a"] | OWN["b"]
    assert pairs == negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=1)
    assert pairs != negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=2)


def test_matching_by_length_takes_the_nearest_length():
    gaps = {
        matching: sum(
            abs(len(p["chosen"]) - len(p["rejected"]))
            for p in negative_pairs(GROUPS, "other_prompt", 300, matching=matching)
        )
        for matching in ("random", "length")
    }
    # Of 16 draws nearly always one has the nearest length: 5 for 5, and 1 or 2 for 1 or 2.
    assert gaps["length"] < 0.4 * gaps["random"]


@pytest.mark.parametrize(
    "groups",
    [
        [{"prompt": "a", "responses": ["x", "y"]}, {"prompt": "a ", "responses": ["z"]}],
        [{"prompt": "a", "responses": ["x", "x"]}, {"prompt": "b", "responses": ["x", " "]}],
    ],
)
def test_one_prompt_or_one_response_cannot_be_contrasted(groups):
    with pytest.raises(UserError, match="at least two prompts"):
        negative_pairs(groups, "other_prompt", 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrast_share": 1.0}, "contrast_share is 1.0; it must lie in"),
        ({"contrast_matching": "lenght"}, "did you mean 'length'"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        METHODS.get("contrast").training().config(output_dir=str(tmp_path), **settings)


def rows(rng, count):
    """Groups of two demonstrations, which keep to the topic of their prompt."""
    prompts = [f"describe the {rng.choice(('garden', 'ocean'))} :" for _ in range(count)]
    return [{"prompt": p, "responses": [demonstration(rng, p, 0.8) for _ in "ab"]} for p in prompts]


def test_a_reward_model_learns_to_read_the_prompt(tmp_path):
    rng = random.Random(0)
    write_base_model(tmp_path / "base", WorldConfig(layers=1))
    made = rows(rng, 600)
    firsts, seconds = ([row["responses"][k] for row in made] for k in (0, 1))
    pairs = label_pairs([row["prompt"] for row in made], firsts, seconds, seed=0)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "groups.jsonl", rows(rng, 600))
    settings = {"max_steps": 120, "learning_rate": 3e-3, "per_device_train_batch_size": 64}
    settings |= {"save_strategy": "no", "lr_scheduler_type": "linear", "logging_steps": 120}
    tests, sight = negative_pairs(rows(rng, 200), "other_prompt", 200, matching="length"), {}
    for method, groups in (("retrained", None), ("contrast", str(tmp_path / "groups.jsonl"))):
        job = TrainReward(
            str(tmp_path / "base"),
            str(tmp_path / "pairs.jsonl"),
            groups=groups,
            adaptation=method,
            settings=settings | ({"contrast_share": 0.5} if groups else {}),
        )
        job.run(tmp_path / method)
        scorer = Scorer.from_pretrained(tmp_path / method)
        prompts = [test["prompt"] for test in tests]
        own, other = (scorer(prompts, [t[side] for t in tests]) for side in ("chosen", "rejected"))
        sight[method] = sum(a > b for a, b in zip(own, other, strict=True)) / len(tests)
    assert sight["contrast"] > 0.75
    assert sight["contrast"] > sight["retrained"] + 0.15
