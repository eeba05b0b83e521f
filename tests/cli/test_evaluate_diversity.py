"""`shiftrm evaluate diversity`: files side by side, embedders, odd text, bad input."""

import json
import random
import sys
import types

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from shiftrm.files import write_jsonl
from shiftrm.measure.diversity import self_bleu, tokenise
from shiftrm.measure.diversity_files import (
    ACROSS,
    WITHIN,
    measure_diversity,
    read_responses,
)
from shiftrm.measure.embeddings import load_embedder
from tests.cli.conftest import refused
from tests.conftest import WORDS, llama_config


def rows(seed, count=40, responses=3, words=None):
    rng = random.Random(seed)
    return [
        {
            "prompt": f"prompt {i}",
            "responses": [
                " ".join(rng.choice(words or WORDS.split()) for _ in range(8))
                for _ in range(responses)
            ],
        }
        for i in range(count)
    ]


def read(path="d.json"):
    with open(path, encoding="utf-8") as handle:
        return json.load(handle)


def test_two_files(shiftrm):
    write_jsonl("sft.jsonl", rows(0))
    write_jsonl("ppo.jsonl", rows(1, words=["great", "cat", "a"]))
    status, output = shiftrm("evaluate diversity sft.jsonl late=ppo.jsonl --output d.json")
    assert (status, output.err) == (0, "")
    found = {(d["name"], d["scope"]): d for d in read()["diversities"]}
    assert set(found) == {(name, scope) for name in ("sft", "late") for scope in (WITHIN, ACROSS)}
    texts = [row["responses"][0] for row in rows(0)]
    expected = np.mean([values.mean() for values in self_bleu(tokenise(texts)).values()])
    assert found["sft", ACROSS]["values"]["self_bleu"]["value"] == pytest.approx(expected)
    expected = np.mean(
        [[v.mean() for v in self_bleu(tokenise(r["responses"])).values()] for r in rows(0)]
    )
    assert found["sft", WITHIN]["values"]["self_bleu"]["value"] == pytest.approx(expected)
    for entry in found.values():
        value = entry["values"]["self_bleu"]
        assert value["low"] < value["value"] < value["high"]
    assert "late is less diverse than sft within prompts: Self-BLEU" in output.out
    assert "late is less diverse than sft across prompts: Self-BLEU" in output.out
    assert "similarity (sum)" not in output.out


def test_files_are_cut_to_one_size(tmp_path):
    """All of these numbers depend on how many responses there are."""
    write_jsonl(tmp_path / "a.jsonl", rows(0, count=40, responses=4))
    write_jsonl(tmp_path / "b.jsonl", rows(0, count=30, responses=2))
    files = [read_responses(str(tmp_path / f"{name}.jsonl"), name) for name in "ab"]
    report = measure_diversity(files)
    assert {(d.prompts, d.responses) for d in report.diversities if d.scope == WITHIN} == {(30, 60)}
    assert {d.responses for d in report.diversities if d.scope == ACROSS} == {30}
    assert "! a: 30 of 40 prompts are compared." in report.lines
    # The same prompts: rows(0) begins alike, but its responses are drawn in another order.
    same = measure_diversity([files[0], files[0]])
    assert same.diversities[0].values == same.diversities[1].values
    assert "not clearly more or less diverse than" in same.lines[0]
    few = measure_diversity(files[:1], max_prompts=12, seed=1)
    assert few.diversities[0].prompts == 12
    assert few == measure_diversity(files[:1], max_prompts=12, seed=1)


def test_one_response_a_prompt(shiftrm):
    write_jsonl("a.jsonl", rows(0, responses=1))
    status, output = shiftrm("evaluate", "diversity", "a.jsonl", "--output", "d.json")
    assert status == 0
    assert [d["scope"] for d in read()["diversities"]] == [ACROSS]
    assert "not measured within prompts, which needs two responses to one prompt" in output.out


