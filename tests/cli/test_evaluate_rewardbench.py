"""`shiftrm evaluate rewardbench`: files in the public schemas, a tiny reward model, bad input."""

import json
import random

import pytest
import torch
from transformers import LlamaForSequenceClassification

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.measure.rewardbench import ScoredRow, rewardbench_2
from shiftrm.measure.rewardbench_files import read_rewardbench, score_rewardbench
from shiftrm.models.scoring import Scorer
from tests.cli.conftest import refused
from tests.conftest import WORDS, llama_config

ROW_1 = {"prompt": "the cat", "chosen": "runs", "rejected": "sits", "subset": "hep-go", "id": 7}
ROW_2 = {
    "id": "3", "prompt": "the cat", "chosen": ["runs"], "rejected": ["sits", "flies", "swims"],
    "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["x"],
    "subset": "Math", "additional_metadata": None,
}  # fmt: skip


@pytest.fixture
def model(files, tokenizer):
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(files / "reward")
    tokenizer.save_pretrained(files / "reward")
    return files


def text(rng, low=1, high=6):
    return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(low, high)))


def rows_2(rng):
    rows = []
    for number in range(8):
        domain = ("Factuality", "Precise IF", "Math", "Safety")[number % 4]
        rejected = [text(rng) for _ in range(3)]
        rows.append({**ROW_2, "id": str(number), "prompt": text(rng), "subset": domain})
        rows[-1] |= {"chosen": [text(rng)], "rejected": rejected}
    for number in range(2):
        for kind, chosen in (("ref", 1), ("tied", 3)):
            row = {
                "id": f"{kind}:{number}", "prompt": text(rng), "subset": "Ties",
                "chosen": [text(rng) for _ in range(chosen)],
                "rejected": [text(rng) for _ in range(4)],
                "num_correct": chosen, "num_incorrect": 4, "total_completions": chosen + 4,
            }  # fmt: skip
            rows.append(row)
    return rows


def as_chat(scorer, row, response):
    prompt = [{"role": "user", "content": row["prompt"]}]
    return scorer([prompt], [[{"role": "assistant", "content": response}]])[0]


def test_version_2(shiftrm, model):
    rows = rows_2(random.Random(0))
    write_jsonl("rb2.jsonl", rows)
    status, output = shiftrm(
        "evaluate rewardbench --model reward --data rb2.jsonl --output out/rb.json "
        "--scores scores.jsonl --batch-size 3"
    )
    assert (status, output.err) == (0, "")
    scorer = Scorer.from_pretrained("reward")
    expected = [
        ScoredRow(
            row["subset"],
            *(tuple(as_chat(scorer, row, r) for r in row[side]) for side in ("chosen", "rejected")),
            row["id"],
        )
        for row in rows
    ]
    for row, other in zip(read_jsonl("scores.jsonl"), expected, strict=True):
        assert row["chosen"] == pytest.approx(other.chosen, abs=1e-5)
        assert row["rejected"] == pytest.approx(other.rejected, abs=1e-5)
    with open("out/rb.json", encoding="utf-8") as handle:
        found = json.load(handle)
    wanted = rewardbench_2(expected)
    assert found["overall"] == pytest.approx(wanted.overall, abs=1e-4)
    assert found["domains"]["Ties"] == pytest.approx(wanted.ties.score, abs=1e-4)
    assert (found["responses"], found["truncated"], found["max_length"]) == (8 * 4 + 24, 0, 64)
    assert "RewardBench 2:" in output.out
    assert "not comparable with the leaderboard" in output.out


def test_version_1(shiftrm, model):
    rng = random.Random(1)
    rows = [
        {**ROW_1, "subset": subset, "chosen": text(rng), "rejected": text(rng), "prompt": prompt}
        for subset in ("hep-go", "math-prm", "shp", "mine[red]")
        for prompt in ("the cat", [{"role": "user", "content": "a dog"}])
    ]
    write_jsonl("rb1.jsonl", rows)
    status, output = shiftrm("evaluate", "rewardbench", "--model", "reward", "--data", "rb1.jsonl")
    assert (status, output.err) == (0, "")
    assert "Prior sets (weight 0.5)" in output.out
    assert "mine[red] (apart)" in output.out


