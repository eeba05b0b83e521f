"""Rows of pairs and groups: what is no text, no number or of another kind is named by its line."""

import pytest

from shiftrm.data.groups import check_group, read_groups
from shiftrm.data.pairs import check_pair, read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl

CHAT = [{"role": "user", "content": "a"}]
TOOL_CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_groups, '{"prompt": "a", "responses": ["x"]}', "f:2: the group has 1 response"),
        (read_groups, '{"prompt": "a"}', "f:2: column 'responses' is missing"),
        (read_groups, '{"prompt": "a", "responses": "x"}', "f:2: .* expected a list"),
        (
            read_groups,
            '{"prompt": "a", "responses": ["x", null]}',
            "f:2: response 2 holds NoneType",
        ),
        (read_groups, '{"prompt": 3, "responses": ["x", "y"]}', "f:2: column 'prompt' holds int"),
        (
            read_groups,
            '{"prompt": "a", "responses": ["x", "y"], "finished": [true]}',
            "f:2: 'finished' has 1 entries for 2 responses",
        ),
        (
            read_groups,
            '{"prompt": "a", "responses": ["x", "y"], "finished": 1}',
            "f:2: column 'finished' must be a list of true and false",
        ),
        (read_pairs, '{"chosen": "a", "rejected": "a"}', "f:2: chosen and rejected are equal"),
        (read_pairs, '{"chosen": "", "rejected": ""}', "f:2: both sides of the pair are empty"),
        (read_pairs, '{"chosen": "", "rejected": "a"}', "f:2: the response 'chosen' is empty"),
        (read_pairs, '{"chosen": "a", "rejected": " "}', "f:2: the response 'rejected' is empty"),
        (
            read_pairs,
            '{"chosen": [{"role": "assistant", "content": ""}], '
            '"rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}',
            "f:2: the response 'chosen' is empty",
        ),
        (read_pairs, '{"chosen": "a"}', "f:2: column 'rejected' is missing"),
        (read_pairs, '{"chosen": 1, "rejected": "a"}', "f:2: column 'chosen' holds int"),
        (read_pairs, '{"chosen": "a", "rejected": null}', "f:2: column 'rejected' holds NoneType"),
        (read_pairs, '{"prompt": {}, "chosen": "a", "rejected": "b"}', "f:2: column 'prompt'"),
        (
            read_pairs,
            '{"chosen": "a", "rejected": [{"role": "user", "content": "b"}]}',
            "f:2: chosen is text but rejected is a list of messages",
        ),
        (
            read_pairs,
            '{"chosen": [{"role": "user", "content": "b"}], "rejected": [{"content": "b"}]}',
            "f:2: column 'rejected', message 1 has no 'role'",
        ),
        (
            read_pairs,
            '{"chosen": [{"role": "user"}], "rejected": [{"role": "user", "content": "b"}]}',
            "f:2: column 'chosen', message 1 has no 'content'",
        ),
        (
            read_pairs,
            '{"chosen": [{"role": "user", "content": "a"}], '
            '"rejected": [{"role": "user", "content": "b"}]}',
            "f:2: column 'chosen' is a list of messages, but text at .*f:1",
        ),
        (
            read_pairs,
            '{"chosen": "a", "rejected": "b", "margin": 1}',
            "f:2: column 'margin' is given, but missing at .*f:1",
        ),
        (read_pairs, '{"chosen": "a", "rejected": "b", "margin": null}', "f:2: .*'margin' is None"),
        (read_pairs, '{"chosen": "a", "rejected": "b", "margin": NaN}', "f:2: .*'margin' is nan"),
        (
            read_pairs,
            '{"chosen": "a", "rejected": "b", "chosen_finished": "no"}',
            "f:2: column 'chosen_finished' is 'no'; expected true or false",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, reader, row, message):
    good = {
        read_groups: '{"prompt": "a", "responses": ["x", "y"]}',
        read_pairs: '{"chosen": "a", "rejected": "b"}',
    }[reader]
    (tmp_path / "f").write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match=message):
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
    ):
        assert check_pair(row, "here") is row
    group = {"prompt": CHAT, "responses": ["", "b", CHAT], "finished": [True, False, True]}
    assert check_group(group, "here") is group
