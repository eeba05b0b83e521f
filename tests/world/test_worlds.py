"""What holds of every gold world, their names, and that the first one stays as it is."""

import hashlib
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.world import gold, language
from shiftrm.world.build import WorldConfig, label_pairs, write_world
from shiftrm.world.world import (
    DEFAULT_WORLD,
    WORLDS,
    GoldReward,
    domain_factors,
    gold_name,
    gold_world,
)

SMALL = WorldConfig(seed=0, sft_examples=60, train_prompts=40, eval_prompts=20)

FIRST_WORLD = {
    "README.txt": "718566624c60e15812bac64005e048d8a549b053f735e53626c61c76eb36c0db",
    "base_model/tokenizer.json": "b50078a3cdf229c253922458e0dcdda402449b1a8a3888535e3168f190bf23cf",
    "prompts_eval.jsonl": "bb755ce974dea8755581f1c5ff45023a44113dd29830426c1eac08740b176fa4",
    "prompts_train.jsonl": "2ac055ce20c2eb4b3476c1610cb7062f23a0e4e4a906eae164b6cecfb803fedb",
    "sft.jsonl": "22743995c856398417ae2f7cb9b0760fed3a95a94c482029b1975f85b94e9950",
}
"""Hashes of the files of `SMALL` as they were before there was a second world. The weights and the
configuration of the base model are left out, since they depend on the versions of libraries."""


@pytest.fixture(params=WORLDS.names())
def world(request):
    return WORLDS.get(request.param)


def demonstrations(world, count, seed=0):
    rng = random.Random(seed)
    prompts = [world.draw_prompt(rng) for _ in range(count)]
    return [(prompt, world.demonstration(rng, prompt, rng.random())) for prompt in prompts]


# -- every world ---------------------------------------------------------------------------------


def test_prompts_and_demonstrations_are_words_of_the_language_and_fit(world):
    assert len(world.words) == len(set(world.words))
    assert {prompt for prompt, _ in demonstrations(world, 2000)} == set(world.prompts)
    assert max(len(prompt.split()) for prompt in world.prompts) == world.prompt_tokens
    lengths = []
    for prompt, response in demonstrations(world, 1000):
        assert response == " " + " ".join(response.split())
        assert {*prompt.split(), *response.split()} <= set(world.words)
        lengths.append(len(response.split()))
    assert 3 <= min(lengths) <= max(lengths) < world.max_response_tokens
    assert 9.5 < sum(lengths) / len(lengths) < 10.5


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_quality_outside_its_range_is_refused(world, quality):
    with pytest.raises(ValueError, match="quality"):
        world.demonstration(random.Random(0), next(iter(world.prompts)), quality)


def test_better_demonstrations_earn_more(world):
    rng = random.Random(2)
    means = []
    for quality in (0.0, 0.5, 1.0):
        prompts = [world.draw_prompt(rng) for _ in range(1000)]
        golds = [world.gold_reward(p, world.demonstration(rng, p, quality)) for p in prompts]
        means.append(sum(golds) / len(golds))
    assert means[0] + 1.0 < means[1] < means[2] - 1.0


def test_gold_is_the_sum_of_weights_times_counts(world):
    for prompt, response in demonstrations(world, 200):
        for finished in (True, False):
            counts = world.tally(prompt, response, finished=finished)
            terms = world.explain(prompt, response, finished=finished)
            by_name = world.weights(prompt)
            expected = {f.name: by_name[f.name] * f.measure(counts) for f in world.features}
            assert terms == pytest.approx(expected)
            reward = world.gold_reward(prompt, response, finished=finished)
            assert reward == pytest.approx(sum(terms.values()))


def test_weights_vary_by_domain_and_modestly(world):
    domains = {domain for _, domain in world.prompts.values()}
    assert set(world.domain_factors) == domains
    assert world.domain_factors == domain_factors(tuple(world.domain_factors), world.features)
    for factors in world.domain_factors.values():
        assert set(factors) == {feature.name for feature in world.features}
        assert all(0.7 <= factor <= 1.3 for factor in factors.values())
    tasks = {task for task, _ in world.prompts.values()}
    assert set(world.task_factors) <= tasks
    for prompt, (task, domain) in world.prompts.items():
        for feature in world.features:
            factor = world.task_factors.get(task, {}).get(feature.name, 1.0)
            expected = feature.weight * world.domain_factors[domain][feature.name] * factor
            assert world.weights(prompt)[feature.name] == pytest.approx(expected)