def test_long_texts_are_cut_where_reward_bench_cuts_them(model):
    scorer = Scorer.from_pretrained(model / "reward")
    long = " ".join(["cat"] * 100)
    write_jsonl(model / "rb1.jsonl", [{**ROW_1, "chosen": long, "rejected": "dog"}])
    write_jsonl(model / "rb2.jsonl", [{**ROW_2, "chosen": [long]}])
    ids = scorer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": long}],
        return_dict=True,
    )["input_ids"]
    for name, limit, cut in (("rb1", 64, ids[-64:]), ("rb2", 64, ids[:64]), ("rb1", 9, ids[-9:])):
        found = score_rewardbench(
            scorer, read_rewardbench(str(model / f"{name}.jsonl")), max_length=max(limit, 9)
        )
        assert (found.truncated, found.limit) == (1, limit)
        assert found.rows[0].chosen[0] == pytest.approx(scorer.score_ids([cut])[0], abs=1e-6)
    found = score_rewardbench(scorer, read_rewardbench(str(model / "rb1.jsonl")))
    assert found.limit == 64, "2048, or the model's context if that is shorter"


def test_a_tokenizer_without_a_template_joins_the_texts(model):
    scorer = Scorer.from_pretrained(model / "reward")
    scorer.tokenizer.chat_template = None
    write_jsonl(model / "rb1.jsonl", [{**ROW_1, "chosen": " runs"}])
    found = score_rewardbench(scorer, read_rewardbench(str(model / "rb1.jsonl")))
    assert found.rows[0].chosen[0] == pytest.approx(scorer(["the cat"], [" runs"])[0], abs=1e-6)


def test_equal_texts_are_equal_scores(model):
    """Also when they are in different batches: a tie must count as one."""
    scorer = Scorer.from_pretrained(model / "reward")
    rows = [{**ROW_2, "chosen": ["runs"], "rejected": ["runs", "a", "a dog sits"]}] * 3
    write_jsonl(model / "rb2.jsonl", rows)
    found = score_rewardbench(scorer, read_rewardbench(str(model / "rb2.jsonl")), batch_size=1)
    assert all(row.chosen[0] == row.rejected[0] for row in found.rows)


def test_hub_names_take_the_split_that_is_scored(monkeypatch):
    asked = []

    def rows(source, *, split, required=()):
        asked.append((source, split))
        yield "here", ROW_2

    monkeypatch.setattr("shiftrm.measure.rewardbench_files.iterate_rows", rows)
    for source in ("allenai/reward-bench", "allenai/reward-bench-2", "me/mine"):
        assert read_rewardbench(source).version == 2
    assert [split for _, split in asked] == ["filtered", "test", "train"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "rb.jsonl:1: column 'subset' is missi"),
        ([ROW_1, ROW_2], "rb.jsonl:2: a row of RewardBench 2 in a file of RewardBench 1"),
        ([{**ROW_2, "num_correct": 2}], "num_correct is 2, but the row has 1"),
        ([{**ROW_2, "rejected": []}], "column 'rejected' must be a list of texts"),
        ([{**ROW_2, "rejected": "x"}], "column 'rejected' must be a list of texts"),
        ([{**ROW_2, "chosen": [3]}], "column 'chosen' holds a value that is not text"),
        ([{**ROW_1, "prompt": 3}], "column 'prompt' holds int"),
        ([{**ROW_1, "subset": 3}], "column 'subset' is 3; expected a name"),
        ([{**ROW_2, "subset": "Ties"}], "id '3' of a row of Ties; expected ref:N or tied:N"),
        ([{**ROW_2, "subset": "ties", "id": "tied:1"}], "'tied:1' has one correct answer"),
        ([{**ROW_2, "subset": "Ties", "id": "ref:²"}], "id 'ref:²' of a row of Ties; expected"),
        (
            [{**ROW_2, "subset": "Ties", "id": "ref:1"}] * 2,
            "rb.jsonl:2: id 'ref:1' of Ties is already used at rb.jsonl:1",
        ),
        ([{**ROW_1, "subset": "x\x1b[2J"}], "column 'subset' is 'x\\x1b[2J'; expected a name"),
    ],
)
def test_bad_rows(shiftrm, model, rows, message):
    write_jsonl("rb.jsonl", rows)
    words = "evaluate rewardbench --model reward --data rb.jsonl --output o.json"
    refused(shiftrm, words, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--max-length", "0"], "--max-length is 0"),
        (["--scores", "x.csv"], "the output is JSON lines"),
        (["--model", "policy"], "no score head"),
        (["--output", "rb.jsonl"], "rb.jsonl: this command already reads or writes it"),
        (
            ["--output", "x.json", "--scores", "./x.json"],
            "./x.json: this command already reads or writes",
        ),
    ],
)
def test_bad_options(shiftrm, model, options, message):
    write_jsonl("rb.jsonl", [ROW_1])
    given = ["--model", "reward", "--data", "rb.jsonl", *options]
    refused(shiftrm, ["evaluate", "rewardbench", *given], message)
