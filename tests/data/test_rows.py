"""Rows of pairs and groups: what is no text, no number or of another kind is named by its line."""

import json

import pytest

from shiftrm.data.groups import check_group, read_groups
from shiftrm.data.pairs import check_pair, read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl

CHAT = [{"role": "user", "content": "a"}]
OTHER_CHAT = [{"role": "user", "content": "b"}]
TOOL_CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}]
NO_WORDS = [{"role": "assistant", "content": ""}]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]

GOOD_GROUP = {"prompt": "a", "responses": ["x", "y"]}
GOOD_PAIR = {"chosen": "a", "rejected": "b"}

BAD_GROUPS = [
    ({"responses": ["x"]}, "the group has 1 response"),
    ({"responses": "x"}, ".* expected a list"),
    ({"responses": ["x", None]}, "response 2 holds NoneType"),
    ({"prompt": 3}, "column 'prompt' holds int"),
    ({"finished": [True]}, "'finished' has 1 entries for 2 responses"),
    ({"finished": 1}, "column 'finished' must be a list of true and false"),
]
BAD_PAIRS = [
    ({"rejected": "a"}, "chosen and rejected are equal"),
    ({"chosen": "", "rejected": ""}, "both sides of the pair are empty"),
    ({"chosen": ""}, "the response 'chosen' is empty"),
    ({"rejected": " "}, "the response 'rejected' is empty"),
    ({"chosen": NO_WORDS, "rejected": PARTS}, "the response 'chosen' is empty"),
    ({"chosen": 1}, "column 'chosen' holds int"),
    ({"rejected": None}, "column 'rejected' holds NoneType"),
    ({"prompt": {}}, "column 'prompt'"),
    ({"rejected": CHAT}, "chosen is text but rejected is a list of messages"),
    (
        {"chosen": CHAT, "rejected": [{"content": "b"}]},
        ".*'rejected', message 1 has no 'role'",
    ),
    ({"chosen": [{"role": "user"}], "rejected": CHAT}, ".*'chosen', message 1 has no 'content'"),
    (
        {"chosen": CHAT, "rejected": OTHER_CHAT},
        "column 'chosen' is a list of messages, but text at .*f:1",
    ),
    ({"margin": 1}, "column 'margin' is given, but missing at .*f:1"),
    ({"margin": None}, "column 'margin' is given, but missing at .*f:1"),
    ({"margin": float("nan")}, ".*'margin' is nan"),
    ({"chosen_finished": "no"}, "column 'chosen_finished' is 'no'; expected true or false"),
]


@pytest.mark.parametrize(
    ("reader", "good", "changes", "message"),
    [
        *((read_groups, GOOD_GROUP, *case) for case in BAD_GROUPS),
        *((read_pairs, GOOD_PAIR, *case) for case in BAD_PAIRS),
    ],
)
def test_bad_rows_are_named(tmp_path, reader, good, changes, message):
    (tmp_path / "f").write_text(f"{json.dumps(good)}\n{json.dumps(good | changes)}\n")
    with pytest.raises(UserError, match=f"f:2: {message}"):
        reader(tmp_path / "f")


def test_missing_columns_are_named(tmp_path):
    for reader, row, column in (
        (read_groups, {"prompt": "a"}, "responses"),
        (read_pairs, {"chosen": "a"}, "rejected"),
    ):
        write_jsonl(tmp_path / "f", [row])
        with pytest.raises(UserError, match=f"f:1: column '{column}' is missing"):
            reader(tmp_path / "f")


def test_the_prompt_may_be_missing_on_some_rows_but_not_change_its_kind(tmp_path):
    rows = [
        {"chosen": "a", "rejected": "b"},
        {"prompt": None, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    path = write_jsonl(tmp_path / "f", rows)
    assert read_pairs(path) == rows
    write_jsonl(path, [*rows, {"prompt": CHAT, "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"f:4: column 'prompt' is a list .* but text at .*f:3"):
        read_pairs(path)


def test_good_rows_are_left_as_they_are():
    for row in (
        {"chosen": CHAT, "rejected": TOOL_CALL, "margin": 1},
        {"prompt": [], "chosen": "a", "rejected": "b", "chosen_finished": False},
        {"chosen": "a", "rejected": "b", "margin": None, "weight": None, "chosen_finished": None},
    ):
        assert check_pair(row, "here") is row
    group = {"prompt": CHAT, "responses": ["", "b", CHAT], "finished": [True, False, True]}
    assert check_group(group, "here") is group
