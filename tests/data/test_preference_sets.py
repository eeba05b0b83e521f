"""TRL's columns in all their shapes, and UltraFeedback's two schemas."""

import datasets
import pytest

from shiftrm.data.formats.preference import demonstration, preference
from shiftrm.data.formats.ultrafeedback import rated_completions
from shiftrm.data.loaded import collect
from shiftrm.data.named import load
from shiftrm.errors import UserError
from tests.data.public_schemas import (
    assistant,
    binarized_row,
    ultrafeedback_row,
    user,
    write_binarized,
    write_rows,
    write_ultrafeedback,
)

PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Explicit prompts, text and messages; a prompt of messages with text responses.
        ({"prompt": "q ", "chosen": " a", "rejected": " b"}, None),
        (PAIR, None),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, PAIR),
        # The prompt in both sides; there, and beside them as messages or as text.
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, PAIR),
        (
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            PAIR,
        ),
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            PAIR,
        ),
        # Text beside answers alone.
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, PAIR),
        # Columns that training reads stay; others do not.
        (
            {**PAIR, "margin": 0.5, "chosen_finished": False, "rejected_finished": True, "id": 3},
            {**PAIR, "margin": 0.5, "chosen_finished": False, "rejected_finished": True},
        ),
        ({**PAIR, "rejected": PAIR["chosen"]}, "equal_sides"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty_response"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({**PAIR, "chosen": []}, "empty_response"),
        ({**PAIR, "prompt": ""}, "no_shared_prompt"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("x"), assistant("b")]},
            "no_shared_prompt",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no_shared_prompt"),
        ({"chosen": [user("q")], "rejected": [user("q"), assistant("b")]}, "ends_with_human"),
        ({**PAIR, "score_chosen": 4.0, "score_rejected": 4}, "equal_ratings"),
        ({**PAIR, "score_chosen": 3.0, "score_rejected": 4.0}, "rating_against_choice"),
        ({**PAIR, "score_chosen": 4.5, "score_rejected": 4.0}, PAIR),
        ({**PAIR, "score_chosen": None, "score_rejected": 4.0}, PAIR),
    ],
)
def test_rows_in_trls_columns(row, expected):
    assert preference(row, "f:1") == (row if expected is None else expected)


def test_the_prompt_found_is_the_one_that_trl_finds():
    from trl import extract_prompt

    row = binarized_row("q", "a", "b")
    ours = preference(row, "f:1")
    theirs = extract_prompt({c: row[c] for c in ("chosen", "rejected")})
    assert {name: list(map(dict, theirs[name])) for name in theirs} == ours


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, "f:1: column 'rejected' is missing"),
        ({"chosen": "a", "rejected": "b"}, "f:1: column 'prompt' is missing"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "column 'chosen' holds int"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt' holds int"),
        ({**PAIR, "rejected": "b"}, "one side is text and the other is messages"),
        ({**PAIR, "score_chosen": "4", "score_rejected": 4}, "'score_chosen' is '4'; expected a"),
    ],
)
def test_wrong_rows_are_named(row, message):
    with pytest.raises(UserError, match=message):
        preference(row, "f:1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": " a", "id": 1}, {"prompt": "q", "completion": " a"}),
        ({"prompt": "q", "completion": ""}, "empty_response"),
        ({"prompt": None, "completion": "a"}, "empty_prompt"),
        ({"messages": [user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}),
        ({"messages": [user("q")]}, "ends_with_human"),
        ({"messages": [user("q"), assistant(" ")]}, "empty_response"),
        ({"messages": [assistant("a")]}, "begins_with_assistant"),
        ({**PAIR, "margin": 1.0}, {"prompt": [user("q")], "completion": [assistant("a")]}),
    ],
)
def test_demonstrations(row, expected):
    outcome = demonstration(row, "f:1")
    assert outcome == expected


def test_what_is_no_demonstration():
    with pytest.raises(UserError, match="f:1: no demonstration; expected 'messages', 'prompt' and"):
        demonstration({"text": "x"}, "f:1")


def test_messages_with_tools_stay_as_they_are():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "3", "name": "f"}
    row = {"messages": [user("q"), call, tool, assistant("3")]}
    assert demonstration(row, "f:1") == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_prompts_of_any_columns(tmp_path, row):
    path = write_rows(tmp_path / "x.jsonl", [row])
    assert load("preference", path, kind="prompts").rows == [{"prompt": "q"}]


def test_prompts_of_messages_and_of_equal_ratings(tmp_path):
    rows = [
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        binarized_row("q", "a", "b", scores=(4.0, 4.0)),
        {"prompt": ""},
    ]
    loaded = load("preference", write_rows(tmp_path / "x.jsonl", rows), kind="prompts")
    assert [len(row["prompt"]) for row in loaded.rows] == [3, 1]
    assert loaded.counts() == {"empty_prompt": 1}


def test_binarized(tmp_path):
    path = write_binarized(tmp_path / "x.jsonl", 5)
    loaded = load("ultrafeedback", path, kind="pairs")
    assert (len(loaded.rows), loaded.dropped) == (5, [])
    assert set(loaded.rows[0]) == {"prompt", "chosen", "rejected"}
    shown = load("ultrafeedback", path, kind="demonstrations").rows
    assert shown[0]["messages"] == [*loaded.rows[0]["prompt"], *loaded.rows[0]["chosen"]]


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("HuggingFaceH4/ultrafeedback_binarized", "pairs", "train_prefs"),
        ("HuggingFaceH4/ultrafeedback_binarized:default", "demonstrations", "train_sft"),
        ("trl-lib/ultrafeedback_binarized", "pairs", "train"),
    ],
)
def test_default_splits(monkeypatch, name, kind, split):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append(split)
        return [binarized_row("q", "a", "b")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("ultrafeedback", name, kind=kind)
    load("ultrafeedback", name, kind=kind, split="other")
    assert asked == [split, "other"]


# -- openbmb's completions -------------------------------------------------------------------


def rated(*completions, pairs="best_random", seed=0):
    row = ultrafeedback_row("q", *completions)
    loaded = collect(rated_completions(row, "f:1", pairs=pairs, seed=seed))
    found = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in loaded.rows]
    return found, loaded.counts()


