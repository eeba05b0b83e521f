"""shiftrm evaluate sheet and answers, from two files of responses to rates."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from shiftrm import files as files_module
from shiftrm.files import read_jsonl, write_jsonl
from tests.cli.conftest import refused
from tests.fake_endpoint import FakeEndpoint


@pytest.fixture
def responses(files):
    """40 prompts; our response is the longer one."""
    for name, text in (("ours", " long and kind"), ("theirs", " short")):
        rows = [{"prompt": f"prompt {i}", "responses": [f"{i}{text}", "x"]} for i in range(40)]
        write_jsonl(files / f"{name}.jsonl", rows)
    return files


MAKE = ["evaluate", "sheet", "--ours", "ours.jsonl", "--theirs", "theirs.jsonl", "--output", "out"]
COUNT = ["evaluate", "answers", "--key", "out/key.json", "--output", "human.jsonl", "--answers"]


def fill_in(path, longer_wins_on):
    """A rater who prefers the longer response to the prompts named, and ties on the others."""
    with open(path, encoding="utf-8-sig", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        a_is_longer = len(row["response_a"]) > len(row["response_b"])
        liked = longer_wins_on(int(row["prompt"].split()[1]))
        row["answer"] = ("A" if a_is_longer else "B") if liked else "tie"
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prefers_ours(body):
    """A judge who likes kindness."""
    question = body["messages"][-1]["content"]
    return "[[A]]" if question.index("kind") < question.index("short") else "[[B]]"


def test_from_responses_to_rates(shiftrm, responses):
    status, output = shiftrm(*MAKE, "--raters", 2, "--limit", 30, "--question", "Which is kinder?")
    assert status == 0
    assert "30 of 40 prompts, drawn with seed 0." in output.out
    assert "30 items: out. Give raters one sheet-N.html or .csv each" in output.out
    names = ["key.json", "sheet-1.csv", "sheet-1.html", "sheet-2.csv", "sheet-2.html"]
    assert sorted(p.name for p in (responses / "out").iterdir()) == names
    assert "Which is kinder?" in (responses / "out" / "sheet-1.html").read_text()

    fill_in(responses / "out" / "sheet-1.csv", lambda i: True)
    fill_in(responses / "out" / "sheet-2.csv", lambda i: i % 2)
    with FakeEndpoint(answer=prefers_ours) as server:
        judge = ["--judge", "endpoint", "--base-url", server.url, "--model", "fake"]
        asked = ["--limit", 30, "--output", "judged"]
        assert shiftrm("evaluate", "win-rate", *MAKE[2:-2], *asked, *judge)[0] == 0
    sheets = ["out/sheet-1.csv", "out/sheet-2.csv"]
    status, output = shiftrm(*COUNT, *sheets, "--verdicts", "judged/verdicts.jsonl")
    assert status == 0
    rows = read_jsonl(responses / "human.jsonl")
    assert len(rows) == 60
    key = json.loads((responses / "out" / "key.json").read_text())
    odd = sum(int(p["prompt"].split()[1]) % 2 for p in key["pairs"].values())
    assert [r["outcome"] for r in rows].count("win") == 30 + odd
    assert {r["rater"] for r in rows} == set(sheets)
    for row in rows:
        assert key["pairs"][row["id"]] == {k: row[k] for k in ("prompt", "ours", "theirs")}
    assert "60 answers of 2 raters to 30 items." in output.out
    assert "ours is preferred" in output.out
    assert f"Raters: agree on {100 * odd / 30:.0f} %" in output.out
    # The majority of two raters is a tie where they differ; the judge has drawn the same prompts.
    assert f"the judge: agree on {100 * odd / 30:.0f} %" in output.out
    assert "without a verdict" not in output.out


def test_the_seed_decides_the_prompts_and_nobody_the_sides(shiftrm, responses):
    """What a rater could find out from the seed and this code is nothing."""
    prompts, sides = [], []
    for number, seed in enumerate([4, 4, 5]):
        shiftrm(*MAKE[:-1], f"out{number}", "--seed", seed, "--limit", 20)
        key = json.loads((responses / f"out{number}" / "key.json").read_text())
        prompts.append({pair["prompt"] for pair in key["pairs"].values()})
        sides.append({item["id"]: item["ours"] for item in key["sheets"][0]["items"]})
    assert prompts[0] == prompts[1] != prompts[2]
    assert sides[0] != sides[1], "equal once in 184,756 times"


def test_text_that_has_no_utf8_form(shiftrm, files):
    """Lone surrogates, which a model may write, from the responses to the output."""
    for name in ("ours", "theirs"):
        (files / f"{name}.jsonl").write_text(f'{{"prompt": "\\ud800", "response": "{name}"}}\n')
    assert shiftrm(*MAKE)[0] == 0
    key = json.loads((files / "out" / "key.json").read_text())
    answer = {"sheet": key["sheets"][0]["id"], "item": 1, "answer": "A", "comment": "\udc00"}
    (files / "a.json").write_text(json.dumps([answer]))
    assert shiftrm(*COUNT, "a.json")[0] == 0
    [row] = read_jsonl(files / "human.jsonl")
    assert (row["prompt"], row["comment"]) == ("\ud800", "\udc00")


def test_mistakes_are_one_line(shiftrm, responses):
    refused(shiftrm, [*MAKE, "--limit", "-1"], "--limit is -1; it must be at least 0")
    refused(shiftrm, [*MAKE, "--raters", "0"], "--raters is 0")
    refused(shiftrm, [*MAKE[:-1], "ours.jsonl"], "ours.jsonl: is not a folder")
    refused(shiftrm, [*MAKE, "--theirs", "prompts.jsonl"], "has neither 'responses' nor 'response'")
    refused(shiftrm, [*MAKE, "--theirs", "none.jsonl"], "none.jsonl: no such file")
    refused(shiftrm, [*COUNT, "a.csv"], "out/key.json: no such file")
    refused(shiftrm, [*COUNT, "a.csv", "--seed", "-1"], "--seed is -1; it must be at least 0")
    same = [*COUNT, "a.csv", "--output", "out/../out/key.json"]
    refused(shiftrm, same, "out/../out/key.json: this command already reads or writes it")
    assert shiftrm(*MAKE)[0] == 0
    key = (responses / "out" / "key.json").read_bytes()
    refused(shiftrm, MAKE, "out: holds a sheet already")
    assert (responses / "out" / "key.json").read_bytes() == key
    refused(shiftrm, [*COUNT, "out/sheet.csv"], "out/sheet.csv: no item is answered")
    refused(shiftrm, [*COUNT, "a.csv", "--output", "x.csv"], "the output is JSON lines")


def test_half_a_sheet_does_not_stay(shiftrm, responses, monkeypatch):
    plain = files_module.atomic_write_text

    def full(path, text):
        if Path(path).suffix == ".html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return plain(path, text)

    monkeypatch.setattr("shiftrm.cli.evaluate.sheet.atomic_write_text", full)
    status, output = shiftrm(*MAKE)
    assert (status, "No space left on device" in output.err) == (2, True)
    assert not (responses / "out").exists()
    monkeypatch.setattr("shiftrm.cli.evaluate.sheet.atomic_write_text", plain)
    assert shiftrm(*MAKE, "--question", "better \udcff?")[0] == 0  # a byte that is no UTF-8
