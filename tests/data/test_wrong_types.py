"""Rows with a value of a wrong type anywhere are dropped or refused by name, in every format."""

import copy
import json

import pytest

from shiftrm.data.named import FORMATS, load
from shiftrm.errors import UserError

SPOKEN = {"role": "user", "content": "why"}
SAID = {"role": "assistant", "content": "so", "tool_calls": None}
OTHER = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
ASPECT = {"helpfulness": {"Rating": "4"}}
GOOD = {
    "hh_rlhf": [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    ],
    "pku": [
        {
            "prompt": "a",
            "response_0": "b",
            "response_1": "c",
            "better_response_id": 0,
            "safer_response_id": 1,
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        }
    ],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1.5},
        {"prompt": [SPOKEN], "chosen": [SAID], "rejected": [OTHER], "margin": 1},
        {"chosen": [SPOKEN, SAID], "rejected": [SPOKEN, OTHER]},
        {"messages": [SPOKEN, SAID]},
        {"prompt": [SPOKEN], "completion": [SAID]},
        {"prompt": "a"},
    ],
    "summarize": [
        {
            "info": {"subreddit": "s", "title": "t", "post": "p"},
            "summaries": [{"text": "a"}, {"text": "b"}],
            "choice": 0,
        },
        {"prompt": "POST: a", "chosen": "TL;DR: b", "rejected": "TL;DR: c"},
    ],
    "tldr": [
        {"subreddit": "s", "title": "t", "post": "p", "summary": "u"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "label": "b"},
    ],
    "ultrafeedback": [
        {
            "instruction": "i",
            "completions": [
                {"response": "a", "overall_score": 9, "annotations": ASPECT},
                {"response": "b", "overall_score": "3", "fine-grained_score": 2.0},
            ],
        },
        {"prompt": "a", "chosen": [SPOKEN, SAID], "rejected": [SPOKEN, OTHER], "score_chosen": 1},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [SPOKEN, SAID]},
    ],
    "oasst1": [
        {
            "message_id": "1",
            "parent_id": None,
            "message_tree_id": "1",
            "text": "a",
            "role": "prompter",
            "lang": "en",
            "deleted": False,
            "rank": None,
        },
        {
            "message_tree_id": "1",
            "prompt": {
                "message_id": "1",
                "text": "a",
                "role": "prompter",
                "lang": "en",
                "replies": [
                    {
                        "message_id": str(n),
                        "text": "b",
                        "role": "assistant",
                        "lang": "en",
                        "rank": n,
                        "deleted": False,
                        "replies": [],
                    }
                    for n in (2, 3)
                ],
            },
        },
    ],
}
OPTIONS = {"pku": {"preference": "helpful"}}
ODD = (None, "x", "", 1, -1, 10**400, 1e300, True, {}, [], [1], ["x"], [None], [[]], {"x": 1}, [{}])


def paths(value, path=()):
    """Yield the path of every value inside."""
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def with_odd_values(row):
    for path in paths(row):
        for odd in ODD:
            changed = copy.deepcopy(row)
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = odd
            yield changed
        yield {**row, path[0]: [row[path[0]]]}


def test_every_format_has_rows_here():
    assert set(GOOD) == set(FORMATS.names())


@pytest.mark.parametrize("name", GOOD)
def test_a_wrong_type_anywhere_is_dropped_or_named(tmp_path, name):
    path, said = tmp_path / "rows.jsonl", set()
    for row in (odd for good in GOOD[name] for odd in with_odd_values(good)):
        path.write_text(json.dumps(row) + "\n")
        for kind in FORMATS.get(name).kinds:
            try:
                load(name, str(path), kind=kind, **OPTIONS.get(name, {}))
            except UserError as error:
                said.add(str(error))
    assert said
    assert {message for message in said if "rows.jsonl" not in message} == set()
