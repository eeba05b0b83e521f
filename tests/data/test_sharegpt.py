"""ShareGPT's conversations as demonstrations and prompts."""

import json

import datasets
import pytest

from shiftrm.data.formats.sharegpt import conversation
from shiftrm.data.named import load
from shiftrm.errors import UserError
from tests.data.public_schemas import sharegpt_row, write_sharegpt


def said(row, **options):
    """The messages as "u:text a:text", or the reason."""
    outcome = conversation(row, "f:1", **options)
    if isinstance(outcome, str):
        return outcome
    return [(item["role"][0], item["content"]) for item in outcome["messages"]]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("human", " hi\n"), ("gpt", "ho")], [("u", "hi"), ("a", "ho")]),
        (
            [("system", "be brief"), ("user", "a"), ("chatgpt", "b")],
            [("s", "be brief"), ("u", "a"), ("a", "b")],
        ),
        # What follows the last answer goes; empty answers at the end, too.
        (
            [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", " ")],
            [("u", "a"), ("a", "b")],
        ),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], [("u", "a\n\nb"), ("a", "c")]),
        ([("human", "\u200fלמה 👩‍🍳"), ("gpt", "خبز")], [("u", "\u200fלמה 👩‍🍳"), ("a", "خبز")]),
        ([("gpt", "a"), ("human", "b"), ("gpt", "c")], "begins_with_assistant"),
        ([("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "c")], "empty_turn"),
        ([("human", "a"), ("system", "b"), ("gpt", "c")], "system_inside"),
        ([("human", "a")], "no_answer"),
        ([("human", "a"), ("gpt", None)], "no_answer"),
        ([("tool", "a"), ("gpt", "b")], "unknown_speaker"),
        ([], "no_messages"),
    ],
)
def test_conversations(turns, expected):
    assert said(sharegpt_row(*turns)) == expected


ASKED = [("u", "a"), ("a", "b")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "be brief\n"}, [("s", "be brief"), *ASKED]),
        ({"system_prompt": "be brief"}, [("s", "be brief"), *ASKED]),
        ({"system": "", "system_prompt": None}, ASKED),
        (
            {"system": "x", **sharegpt_row(("system", "x "), ("human", "a"), ("gpt", "b"))},
            [("s", "x"), *ASKED],
        ),
        (
            {"system": "x", **sharegpt_row(("system", "y"), ("human", "a"), ("gpt", "b"))},
            [("s", "x\n\ny"), *ASKED],
        ),
        ({"system": "x", **sharegpt_row(("human", "a"))}, "no_answer"),
        ({"system": "x", **sharegpt_row(("gpt", "a"), ("gpt", "b"))}, "begins_with_assistant"),
    ],
)
def test_the_system_field_is_the_first_message(row, expected):
    assert said({**sharegpt_row(("human", "a"), ("gpt", "b")), **row}) == expected


def test_turns_with_role_and_content():
    turns = [
        {"role": "User", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ]
    for column in ("conversations", "conversation", "messages"):
        assert said({column: turns}) == ASKED
    assert said({"conversations": [turns[0], {"from": "gpt", "value": "b"}]}) == ASKED


def test_tools_stay_with_their_conversation():
    row = sharegpt_row(("human", "a"), ("gpt", "b"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert conversation({**row, "tools": tools}, "f:1")["tools"] == tools
    assert "tools" not in conversation({**row, "tools": "[]"}, "f:1")


def test_odd_rows_are_dropped_and_counted(tmp_path):
    good = {**sharegpt_row(("human", "a"), ("gpt", "b")), "system": "s"}
    odd = [
        {"conversations": None},
        {"id": "no turns"},
        {"conversations": [{"from": "human", "value": 3}]},
        {**good, "system": 7},
        {**good, "tools": "{"},
        {"conversations": [{"role": "user", "content": [{"type": "image"}]}]},
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps([*odd, good]))
    loaded = load("sharegpt", path, kind="demonstrations")
    assert loaded.counts() == {"broken_row": 6}
    assert loaded.rows[0]["messages"][0] == {"role": "system", "content": "s"}
    prompts = load("sharegpt", path, kind="prompts")
    assert prompts.rows == [{"prompt": loaded.rows[0]["messages"][:2]}]
    assert "row 3: conversations, turn 1 is" in loaded.dropped[2]["error"]
    path.write_text(json.dumps(odd))
    with pytest.raises(UserError, match=r"row 1: column 'conversations' is None; expected a list"):
        load("sharegpt", path, kind="demonstrations")


def test_an_answer_at_the_beginning_may_be_cut_off():
    row = sharegpt_row(("gpt", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    assert said(row, beginning="cut") == [("u", "c"), ("a", "d")]
    assert said(sharegpt_row(("gpt", "a")), beginning="cut") == "no_answer"
    row = {**sharegpt_row(("gpt", "b"), ("human", "c"), ("gpt", "d")), "system": "s"}
    assert said(row, beginning="cut") == [("s", "s"), ("u", "c"), ("a", "d")]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ("hello", "f:1: column 'conversations' is 'hello'; expected a list"),
        (["hello"], "f:1: conversations, turn 1 is 'hello'; expected an object with 'from'"),
        ([{"from": "human", "value": 3}], "turn 1 is .*; expected an object with 'from'"),
        ([{"value": "x"}], "turn 1 is"),
    ],
)
def test_wrong_rows_are_named(conversations, message):
    with pytest.raises(UserError, match=message):
        conversation({"conversations": conversations}, "f:1")
    with pytest.raises(UserError, match="f:1: column 'conversations' is missing"):
        conversation({"items": []}, "f:1")


def test_the_file_as_it_is_published(tmp_path):
    path = write_sharegpt(tmp_path / "x.json", 6)
    demonstrations = load("sharegpt", path, kind="demonstrations").rows
    prompts = load("sharegpt", path, kind="prompts").rows
    assert (len(demonstrations), len(prompts)) == (6, 6)
    for row, prompt in zip(demonstrations, prompts, strict=True):
        assert prompt["prompt"] == row["messages"][:1]
    with pytest.raises(UserError, match=r"x\.json: is local, so file=y has no effect"):
        load("sharegpt", path, kind="prompts", file="y")
    path.write_text(path.read_text()[:-30], encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json:1: not valid JSON at column"):
        load("sharegpt", path, kind="prompts")
    path.write_bytes(json.dumps([sharegpt_row(("human", "x"))]).encode().replace(b"x", b"\xe9"))
    with pytest.raises(UserError, match=r"x\.json:1: not valid UTF-8"):
        load("sharegpt", path, kind="prompts")


def test_the_hubs_file(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, data_files):
        asked.append(data_files)
        return [sharegpt_row(("human", "a"), ("gpt", "b"))]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = "anon8231489123/ShareGPT_Vicuna_unfiltered"
    load("sharegpt", name, kind="prompts")
    load("sharegpt", "someone/else", kind="prompts", file="mine.json")
    assert asked == ["ShareGPT_V3_unfiltered_cleaned_split.json", "mine.json"]