FOUR = (("b", 3.0), ("a", 9.0), ("d", 1.0), ("c", 3.0))


def test_which_pairs_are_made():
    assert rated(*FOUR, pairs="best_worst") == ([("a", "d")], {})
    assert rated(*FOUR, pairs="all") == (
        [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")],
        {"equal_ratings": 1},
    )
    drawn = {rated(*FOUR, seed=seed)[0][0] for seed in range(20)}
    assert drawn == {("a", "b"), ("a", "c"), ("a", "d")}
    assert rated(("a", 5), ("b", 5), ("c", 1)) == ([("a", "c")], {}), "only lower ones are drawn"


@pytest.mark.parametrize(
    ("completions", "dropped"),
    [
        ([("a", 5.0), ("b", 5.0)], {"equal_ratings": 1}),
        ([("a", 5.0)], {"no_other_completion": 1}),
        ([("a", 5.0), ("b", "N/A")], {"no_rating": 1, "no_other_completion": 1}),
        ([("a", 5.0), ("b", None)], {"no_rating": 1, "no_other_completion": 1}),
        ([("a", 5.0), ("b", float("nan"))], {"no_rating": 1, "no_other_completion": 1}),
        ([("a", 5.0), (" ", 1.0)], {"empty_response": 1, "no_other_completion": 1}),
        ([("a", 5.0), ("a ", 1.0)], {"equal_sides": 1}),
        ([], {"no_other_completion": 1}),
    ],
)
def test_completions_that_make_no_pair_are_counted(completions, dropped):
    assert rated(*completions) == ([], dropped)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"overall_score": 10.0, "fine-grained_score": 1.0}, "contradicting_ratings"),
        ({"overall_score": "10", "fine-grained_score": "1.25"}, "contradicting_ratings"),
        ({"overall_score": 1.0, "fine-grained_score": 5.0}, "contradicting_ratings"),
        (
            {
                "overall_score": 10,
                "fine-grained_score": None,
                "annotations": {"honesty": {"Rating": "1"}, "helpfulness": {"Rating": "2"}},
            },
            "contradicting_ratings",
        ),
        ({"overall_score": 85.0}, "rating_out_of_range"),
        ({"overall_score": 0}, "rating_out_of_range"),
        ({"overall_score": float("inf")}, "rating_out_of_range"),
        ({"overall_score": 10.0, "fine-grained_score": "N/A"}, None),
        ({"overall_score": 10.0, "fine-grained_score": 4.25}, None),
        ({"overall_score": 6.0, "fine-grained_score": 2.5}, None),
    ],
)
def test_ratings_that_contradict_each_other_decide_nothing(changes, reason):
    row = ultrafeedback_row("q", ("a", 5.0), ("b", 3.0), ("odd", 4.0))
    row["completions"][2] |= changes
    for how in ("best_worst", "all"):
        loaded = collect(rated_completions(row, "f:1", pairs=how))
        said = {r[side][0]["content"] for r in loaded.rows for side in ("chosen", "rejected")}
        assert loaded.counts() == ({} if reason is None else {reason: 1})
        assert ("odd" in said) is (reason is None)
        assert {"a", "b"} & said


def test_ratings_may_be_text():
    assert rated(("a", "5"), ("b", "7.5"))[0] == [("b", "a")]


def test_kinds_of_completions(tmp_path):
    path = write_ultrafeedback(tmp_path / "x.jsonl", 4)
    loaded = load("ultrafeedback", path, kind="pairs", pairs="best_worst")
    shown = load("ultrafeedback", path, kind="demonstrations").rows
    prompts = load("ultrafeedback", path, kind="prompts").rows
    for row, demonstrated, prompt in zip(loaded.rows, shown, prompts, strict=True):
        assert demonstrated == {"prompt": row["prompt"], "completion": row["chosen"]}
        assert prompt == {"prompt": row["prompt"]}
    seeds = [load("ultrafeedback", path, kind="pairs", seed=seed).rows for seed in (0, 0, 1, 2, 3)]
    assert seeds[0] == seeds[1]
    assert len({str(rows) for rows in seeds}) > 1
    with pytest.raises(UserError, match="'worst'; give 'best_random' or 'best_worst' or 'all'"):
        load("ultrafeedback", path, kind="pairs", pairs="worst")


def test_wrong_completions_are_named():
    for completions, message in (
        ("x", "f:1: column 'completions' is not a list"),
        (["x"], "f:1, completion 1: is 'x'; expected an object"),
        ([{"overall_score": 1}], "f:1, completion 1: column 'response' is missing"),
    ):
        row = ultrafeedback_row("q", completions=completions)
        loaded = collect(rated_completions(row, "f:1", pairs="all"))
        assert loaded.dropped[0]["reason"] == "broken_row"
        assert loaded.dropped[0]["error"].startswith(message)
    empty = rated_completions(ultrafeedback_row(" "), "f:1", pairs="all")
    assert collect(empty).counts() == {"empty_prompt": 1}