def test_the_tokenizer_has_one_token_a_word_and_round_trips(world, tmp_path):
    world.tokenizer(model_max_length=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 3 + len(world.words)
    assert [tokenizer(word)["input_ids"] for word in world.words] == [
        [i] for i in range(3, len(tokenizer))
    ]
    for prompt, response in demonstrations(world, 100):
        prompt_ids, response_ids = (tokenizer(text)["input_ids"] for text in (prompt, response))
        assert tokenizer(prompt + response)["input_ids"] == prompt_ids + response_ids
        assert tokenizer.decode(prompt_ids + response_ids) == prompt + response


def test_files_follow_the_seed_and_only_it(world, tmp_path):
    config = replace(SMALL, kind=world.name, seed=3)

    def files(name, **changes):
        folder = write_world(tmp_path / name, replace(config, **changes))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    first, again, other = files("first"), files("again"), files("other", seed=4)
    fewer = files("fewer", sft_examples=30)
    assert first == again
    drawn = ["sft.jsonl", "prompts_train.jsonl", "prompts_eval.jsonl"]
    drawn.append("base_model/model.safetensors")
    assert all(first[name] != other[name] for name in drawn)
    assert first["sft.jsonl"].startswith(fewer["sft.jsonl"])
    assert all(first[name] == fewer[name] for name in drawn[1:])
    rows = read_jsonl(tmp_path / "first" / "sft.jsonl")
    assert all(row["domain"] == world.prompts[row["prompt"]][1] for row in rows)


def test_labels_are_as_noisy_as_the_gold_differences_say(world):
    pairs = demonstrations(world, 3000)
    rng = random.Random(5)
    prompts, first = zip(*pairs, strict=True)
    second = [world.demonstration(rng, prompt, rng.random()) for prompt in prompts]
    reward = world.gold_reward
    rows = label_pairs(
        prompts, first, second, seed=2, reward=reward, domain=lambda p: world.prompts[p][1]
    )
    gaps = [reward(r["prompt"], r["chosen"]) - reward(r["prompt"], r["rejected"]) for r in rows]
    wrong = [1 / (1 + math.exp(abs(gap))) for gap in gaps]
    deviation = math.sqrt(sum(p * (1 - p) for p in wrong))
    assert abs(sum(gap < 0 for gap in gaps) - sum(wrong)) < 4 * deviation
    assert 0.1 < sum(wrong) / len(rows) < 0.35  # noisy, and far from chance
    assert rows[0]["domain"] == world.prompts[rows[0]["prompt"]][1]


@pytest.mark.parametrize("text", ["", "describe the moon :", "write a poem"])
def test_other_text_is_no_prompt(world, text):
    with pytest.raises(UserError, match="not a prompt of the gold world") as error:
        world.gold_reward(text, " words")
    assert "\n" not in str(error.value)
    assert next(iter(world.prompts)) in str(error.value)


def test_a_batch_of_rewards_equals_single_ones(world):
    prompts, responses = zip(*demonstrations(world, 50), strict=True)
    finished = [number % 3 > 0 for number in range(50)]
    assert GoldReward(world)(prompts, responses, finished) == [
        world.gold_reward(p, r, finished=f)
        for p, r, f in zip(prompts, responses, finished, strict=True)
    ]
    with pytest.raises(ValueError, match="shorter"):
        GoldReward(world)(prompts, responses[:-1])


def test_worlds_cost_about_the_same():
    first = WORLDS.get(DEFAULT_WORLD)
    for name in WORLDS.names():
        world = WORLDS.get(name)
        assert abs(len(world.words) / len(first.words) - 1) < 0.15
        assert world.prompt_tokens + world.max_response_tokens <= 30
        assert 48 <= len(world.prompts) <= 100


def test_worlds_import_without_torch_or_transformers():
    code = (
        "import sys; from shiftrm.world.world import WORLDS; WORLDS.names(); "
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- names ---------------------------------------------------------------------------------------


def test_names_of_gold_rewards():
    assert gold_world("gold") is gold_world("gold:topics") is WORLDS.get(DEFAULT_WORLD)
    for name in WORLDS.names():
        assert gold_world(gold_name(name)) is WORLDS.get(name)
    assert gold_name(DEFAULT_WORLD) == "gold"
    assert gold_world("gold:shiftrm.world.gold:WORLD") is gold.WORLD
    for other in ("models/gold", "golden", "org/gold", "column:gold", "./gold"):
        assert gold_world(other) is None
    with pytest.raises(UserError, match=r"unknown gold world 'advert'.*adverts"):
        gold_world("gold:advert")


def test_a_world_that_does_not_exist_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"unknown gold world 'topic'; did you mean 'topics'") as e:
        WorldConfig(kind="topic")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="kind is 3"):
        WorldConfig(kind=3)


# -- the first world -----------------------------------------------------------------------------


def test_files_of_the_first_world_are_what_they_were(tmp_path):
    folder = write_world(tmp_path / "world", SMALL)
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FIRST_WORLD}
    assert found == FIRST_WORLD
    assert "kind" not in SMALL.plain()
    assert replace(SMALL, kind="adverts").plain()["kind"] == "adverts"


def test_the_first_world_is_the_module_of_the_same_functions():
    world = WORLDS.get(DEFAULT_WORLD)
    for prompt, response in demonstrations(world, 50):
        assert world.gold_reward(prompt, response) == gold.gold_reward(prompt, response)
        assert world.parse_prompt(prompt) == language.parse_prompt(prompt)
    assert world.words == language.VOCABULARY
