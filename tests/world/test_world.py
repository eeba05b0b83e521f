"""The files of a world, and the labels of pairs."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.world.build import WorldConfig, label_pairs, write_world
from shiftrm.world.gold import gold_reward
from shiftrm.world.language import PROMPTS, demonstration, draw_prompt

SMALL = WorldConfig(seed=3, sft_examples=60, train_prompts=40, eval_prompts=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "world", SMALL)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_rows_of_the_files(world):
    sft = read_jsonl(world / "sft.jsonl")
    assert len(sft) == 60
    for row in sft:
        assert set(row) == {"prompt", "completion", "domain"}
        assert PROMPTS[row["prompt"]].topic == row["domain"]
        assert row["completion"].startswith(" ")
    for name, count in (("prompts_train", 40), ("prompts_eval", 20)):
        rows = read_jsonl(world / f"{name}.jsonl")
        assert len(rows) == count
        for row in rows:
            assert row == {"prompt": row["prompt"], "domain": PROMPTS[row["prompt"]].topic}
    assert sorted(path.name for path in world.iterdir()) == [
        "README.txt",
        "base_model",
        "prompts_eval.jsonl",
        "prompts_train.jsonl",
        "sft.jsonl",
    ]
    assert "repetition" in (world / "README.txt").read_text()


def test_same_seed_same_bytes_and_global_state_untouched(world, tmp_path):
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    again = write_world(tmp_path / "again", SMALL)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert _files(again) == _files(world)


def test_another_seed_changes_everything_drawn_and_sizes_do_not_mix(world, tmp_path):
    first = _files(world)
    other = _files(write_world(tmp_path / "seed", replace(SMALL, seed=4)))
    drawn = ["sft.jsonl", "prompts_train.jsonl", "prompts_eval.jsonl"]
    drawn.append(str(Path("base_model") / "model.safetensors"))
    assert all(first[name] != other[name] for name in drawn)
    fewer = _files(write_world(tmp_path / "fewer", replace(SMALL, sft_examples=30)))
    assert first["sft.jsonl"].startswith(fewer["sft.jsonl"])
    assert all(first[name] == fewer[name] for name in drawn[1:])


def test_the_checkpoint_loads_and_runs(world):
    folder = world / "base_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # By hand: 170 tokens * 64, and per layer 4 * 64^2 + 3 * 64 * 192 + 2 * 64, and the last norm.
    assert sum(p.numel() for p in model.parameters()) == 170 * 64 + 2 * (16_384 + 36_864 + 128) + 64
    assert config.vocab_size == len(tokenizer) == 170
    assert config.max_position_embeddings == tokenizer.model_max_length == 64
    for settings in (config, model.generation_config):
        assert (settings.pad_token_id, settings.eos_token_id) == (0, 1)
        assert settings.bos_token_id is None
    batch = tokenizer(["describe the garden :"] * 3, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**batch)
    assert output.shape[0] == 3
    assert 5 <= output.shape[1] <= 24
    # The random start is close to uniform over the vocabulary.
    entropy = torch.distributions.Categorical(logits=model(**batch).logits).entropy()
    assert entropy.min() > 0.95 * math.log(170)


def test_the_checkpoint_loads_as_a_reward_model(world):
    folder = world / "base_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    batch = AutoTokenizer.from_pretrained(folder)(
        ["describe the garden : lovely roses<eos>", "review the city :<eos>"],
        return_tensors="pt",
        padding=True,
    )
    assert model(**batch).logits.shape == (2, 1)


def test_an_existing_world_is_not_overwritten(world):
    before = _files(world)
    with pytest.raises(UserError, match="already exists"):
        write_world(world, SMALL)
    assert _files(world) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"sft_examples": 0}, "sft_examples is 0"),
        ({"train_prompts": -3}, "train_prompts is -3"),
        ({"eval_prompts": 2.5}, "eval_prompts is 2.5"),
        ({"layers": True}, "layers is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 60}, "hidden_size 60 with 4 heads"),
        ({"heads": 3}, "hidden_size 64 with 3 heads"),
        ({"max_positions": 24}, "max_positions is 24"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        WorldConfig(**changes)
    assert "\n" not in str(error.value)


PROMPT = "describe the garden :"
BETTER, WORSE = " the lovely roses near some soil", " the lovely roses near some waves"


def _share_first(rows: list[dict], first: str) -> float:
    return sum(row["chosen"] == first for row in rows) / len(rows)


@pytest.mark.parametrize("swap", [False, True])
def test_labels_are_bradley_terry_draws_of_the_gold_difference(swap):
    a, b = (WORSE, BETTER) if swap else (BETTER, WORSE)
    # One topical word against one off topic: 1.1 * 0.89 + 0.5 * 1.02 = 1.489.
    p = 1 / (1 + math.exp(1.489 if swap else -1.489))
    n = 4000
    rows = label_pairs([PROMPT] * n, [a] * n, [b] * n, seed=0)
    assert len(rows) == n
    assert abs(_share_first(rows, a) - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert rows[0] == {
        "prompt": PROMPT,
        "chosen": rows[0]["chosen"],
        "rejected": a if rows[0]["chosen"] == b else b,
        "chosen_finished": True,
        "rejected_finished": True,
        "domain": "garden",
    }


def test_labels_see_whether_a_response_ended():
    n = 4000
    pairs = [PROMPT] * n, [BETTER] * n, [WORSE] * n
    p = 1 / (1 + math.exp(-0.489))  # 1.489 - 1
    rows = label_pairs(*pairs, seed=1, finished=[(False, True)] * n)
    assert abs(_share_first(rows, BETTER) - p) < 4 * math.sqrt(p * (1 - p) / n)
    p = 1 / (1 + math.exp(-2.489))
    rows = label_pairs(*pairs, seed=1, finished=[(True, False)] * n)
    assert abs(_share_first(rows, BETTER) - p) < 4 * math.sqrt(p * (1 - p) / n)


def _random_pairs(n: int) -> tuple[list[str], list[str], list[str]]:
    rng = random.Random(7)
    prompts = [draw_prompt(rng) for _ in range(n)]
    first = [demonstration(rng, prompt, rng.random()) for prompt in prompts]
    second = [demonstration(rng, prompt, rng.random()) for prompt in prompts]
    return prompts, first, second


def test_the_noise_of_many_pairs_is_what_the_gold_differences_say():
    prompts, first, second = _random_pairs(4000)
    rows = label_pairs(prompts, first, second, seed=2)
    gaps = [
        gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])
        for row in rows
    ]
    wrong = [1 / (1 + math.exp(abs(gap))) for gap in gaps]  # chance of the worse one winning
    expected = sum(wrong)
    deviation = math.sqrt(sum(p * (1 - p) for p in wrong))
    assert abs(sum(gap < 0 for gap in gaps) - expected) < 4 * deviation
    assert 0.1 < expected / len(rows) < 0.35  # noisy, and far from chance


def test_labels_depend_on_the_seed_only_and_pairs_do_not_shift_each_other():
    prompts, first, second = _random_pairs(200)
    rows = label_pairs(prompts, first, second, seed=5)
    random.seed(99)
    assert rows == label_pairs(prompts, first, second, seed=5)
    assert rows != label_pairs(prompts, first, second, seed=6)
    equal = second.copy()
    equal[10] = first[10]
    fewer = label_pairs(prompts, first, equal, seed=5)
    assert len(prompts) - len(fewer) == 1
    assert fewer == rows[:10] + rows[11:]


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        label_pairs([PROMPT], [BETTER], [], seed=0)
    with pytest.raises(UserError, match="not a prompt of the gold world"):
        label_pairs(["hello"], [BETTER], [WORSE], seed=0)
    assert label_pairs([], [], [], seed=0) == []


def test_huge_gaps_do_not_overflow():
    toxic = " stupid" * 1000
    rows = label_pairs([PROMPT] * 2, [toxic, BETTER], [BETTER, toxic], seed=0)
    assert [row["chosen"] for row in rows] == [BETTER, BETTER]
