"""The recipes for real data, from public files to a tested policy, with a real tokenizer.

Questions of four topics stand for four subreddits or product categories: those of Anthropic's
HH-RLHF where SHIFTRM_HH names a file of it (`harmless-base/test.jsonl.gz`, say), sorted by their
words, else made-up ones. The tokenizer is SmolLM2's where that model is at hand (see
tests/smollm2.py), else one of bytes; the models are tiny.
"""

import os
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.cli import main
from shiftrm.data.amazon import amazon_domains, read_amazon
from shiftrm.data.domains import load_split, write_domains
from shiftrm.data.formats.hh_rlhf import hh_pair
from shiftrm.data.shp import read_shp, shp_domains
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.gguf_file import convert_gguf
from shiftrm.models.scoring import Scorer
from shiftrm.records import read_records
from tests.byte_level import byte_level
from tests.conftest import llama_config
from tests.smollm2 import smollm2_file

RECIPES = Path(__file__).parents[2] / "recipes"
TOPICS = {
    "cooking": ("bread", "soup", "rice", "tea", "cake", "pasta", "salad", "pie"),
    "health": ("a cold", "a headache", "a burn", "a cut", "stress", "a cough", "a rash", "sleep"),
    "home": ("the sink", "my room", "the roof", "a door", "paint", "mice", "a lamp", "the garden"),
    "work": ("my boss", "a raise", "my resume", "an email", "a meeting", "a job", "a team", "pay"),
}
ASKED = ("How do I deal with {}?", "What should I know about {}?", "Can you help me with {} today?")
GOOD = "Sure. First, think about what you need for {}; then take your time and don't hurry."
BAD = "I don't know, and I don't really care about {} at all, so go away and ask someone else."
WORDS = {
    "crime": "steal|rob|gun|weapon|kill|drug|cocaine|meth|weed|bomb|murder|poison|hack",
    "places": "house|home|car|school|store|airport|hotel|restaurant|neighborhood",
    "people": "friend|girlfriend|boyfriend|wife|husband|neighbor|boss|mother|father|brother|sister",
    "words": "word|joke|insult|swear|racist|name|slur|say|language|call",
}
"""What an HH question about a topic holds."""

SMALL = [
    *("max_steps=2", "warmup_steps=0", "support_batch_size=4", "query_batch_size=4"),
    *("domains_per_step=1", "micro_batch_size=2", "eval_steps=1", "eval_pairs=4"),
    *("logging_steps=1", "save_strategy=no"),
]  # fmt: skip
GUIDE = ["weighted.updates=2", "weighted.batch_size=4", "evaluation.responses_per_prompt=2"]
GUIDE += ["evaluation.pairs=4", "evaluation.sampling.max_new_tokens=8"]


OPTIMISED = "steps=1 prompts_per_step=2 rollouts_per_prompt=2 minibatch_size=4"
OPTIMISED = [*OPTIMISED.split(), "sampling.max_new_tokens=8"]


def dialogues():
    """`(topic, question, better answer, worse answer)`, all questions different."""
    if path := os.environ.get("SHIFTRM_HH"):
        return people_dialogues(path)
    return made_up_dialogues()


def people_dialogues(path):
    """Forty of a topic: the last question of a dialogue, with the answers that people compared."""
    found = {topic: {} for topic in WORDS}
    for number, row in enumerate(read_jsonl(path)):
        pair = hh_pair(row, f"row {number}")
        if isinstance(pair, str):
            continue
        question = pair["prompt"][-1]["content"].strip()
        answers = [pair[side][-1]["content"].strip() for side in ("chosen", "rejected")]
        for topic, words in WORDS.items():
            if re.search(rf"\b({words})", question.lower()) and all(answers):
                found[topic].setdefault(question, answers)
                break
    return [
        (topic, question, *answers)
        for topic, questions in found.items()
        for question, answers in list(questions.items())[:40]
    ]


def made_up_dialogues():
    rng = random.Random(0)
    for topic, things in TOPICS.items():
        for number in range(40):
            thing = things[number % len(things)]
            question = f"I have {number + 2} minutes. {rng.choice(ASKED).format(thing)}"
            yield topic, question, GOOD.format(thing), BAD.format(thing)


def shp_rows(found):
    for number, (topic, question, better, worse) in enumerate(found):
        first = number % 2 == 0
        yield {
            "post_id": f"p{number}",
            "domain": f"ask{topic}_{'test' if number % 5 == 0 else 'train'}",
            "history": question,
            "human_ref_A": better if first else worse,
            "human_ref_B": worse if first else better,
            "labels": int(first),
            "score_A": 30 if first else 4,
            "score_B": 4 if first else 30,
            "score_ratio": 7.5,
        }


