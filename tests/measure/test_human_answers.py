"""Raters' answers: what is read, what is refused, and the numbers against hand values."""

import json

import pytest

from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.measure.judges.comparing import Comparison
from shiftrm.measure.people.answers import HumanAnswer, read_answers
from shiftrm.measure.people.blinding import pair_id
from shiftrm.measure.people.key_files import Key, read_verdicts
from shiftrm.measure.people.result import agreement, human_result, human_sentences, majority

KEY = Key(
    pairs={name: Comparison(f"the {name}", "left", "right") for name in "pqr"},
    sheets={
        "s1": [("p", "A"), ("q", "B"), ("r", "A")],
        "s2": [("r", "B"), ("p", "B"), ("q", "A")],
    },
)


def row(item, answer, sheet="s1", **more):
    return {"sheet": sheet, "item": item, "answer": answer, **more}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read({"ann.csv": "text", "bob.json": [rows]}) -> answers."""
    monkeypatch.chdir(tmp_path)

    def write_and_read(files):
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text, newline="")
        return read_answers(list(files), KEY)

    return write_and_read


def outcomes(answers):
    return {(a.rater, a.pair): a.outcome for a in answers}


def test_answers_become_outcomes_for_our_response(read):
    """Sheets with sides of their own; an absent row and an empty cell are both missing."""
    found = read(
        {
            "ann.csv": "\ufeffsheet,item,prompt,answer,comment,rater\r\n"
            's1,1,"the\n""p""",a,"so, so",\r\ns1,2,x, B ,,\r\ns1,3,x,,no idea,\r\n',
            "bob.json": [row(2, "TIE", "s2", rater="Bob"), row(1, "A", "s2", rater="Bob")],
        }
    )
    assert outcomes(found) == {
        ("ann.csv", "p"): "win",
        ("ann.csv", "q"): "win",
        ("ann.csv", "r"): None,
        ("Bob", "r"): "lose",
        ("Bob", "p"): "tie",
        ("Bob", "q"): None,
    }
    assert [a.comment for a in found if a.comment] == ["so, so", "no idea"]


@pytest.mark.parametrize("rows", ["s1;1;A;Ann\r\ns1;2;;Ann\r\n;;;\r\n", "s1;1.0;A;Ann\n"])
def test_as_spreadsheets_save(read, rows):
    """Semicolons, empty lines at the end, whole numbers with a point."""
    found = read({"a.csv": "\ufeffsheet;item;answer;rater\r\n" + rows})
    assert outcomes(found) == {("Ann", "p"): "win", ("Ann", "q"): None, ("Ann", "r"): None}


