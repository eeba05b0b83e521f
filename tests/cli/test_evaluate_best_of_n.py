"""`shiftrm evaluate best-of-n`: scored files, tiny reward models, the gold world, bad input."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from shiftrm.files import write_jsonl
from shiftrm.measure.best_of_n import best_of_n
from shiftrm.models.scoring import Scorer
from shiftrm.world.gold import gold_reward
from tests.cli.conftest import refused
from tests.conftest import WORDS, llama_config

ROW = {"prompt": "a", "proxy": [1]}
COMMAND = "evaluate best-of-n --samples s.jsonl --output b.json"
PNG = b"\x89PNG\r\n\x1a\n"


def texts(rng, count):
    return ["".join(f" {rng.choice(WORDS.split())}" for _ in range(4)) for _ in range(count)]


@pytest.fixture
def models(files, tokenizer):
    for name, seed in (("small", 1), ("large", 2)):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(files / name)
        tokenizer.save_pretrained(files / name)
    rng = random.Random(0)
    rows = [{"prompt": f"the {a}", "responses": texts(rng, 12)} for a in ("red", "blue", "cat")]
    write_jsonl(files / "samples.jsonl", rows)
    return rows


def read(path="b.json"):
    with open(path, encoding="utf-8") as handle:
        return json.load(handle)


def test_two_models(shiftrm, models):
    status, output = shiftrm(
        "evaluate best-of-n --samples samples.jsonl --proxy small --gold large --output "
        "b.json --n 4,1,12"
    )
    assert (status, output.err) == (0, "")
    found = read()
    small, large = Scorer.from_pretrained("small"), Scorer.from_pretrained("large")
    expected = [
        best_of_n(
            small([row["prompt"]] * 12, row["responses"]),
            large([row["prompt"]] * 12, row["responses"]),
            n=[1, 4, 12],
        )
        for row in models
    ]
    for k, name in enumerate(("proxy", "gold")):
        mean = np.mean([pair[k][0] for pair in expected], axis=0)
        assert [p[name]["value"] for p in found["points"]] == pytest.approx(mean, abs=1e-5)
    assert [p["n"] for p in found["points"]] == [1, 4, 12]
    assert (found["prompts"], found["left_out"]) == (3, 0)
    assert found["gold_fit"] is None, "two points besides n = 1 are too few for two coefficients"
    assert found["summary"] in " ".join(output.out.split())
    with open("b.png", "rb") as handle:
        assert handle.read(8) == PNG


def test_gaos_form_is_fitted(shiftrm):
    ranks = list(range(64))
    write_jsonl("s.jsonl", [{"prompt": str(i), "proxy": ranks, "gold": ranks} for i in range(2)])
    assert shiftrm(COMMAND)[0] == 0
    found = read()
    points = found["points"]
    d = np.sqrt([p["kl"] for p in points])
    gold = np.array([p["gold"]["value"] for p in points]) - points[0]["gold"]["value"]
    alpha, beta = np.linalg.lstsq(np.stack([d, -d * d], axis=1), gold, rcond=None)[0]
    assert (found["gold_fit"]["alpha"], found["gold_fit"]["beta"]) == pytest.approx((alpha, beta))


def test_columns_and_rows_of_one_prompt(shiftrm):
    rows = [
        {"prompt": "a", "proxy": [1.0, 2.0], "gold": [5.0, 3.0]},
        {"prompt": "a", "proxy": 3, "gold": 4},
        {"prompt": "b", "proxy": [0, 0, 0], "gold": [1, 2, 3]},
    ]
    write_jsonl("scored.jsonl", rows)
    status, output = shiftrm("evaluate best-of-n --samples scored.jsonl --output out/b.json")
    assert (status, output.err) == (0, "")
    # a: golds by proxy 5, 3, 4: n = 2 gives 3 once and 4 twice; b ties throughout: its mean, 2.
    gold = [p["gold"]["value"] for p in read("out/b.json")["points"]]
    assert gold == pytest.approx([(4 + 2) / 2, (11 / 3 + 2) / 2, (4 + 2) / 2])


def test_gold_world_and_one_response_a_row(shiftrm):
    prompt, words = "describe the garden :", [" roses", " lovely roses bloom", " mud mud mud"]
    write_jsonl(
        "samples.jsonl",
        [
            {"prompt": prompt, "response": word, "proxy": len(word), "finished": word != " roses"}
            for word in words
        ],
    )
    status, _ = shiftrm(
        "evaluate best-of-n --samples samples.jsonl --gold gold --n 1,3 --output b.json"
    )
    assert status == 0
    golds = [gold_reward(prompt, word, finished=word != " roses") for word in words]
    found = read()["points"]
    assert found[0]["gold"]["value"] == pytest.approx(sum(golds) / 3)
    assert found[1]["gold"]["value"] == pytest.approx(golds[1])  # the longest


def test_too_long_samples_are_counted(shiftrm, models):
    models[0]["responses"][3] = " cat" * 200
    write_jsonl("samples.jsonl", models)
    status, output = shiftrm(
        "evaluate best-of-n --samples samples.jsonl --proxy small --gold large --output b.json"
    )
    assert status == 0
    assert (read()["prompts"], read()["left_out"]) == (2, 1)
    assert "1 rows left out: longer than a model's context" in output.out


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "responses": ["x"]}], [], "s.jsonl:1: column 'proxy' is missing"),
        ([{"prompt": "a", "proxy": [1], "gold": [1, 2]}], [], "1 in 'proxy' and 2 in 'gold'"),
        ([{"prompt": "a", "proxy": ["x"], "gold": [1]}], [], "column 'proxy' holds 'x'"),
        ([{"prompt": "a", "proxy": [True], "gold": [1]}], [], "holds True; expected numbers"),
        ([{"prompt": "a", "proxy": [], "gold": []}], [], "is an empty list"),
        ([{"prompt": "a", "proxy": [10**400], "gold": [1]}], [], "expected finite numbers"),
        ([{"proxy": [1], "gold": [1]}], [], "column 'prompt' is missing"),
        ([{"prompt": "a", "proxy": [1], "gold": [1]}], ["--n", "2"], "--n 2: a prompt has only 1"),
        ([{"prompt": "a", "proxy": [1], "gold": [1]}], ["--n", "0"], "--n 0"),
        ([{"prompt": "a", "proxy": [1], "gold": [1]}], ["--n", "two"], "expected whole numbers"),
        ([{"prompt": "a", "proxy": [1], "gold": [1]}], ["--output", "b.txt"], "call it b.json"),
        ([{"prompt": "a", "proxy": [1], "gold": [1]}], ["--seed", "-1"], "--seed is -1"),
        ([ROW], ["--gold", "gold"], "nothing to score"),
        ([{**ROW, "response": "x"}], ["--gold", "gold"], "s.jsonl:1: not a row of the gold world"),
        ([{**ROW, "response": "x"}], ["--gold", "none"], "none: cannot be"),
    ],
)
def test_mistakes(shiftrm, rows, options, message):
    write_jsonl("s.jsonl", rows)
    refused(shiftrm, [COMMAND, *options], message)


def test_not_finite(shiftrm, files):
    (files / "s.jsonl").write_text('{"prompt": "a", "proxy": [NaN], "gold": [1]}\n')
    refused(shiftrm, COMMAND, "holds nan; expected finite numbers")
