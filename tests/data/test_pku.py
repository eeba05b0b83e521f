"""PKU-SafeRLHF: help and harm are two preferences, and one must be chosen."""

import pytest

from shiftrm.data.formats.pku import pku_pair
from shiftrm.data.named import load
from shiftrm.errors import UserError
from tests.data.public_schemas import pku_row, write_pku, write_rows


def test_the_two_preferences_disagree():
    helpful = pku_pair(pku_row(), "f:1", preference="helpful")
    harmless = pku_pair(pku_row(), "f:1", preference="harmless")
    assert helpful["prompt"] == [{"role": "user", "content": "How do I open a lock?"}]
    assert helpful["chosen"] == [{"role": "assistant", "content": "With a pick, like this."}]
    assert harmless["chosen"] == helpful["rejected"]
    assert harmless["rejected"] == helpful["chosen"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": " "}, "empty_prompt"),
        ({"response_0": "\n"}, "empty_response"),
        ({"response_1": " With a pick, like this.\n"}, "equal_sides"),
        ({"safer_response_id": 0}, "label_against_safety"),
    ],
)
def test_dropped_rows_have_a_reason(changes, reason):
    assert pku_pair(pku_row(**changes), "f:1", preference="harmless") == reason


def test_safety_labels_do_not_judge_help():
    assert isinstance(pku_pair(pku_row(), "f:1", preference="helpful"), dict)
    both = pku_row(is_response_0_safe=True)
    assert isinstance(pku_pair(both, "f:1", preference="harmless"), dict)


@pytest.mark.parametrize("value", [2, -1, True, None, "0"])
def test_ids_that_are_none(value):
    with pytest.raises(UserError, match=r"f:1: column 'better_response_id' is .*; expected 0 or 1"):
        pku_pair(pku_row(better_response_id=value), "f:1", preference="helpful")


def test_the_preference_must_be_said(tmp_path):
    path = write_pku(tmp_path / "x.jsonl", 9)
    for kind in ("pairs", "demonstrations"):
        with pytest.raises(UserError, match="preference is not given; give preference=helpful"):
            load("pku", path, kind=kind)
    with pytest.raises(UserError, match="preference is 'safe'; give 'helpful' or 'harmless'"):
        load("pku", path, kind="pairs", preference="safe")
    helpful = load("pku", path, kind="pairs", preference="helpful").rows
    harmless = load("pku", path, kind="pairs", preference="harmless").rows
    assert helpful != harmless
    shown = load("pku", path, kind="demonstrations", preference="harmless").rows
    assert shown == [{"prompt": r["prompt"], "completion": r["chosen"]} for r in harmless]
    prompts = load("pku", path, kind="prompts").rows
    assert prompts == [{"prompt": row["prompt"]} for row in helpful]


def test_other_scripts_stay_byte_for_byte(tmp_path):
    texts = {"prompt": "\u200fמה?", "response_0": "👩‍🍳\ufe0f", "response_1": "خبز\u200e"}
    path = write_rows(tmp_path / "x.jsonl", [pku_row(**texts)])
    [row] = load("pku", path, kind="pairs", preference="helpful").rows
    assert [row[c][0]["content"] for c in ("prompt", "chosen", "rejected")] == list(texts.values())