CSV = "sheet,item,answer,rater\n"
BAD = {
    "another sheet": ({"a.csv": CSV + "s9,1,A,\n"}, "a.csv:2: sheet 's9' is not the key's"),
    "unknown item": ({"a.csv": CSV + "s1,4,A,\n"}, "a.csv:2: item '4' is not on the sheet"),
    "no item": ({"a.csv": CSV + "s1,,A,\n"}, "a.csv:2: item '' is not on the sheet"),
    "item zero": ({"a.csv": CSV + "s1,0,A,\n"}, "a.csv:2: item '0'"),
    "no number": ({"a.csv": CSV + "s1,²,A,\n"}, "a.csv:2: item '²'"),
    "no such answer": (
        {"a.csv": CSV + "s1,1,A,\ns1,2,C,\n"},
        "a.csv:3: the answer 'C' is not valid",
    ),
    "semicolons": (
        {"a.csv": "sheet;item;answer\ns1;2;C\n"},
        "a.csv:2: the answer 'C' is not valid",
    ),
    "cells": ({"a.csv": "sheet;item;answer\ns1;2\n"}, "a.csv:2: 2 cells for 3 columns"),
    "twice": (
        {"a.csv": CSV + "s1,1,A,\ns1,1,B,\n"},
        "a.csv:3: item 1 of 'a.csv' was already answered",
    ),
    "in two files": (
        {"a.csv": CSV + "s1,1,A,Ann\n", "b.json": [row(1, "A", rater="Ann")]},
        "b.json: row 1: item 1 of 'Ann' was already answered in a.csv:2",
    ),
    "two sheets": (
        {"a.csv": CSV + "s1,1,A,Ann\n", "b.csv": CSV + "s2,1,A,Ann\n"},
        "rater 'Ann' filled in two sheets",
    ),
    "missing column": ({"a.csv": "sheet,item\ns1,1\n"}, "a.csv:2: column 'answer' is missing"),
    "nothing": ({"a.csv": CSV + "s1,1,,\n"}, "a.csv: no item is answered"),
    "empty": ({"a.csv": ""}, "a.csv: no item is answered"),
    "not JSON": ({"a.json": "{"}, "a.json:1: not valid JSON"),
    "another format": ({"a.xlsx": "PK"}, "cannot read .xlsx files"),
    "no file": ({}, "gone.csv: no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_answers(read, kind):
    files, message = BAD[kind]
    with pytest.raises(UserError) as error:
        read(files) if files else read_answers(["gone.csv"], KEY)
    assert message in str(error.value)


def test_bad_bytes(tmp_path):
    path = tmp_path / "a.csv"
    for separator in (b",", b";"):
        path.write_bytes(separator.join([b"sheet", b"item", b"answer"]) + b"\nM\xfcller\n")
        with pytest.raises(UserError, match="not valid UTF-8"):
            read_answers([path], KEY)


# -- Numbers ---------------------------------------------------------------------------------


def said(pair, rater, outcome, ours="A", prompt=None):
    choice = {"win": ours, "lose": "B" if ours == "A" else "A", "tie": "tie", None: None}[outcome]
    return HumanAnswer(pair, prompt or pair, rater, choice, ours)


TWO_RATERS = [
    said("p", "ann", "win"),
    said("q", "ann", "win", "B"),
    said("r", "ann", "tie"),
    said("s", "ann", None),
    said("p", "bob", "win", "B"),
    said("q", "bob", "lose"),
    said("r", "bob", "tie"),
    said("s", "bob", "lose"),
]


def test_rates_by_hand():
    """Every prompt counts the same: win 1, 1/2, 0, 0; tie 0, 0, 1, 0; lose 0, 1/2, 0, 1."""
    result = human_result(TWO_RATERS)
    assert (result.items, result.answers, result.missing) == (
        4,
        {"ann": 3, "bob": 4},
        {"ann": 1, "bob": 0},
    )
    assert result.win.value == pytest.approx(1.5 / 4)
    assert result.tie.value == pytest.approx(1 / 4)
    assert result.lose.value == pytest.approx(1.5 / 4)
    assert result.win_rate.value == pytest.approx(0.5)
    # Chosen: A, B, B, B, B of five decided answers.
    assert result.first.value == pytest.approx(1 / 5)
    # Agreement on p and r of p, q, r; kappa: p_o 2/3, shares (2/3, 1/3, 0) and (1/3, 1/3, 1/3).
    assert result.raters.items == 3
    assert result.raters.share.value == pytest.approx(2 / 3)
    assert result.raters.kappa.value == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    # n = 6, n_c = (3, 2, 1): unlike pairs 2, by chance 30 - 6 - 2.
    assert result.raters.alpha.value == pytest.approx(1 - 5 * 2 / 22)


def test_against_a_judge_by_hand():
    """The raters' majorities are win, tie (one against one), tie, lose."""
    judge = {"p": "win", "q": "win", "r": "tie", "s": None, "unknown": "lose"}
    result = human_result(TWO_RATERS, judge=judge)
    assert result.judge.items == 3
    assert result.judge_missing == 1
    assert result.judge.share.value == pytest.approx(2 / 3)
    # p_e = 1/3 * 2/3 + 2/3 * 1/3
    assert result.judge.kappa.value == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))