def amazon_rows(found):
    for number, (_, question, better, worse) in enumerate(found):
        for rating, words in ((5.0, better), (1.0, worse)):
            yield {
                "rating": rating,
                "title": "My verdict",
                "text": f"{question}<br />{words}",
                "asin": f"a{number}",
                "parent_asin": f"a{number}",
            }


def read_domains(name, found):
    """Write files in the public schema, and a folder of domains from them as the recipe does."""
    if name == "shp":
        write_jsonl("shp.jsonl", shp_rows(found))
        return shp_domains(read_shp(["shp.jsonl"]))[0]
    categories = dict.fromkeys(row[0] for row in found)
    for category in categories:
        write_jsonl(f"{category}.jsonl", amazon_rows([r for r in found if r[0] == category]))
    return amazon_domains(read_amazon({c: f"{c}.jsonl" for c in categories}))[0]


@pytest.fixture
def models(tmp_path):
    """Folders of a tiny policy and of a tiny judge with a real tokenizer."""
    try:
        convert_gguf(smollm2_file(), tmp_path / "given")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "given")
    except pytest.skip.Exception:
        tokenizer = byte_level()
    sizes = {
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(len(tokenizer), **sizes)).save_pretrained(tmp_path / "sft")
    judge = LlamaForSequenceClassification(llama_config(len(tokenizer), num_labels=1, **sizes))
    judge.save_pretrained(tmp_path / "judge")
    for name in ("sft", "judge"):
        tokenizer.save_pretrained(tmp_path / name)
    return tokenizer


def shiftrm(capsys, *words):
    status = main(list(words))
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shp", "amazon"])
def test_a_recipe_from_public_files_to_a_tested_policy(name, tmp_path, monkeypatch, models, capsys):
    monkeypatch.chdir(tmp_path)
    found = list(dialogues())
    domains = read_domains(name, found)
    assert len(domains) == 4
    held_out = domains[0].name
    write_domains(name, domains, held_out=[held_out], validation=[domains[1].name])
    split = load_split(name)
    assert [len(part) for part in (split.source, split.validation, split.held_out)] == [2, 1, 1]
    row = split.source[0].query[0]
    assert any(row["chosen"].endswith(better[-20:]) for _, _, better, _ in found)
    assert models.decode(models(row["prompt"])["input_ids"]).endswith(row["prompt"])

    recipe = str(RECIPES / f"{name}.yaml")
    said = shiftrm(
        capsys, "meta-train", "--config", recipe, "--model", "sft", "--domains", name,
        "--output", "reward", *SMALL,
    )  # fmt: skip
    assert "2 source domains, 2 outer steps of 1 tasks" in said
    assert "A_PL on 1 validation domains" in said
    reward = Scorer.from_pretrained("reward")
    values = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    assert all(abs(value) < 100 for value in values)
    assert values[0] != values[1]

    pooled = [row for domain in split.source for row in domain.query]
    write_jsonl("pooled.jsonl", pooled)
    shiftrm(
        capsys, "train", "--model", "sft", "--pairs", "pooled.jsonl", "--output", "pooled",
        "max_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
        "save_strategy=no", "eval_strategy=no",
    )  # fmt: skip
    reward = ["--policy", "sft", "--reward", "reward"]
    guides = {
        "weighted": reward,
        "pooled": ["--policy", "sft", "--reward", "pooled"],
        "plain": ["--policy", "sft", "--way", "plain"],
        "ppo": [*reward, "--way", "ppo", *(f"ppo.{setting}" for setting in OPTIMISED)],
        "rloo": [*reward, "--way", "rloo", *(f"rloo.{setting}" for setting in OPTIMISED)],
        "none": ["--policy", "dpo", "--reference", "sft", "--way", "none"],
    }
    shiftrm(
        capsys, "optimise", "dpo", "--policy", "sft", "--pairs", "pooled.jsonl",
        "--output", "dpo", "max_steps=1", "per_device_train_batch_size=2",
        "gradient_accumulation_steps=1", "save_strategy=no", "kl_samples=0", "bf16=false",
    )  # fmt: skip
    for guided, guide in guides.items():
        output = f"test-{guided}"
        shiftrm(
            capsys, "meta-test", "--domains", name, "--judge", "judge",
            "--output", output, *guide, *GUIDE,
        )  # fmt: skip
        way = "weighted" if guided == "pooled" else guided
        records = read_records(Path(output) / "records.jsonl")
        after = {r.metric: r.value for r in records if r.method == way and r.step is None}
        assert 0 < after["kl"] < 1  # an update or two of a tiny policy
        assert 0 <= after["accuracy_mean"] <= 1
        assert ("proxy" in after) == ("--reward" in guide)
        [answers] = Path(output).glob(f"{held_out}/responses.jsonl")
        rows = read_jsonl(answers)
        assert {row["prompt"] for row in rows} == set(split.held_out[0].prompts)
        judged = [value for row in rows for value in row["judged"]]
        assert after["judged"] == pytest.approx(sum(judged) / len(judged), abs=1e-5)
