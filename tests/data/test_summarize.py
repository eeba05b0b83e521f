"""OpenAI's comparisons, TL;DR posts and their mirrors."""

import datasets
import pytest

from shiftrm.data.formats.summarize import comparison, post
from shiftrm.data.named import load
from shiftrm.errors import UserError
from tests.data.public_schemas import (
    comparison_row,
    post_row,
    write_comparisons,
    write_posts,
    write_rows,
)

PROMPT = (
    "SUBREDDIT: r/AskReddit\n\nTITLE: Cat and bread\n\n"
    "POST: My cat eats bread. What to do?\n\nTL;DR:"
)


def test_choice_says_which_summary_is_better():
    row = comparison(comparison_row(), "f:1")
    assert row == {
        "prompt": PROMPT,
        "chosen": " My cat eats bread, what to do?",
        "rejected": " Cat.",
    }
    assert comparison(comparison_row(choice=0), "f:1")["chosen"] == " Cat."


def _texts(*texts):
    return [{"text": text, "policy": "p", "note": ""} for text in texts]


def _info(**changes):
    return comparison_row()["info"] | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"summaries": _texts(" a", "a ")}, "equal_sides"),
        ({"summaries": _texts(" ", "a")}, "empty_response"),
        ({"info": _info(post=" \n")}, "empty_prompt"),
        ({"info": _info(post=None, article="A storm.", site="cnn")}, "news_article"),
    ],
)
def test_dropped_comparisons_have_a_reason(changes, reason):
    assert comparison(comparison_row(**changes), "f:1") == reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": 2}, "f:1: column 'choice' is 2; expected 0 or 1"),
        ({"choice": True}, "f:1: column 'choice' is True"),
        ({"summaries": _texts("a")}, "expected two summaries"),
        ({"summaries": [{"policy": "p"}] * 2}, "f:1: column 'text' is missing"),
        ({"info": "x"}, "f:1: column 'info' holds 'x'; expected an object"),
        ({"info": _info(title=3)}, "f:1: column 'title' is 3; expected text"),
    ],
)
def test_wrong_comparisons_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        comparison(comparison_row(**changes), "f:1")


def test_summaries_as_an_object_of_lists():
    row = comparison_row(summaries={"text": ["a", "b"], "policy": ["x", "y"]}, choice=1)
    assert comparison(row, "f:1")["chosen"] == " b"


def test_emoji_and_right_to_left_text_stay():
    row = comparison_row(info=_info(post="\u200fלמה? 🍞"), summaries=_texts("👩‍🍳", "خبز\u200e"))
    made = comparison(row, "f:1")
    assert "POST: \u200fלמה? 🍞\n" in made["prompt"]
    assert (made["chosen"], made["rejected"]) == (" خبز\u200e", " 👩‍🍳")


@pytest.mark.parametrize(
    ("prompt", "chosen", "expected"),
    [
        # trl-lib/tldr-preference, and CarperAI's, whose responses begin with the cue.
        ("POST: x\n\nTL;DR:", " good", ("POST: x\n\nTL;DR:", " good", " bad")),
        ("POST: x\n", "TL;DR: good", ("POST: x\n\nTL;DR:", " good", " bad")),
        ("Summarise: x\n", "good", ("Summarise: x\n", " good", " bad")),
    ],
)
def test_mirrors(prompt, chosen, expected):
    rejected = chosen.replace("good", "bad")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    made = comparison(row, "f:1")
    assert (made["prompt"], made["chosen"], made["rejected"]) == expected
    assert comparison(row | {"prompt": " "}, "f:1") == "empty_prompt"
    assert (
        comparison(row | {"chosen": "TL;DR: ", "rejected": "TL;DR: x"}, "f:1") == "empty_response"
    )


def test_posts():
    made = {"prompt": PROMPT, "completion": " My cat eats bread, what to do?"}
    assert post(post_row(), "f:1") == made
    assert post({"prompt": PROMPT, "completion": made["completion"]}, "f:1") == made
    assert post({"prompt": f"{PROMPT} ", "label": made["completion"].strip()}, "f:1") == made
    assert post(post_row(summary=""), "f:1") == "empty_response"
    with pytest.raises(UserError, match="f:1: column 'summary' is missing"):
        post({k: v for k, v in post_row().items() if k != "summary"}, "f:1")


def test_rows_of_another_split_are_counted(tmp_path):
    path = write_comparisons(tmp_path / "train.jsonl", 5)
    rows = [comparison_row(split="valid1"), comparison_row(split="valid2", choice=0)]
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(write_rows(tmp_path / "more.jsonl", rows).read_text())
    loaded = load("summarize", path, kind="pairs")
    assert (len(loaded.rows), loaded.counts()) == (5, {"other_split": 2})
    loaded = load("summarize", path, kind="demonstrations", split="validation")
    assert (len(loaded.rows), loaded.counts()) == (2, {"other_split": 5})
    assert set(loaded.rows[0]) == {"prompt", "completion"}


def test_the_same_verdict_twice_is_one_row(tmp_path):
    rows = [comparison_row(), comparison_row(worker="w2"), comparison_row(worker="w3", choice=0)]
    loaded = load("summarize", write_rows(tmp_path / "x.jsonl", rows), kind="pairs")
    assert (len(loaded.rows), loaded.counts()) == (2, {"duplicate": 1})


def test_kinds_of_posts(tmp_path):
    path = write_posts(tmp_path / "tldr.jsonl", 4)
    demonstrations = load("tldr", path, kind="demonstrations").rows
    prompts = load("tldr", path, kind="prompts").rows
    assert [row["prompt"] for row in prompts] == [row["prompt"] for row in demonstrations]
    with pytest.raises(UserError, match="tldr: gives no 'pairs'; it gives demonstrations, prompts"):
        load("tldr", path, kind="pairs")


def test_data_sets_that_load_by_a_script_are_read_from_the_hubs_own_copy(monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split, **rest):
        asked.append((name, config, split, rest))
        if not rest:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return [comparison_row()]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = "openai/summarize_from_feedback"
    loaded = load("summarize", f"{name}:comparisons", kind="pairs")
    assert len(loaded.rows) == 1
    copy = {"revision": "refs/convert/parquet", "data_dir": "comparisons"}
    assert asked == [(name, "comparisons", "train", {}), (name, None, "train", copy)]