def test_the_interval_is_the_bootstraps_by_prompt():
    """200 prompts of one rater, 120 wins: 0.6 with a standard error of 0.0346 around it. Answers
    of a second, identical rater must not make it narrower."""
    ann = [said(f"p{i}", "ann", "win" if i < 120 else "lose") for i in range(200)]
    bob = [said(a.pair, "bob", a.outcome) for a in ann]
    once, twice = human_result(ann), human_result(ann + bob)
    assert once.raters is None
    assert once.win_rate == twice.win_rate
    assert once.win_rate.low == pytest.approx(0.6 - 1.96 * 0.0346, abs=0.01)
    assert once.win_rate.high == pytest.approx(0.6 + 1.96 * 0.0346, abs=0.01)
    assert twice.raters.share.value == twice.raters.kappa.value == twice.raters.alpha.value == 1


def test_pairs_of_one_prompt_are_drawn_together():
    """Four copies of each of 50 prompts: the interval of 50 prompts, not of 200 pairs."""
    of_prompts = [said(f"p{i}", "ann", "win" if i < 30 else "lose") for i in range(50)]
    of_pairs = [
        said(f"{a.pair}-{copy}", "ann", a.outcome, prompt=a.pair)
        for a in of_prompts
        for copy in range(4)
    ]
    assert human_result(of_pairs).win_rate == human_result(of_prompts).win_rate


def test_majority():
    import numpy as np

    assert majority(np.array([2.0, 1, 0])) == "win"
    assert majority(np.array([1.0, 0, 1])) == "tie"
    assert majority(np.array([0.0, 0, 1])) == "lose"


def test_three_raters_have_no_kappa():
    sources = [{"p": "win"}, {"p": "win", "q": None}, {"p": "tie", "q": "win"}]
    found = agreement(sources, {"p": "p", "q": "q"})
    assert (found.items, found.kappa) == (1, None)
    assert found.share.value == pytest.approx(1 / 3)


def test_in_words():
    sentences = list(human_sentences(human_result(TWO_RATERS, judge={"p": "win", "q": None})))
    assert sentences[0] == "7 answers of 2 raters to 4 items; 1 are missing."
    assert sentences[1].startswith("Ours wins 38 % [")
    assert "no clear difference" in sentences[2]
    assert "too few to trust" in sentences[3]
    assert sentences[-2].startswith("Raters: agree on 67 % [")
    assert "3 items; Cohen's kappa 0.50 [" in sentences[-2]
    assert sentences[-1] == (
        "Raters' majority and the judge: agree on 100 % of 1 item; 3 without a verdict; alpha is "
        "not defined: all answers are the same."
    )
    leaning = [said(f"p{i}", "ann", "win" if i % 2 else "lose", "AB"[i % 2 - 1]) for i in range(80)]
    text = " ".join(human_sentences(human_result(leaning)))
    assert "80 answers of 1 rater to 80 items." in text
    assert "Raters lean to the first response: A was chosen in 100 % [100, 100]" in text


def test_verdicts(tmp_path):
    """Those on the sheet's own responses; others to the same prompt are other verdicts."""
    path = tmp_path / "v.jsonl"
    sides = {"ours": "left", "theirs": "right"}
    rows = [
        {"prompt": "the p", **sides, "outcome": "win"},
        {"prompt": "the q", **sides, "outcome": None},
        {"prompt": "the r", "ours": "left", "theirs": "another", "outcome": "lose"},
    ]
    write_jsonl(path, rows)
    key = Key({pair_id(pair): pair for pair in KEY.pairs.values()}, {})
    assert list(read_verdicts(path, key).values()) == ["win", None]
    for rows, message in (
        (
            [{"prompt": "a", **sides, "outcome": "won"}],
            "v.jsonl:1: the outcome 'won' is not one of",
        ),
        ([{"prompt": "a", "ours": "x", "outcome": "win"}], "v.jsonl:1: column 'theirs' is missing"),
        ([{"prompt": "a", **sides, "outcome": "win"}], "no verdict on the sheet's pairs"),
        ([{"prompt": "the p", **sides}], "no verdict on the sheet's pairs"),
    ):
        write_jsonl(path, rows)
        with pytest.raises(UserError, match=message):
            read_verdicts(path, key)