def test_one_prompt(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": r} for r in ("a b", "a c")])
    report = measure_diversity([read_responses(str(tmp_path / "a.jsonl"), "a")])
    [only] = report.diversities
    assert (only.scope, only.prompts, only.responses) == (WITHIN, 1, 2)
    assert only.values["self_bleu"].low is None
    assert "! a: not measured across prompts, which needs two prompts." in report.lines


def test_odd_text(tmp_path):
    """Empty, invisible, right-to-left, emoji, chats, lone surrogates, text without spaces."""
    odd = [
        {"prompt": "1", "responses": ["", "  \n", "שלום עולם", "🙂🙂", "\u200b"]},
        {"prompt": [{"role": "user", "content": "2"}], "responses": [
            [{"role": "assistant", "content": "hi"}], "x" * 10_000, "hi"]},
        {"prompt": "3", "responses": ["", ""]},
    ]  # fmt: skip
    with open(tmp_path / "odd.jsonl", "w", encoding="utf-8") as handle:
        for row in odd:
            handle.write(json.dumps(row) + "\n")  # ASCII, so that \\ud800 can be written
        handle.write(json.dumps({"prompt": "4", "responses": ["a \ud800", "a \ud800"]}) + "\n")
    report = measure_diversity([read_responses(str(tmp_path / "odd.jsonl"), "odd")])
    assert report.empty == {"odd": 4}
    assert report.duplicates["odd"] == pytest.approx(2 / 8)
    words = "\n".join(report.lines)
    assert "4 empty responses left out" in words
    assert "25 % of the responses repeat another" in words
    assert "use --tokenize char" in words
    assert {d.scope: d.prompts for d in report.diversities} == {WITHIN: 3, ACROSS: 3}


def test_lengths_that_differ_are_said(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(0))
    longer = [{**r, "responses": [t + " " + t for t in r["responses"]]} for r in rows(0)]
    write_jsonl(tmp_path / "b.jsonl", longer)
    files = [read_responses(str(tmp_path / f"{name}.jsonl"), name) for name in "ab"]
    lines = measure_diversity(files, scopes=(ACROSS,)).lines
    assert any("Responses differ in length (8 to 16 tokens on average)" in line for line in lines)


@pytest.fixture
def embedder(files, tokenizer):
    torch.manual_seed(0)
    LlamaModel(llama_config()).save_pretrained(files / "embedder")
    tokenizer.save_pretrained(files / "embedder")
    return files / "embedder"


def test_mean_pooling(embedder, tokenizer):
    """Against each text alone, so that neither padding nor batches play a part."""
    texts = ["the cat", "a dog sits and", "fish " * 90, "red"]
    found = load_embedder(str(embedder), batch_size=3)(texts)
    model = LlamaModel.from_pretrained(embedder)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(dim=0).numpy()
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_the_sum_with_an_embedder(shiftrm, embedder):
    write_jsonl("a.jsonl", rows(0))
    status, output = shiftrm("evaluate diversity a.jsonl --embedder embedder --output d.json")
    assert (status, output.err) == (0, "")
    for entry in read()["diversities"]:
        value = {name: number["value"] for name, number in entry["values"].items()}
        assert value["similarity"] == pytest.approx(
            value["self_bleu"] + max(0, value["embedding_similarity"]), abs=1e-2
        )  # within prompts a negative cosine counts as 0 prompt by prompt
    assert "similarity (sum)" in output.out
    report = measure_diversity([read_responses("a.jsonl", "a")], embed=load_embedder(str(embedder)))
    within, across = report.diversities
    assert across.values["similarity"].value == pytest.approx(value["similarity"])
    assert ("self_bleu" in within.values, "distinct_2" in across.values) == (True, True)


def in_format(folder, *, mode="pooling_mode_mean_tokens", extra=()):
    """A folder as sentence-transformers writes it."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *extra]
    content = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(content))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, mode: True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')


def test_mean_pooled_folders_do_without_sentence_transformers(embedder, tokenizer):
    in_format(embedder, extra=[("2_Normalize", "Normalize")])
    embed = load_embedder(str(embedder))
    assert embed(["the cat sits a dog"]) == pytest.approx(embed(["the cat sits a"]))  # cut at 4


@pytest.mark.parametrize(
    "options", [{"mode": "pooling_mode_cls_token"}, {"extra": [("2_Dense", "Dense")]}]
)
def test_others_need_it(shiftrm, embedder, options):
    in_format(embedder, **options)
    write_jsonl("a.jsonl", rows(0))
    message = "embedder: needs sentence-transformers, which is not installed; run pip install"
    refused(shiftrm, "evaluate diversity a.jsonl --embedder embedder --output d.json", message)


def test_sentence_transformers_is_used_where_it_is(embedder, monkeypatch):
    """A stand-in with its interface: it is not installed on test machines."""
    in_format(embedder, mode="pooling_mode_cls_token")
    asked = {}

    class SentenceTransformer:
        def __init__(self, path):
            asked["path"] = path

        def encode(self, texts, *, batch_size, show_progress_bar):
            asked.update(texts=texts, batch_size=batch_size)
            return np.array([[3.0, 4.0]] * len(texts), dtype=np.float32)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr("shiftrm.measure.embeddings.find_spec", lambda name: object())
    vectors = load_embedder(str(embedder), batch_size=5)(["a", "\ud800"])
    assert vectors == pytest.approx(np.array([[0.6, 0.8]] * 2))
    assert asked == {"path": str(embedder), "texts": ["a", "?"], "batch_size": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file"),
        (["a.jsonl", "b/a.jsonl"], "two are called 'a'"),
        (["a.jsonl", "--tokenize", "intel"], "unknown tokenizer; did you mean 'intl'?"),
        (["a\x1b[2J=a.jsonl"], "'a\\x1b[2J=a.jsonl': expected PATH or NAME=PATH"),
        (["a.jsonl", "--output", "./a.jsonl"], "./a.jsonl: this command already reads or writes"),
        (["a.jsonl", "--prompts", "1"], "--prompts is 1"),
        (["a.jsonl", "--seed", "-1"], "--seed is -1"),
        (["a.jsonl", "--embedder", "nowhere"], "nowhere: cannot be loaded as an embedding model"),
        (["=a.jsonl"], "expected PATH or NAME=PATH"),
        (["empty.jsonl"], "every response is empty"),
        (["single.jsonl"], "nothing to compare; give two responses"),
        (["pairs.jsonl"], "expected a column 'responses' or 'response'"),
    ],
)
def test_mistakes(shiftrm, options, message):
    write_jsonl("a.jsonl", rows(0))
    write_jsonl("empty.jsonl", [{"prompt": "p", "responses": [" "]}])
    write_jsonl("single.jsonl", [{"prompt": "p", "responses": ["x"]}])
    refused(shiftrm, ["evaluate", "diversity", "--output", "d.json", *options], message)
