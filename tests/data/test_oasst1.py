"""OASST1's trees: ranked siblings, and what makes a message unusable."""

import json
import random
import re
from collections import Counter

import pytest

from shiftrm.data.formats.oasst1 import oasst_demonstrations, oasst_pairs, oasst_prompts, read_posts
from shiftrm.data.loaded import BROKEN, collect
from shiftrm.data.named import load
from shiftrm.data.splits import split_by_prompt
from shiftrm.errors import UserError
from tests.data.public_schemas import oasst_row, write_oasst1, write_rows

NO_ID = "column 'message_id' is missing"


def posts_of(*rows):
    return read_posts([(f"f:{number}", row) for number, row in enumerate(rows, start=1)])[0]


def answers(*ranks, parent="r", **changes):
    return [
        oasst_row(f"a{i}", parent, tree="r", rank=rank, **changes) for i, rank in enumerate(ranks)
    ]


def pairs_of(*rows, **options):
    loaded = collect(oasst_pairs(posts_of(*rows), **options))
    found = [
        (r["chosen"][0]["content"][-2:], r["rejected"][0]["content"][-2:]) for r in loaded.rows
    ]
    return found, loaded.counts()


def test_all_pairs_of_ranked_siblings_the_best_first():
    root = oasst_row("r")
    found, dropped = pairs_of(root, *answers(2, 0, 1))
    assert (sorted(found), dropped) == ([("a1", "a0"), ("a1", "a2"), ("a2", "a0")], {})
    assert pairs_of(root, *answers(2, 0, 1), pairs="extremes") == ([("a1", "a0")], {})
    loaded = collect(oasst_pairs(posts_of(root, *answers(1, 0))))
    assert loaded.rows == [
        {
            "prompt": [{"role": "user", "content": "text of r"}],
            "chosen": [{"role": "assistant", "content": "text of a1"}],
            "rejected": [{"role": "assistant", "content": "text of a0"}],
            "tree": "r",
        }
    ]
    assert loaded.places == ["f:3"]


@pytest.mark.parametrize(
    ("rows", "kept", "dropped"),
    [
        (answers(0, 0), 0, {"equal_ranks": 1}),
        (answers(0, 0, 1), 2, {"equal_ranks": 1}),
        (answers(0, None, 1), 1, {"no_rank": 1}),
        (answers(0), 0, {"alone": 1}),
        (answers(0, 1, text="same"), 0, {"equal_sides": 1}),
        ([*answers(0, 1), oasst_row("d", "r", rank=2, deleted=True)], 1, {"deleted": 1}),
        ([*answers(0, 1), oasst_row("d", "r", rank=2, text=" \n")], 1, {"empty_text": 1}),
        ([*answers(0, 1), oasst_row("d", "gone", rank=2)], 1, {"no_parent": 1}),
        ([*answers(0, 1), oasst_row("d", "a0", rank=2)], 1, {"no_parent": 1}),  # answers an answer
    ],
)
def test_what_makes_no_pair_is_counted(rows, kept, dropped):
    found, counts = pairs_of(oasst_row("r"), *rows)
    assert (len(found), counts) == (kept, dropped)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deleted": True}, "deleted_above"),
        ({"text": ""}, "empty_text_above"),
        ({"lang": "de"}, "other_language_above"),
    ],
)
def test_a_message_needs_all_messages_above_it(changes, reason):
    rows = [oasst_row("r", **changes), *answers(0, 1)]
    assert pairs_of(*rows, lang="en") == ([], {reason: 2})


def test_messages_that_are_each_others_parents():
    rows = [
        oasst_row("p", "a", role="prompter"),
        oasst_row("a", "p", rank=0),
        oasst_row("self", "self", rank=1),
    ]
    assert pairs_of(*rows) == ([], {"no_parent": 2})
    rows = [oasst_row("a0", None, role="assistant", rank=0)]
    assert pairs_of(*rows) == ([], {"no_parent": 1})


def test_languages():
    rows = [
        oasst_row("en"),
        *(oasst_row(f"en{i}", "en", rank=i) for i in range(2)),
        oasst_row("he", lang="he", text="\u200fלמה?"),
        *(oasst_row(f"he{i}", "he", lang="he", rank=i, text=f"כי 🍞 {i}") for i in range(2)),
    ]
    for lang, prompts in {"en": 1, "he": 1, "all": 2}.items():
        loaded = collect(oasst_pairs(posts_of(*rows), lang=lang))
        assert len(loaded.rows) == prompts
        assert loaded.counts() == ({} if lang == "all" else {"other_language": 2})
    [row] = collect(oasst_pairs(posts_of(*rows), lang="he")).rows
    assert (row["prompt"][0]["content"], row["chosen"][0]["content"]) == ("\u200fלמה?", "כי 🍞 0")


def test_the_prompt_is_the_dialogue_and_order_does_not_matter(tmp_path):
    path = write_oasst1(tmp_path / "x.jsonl", 3)
    loaded = load("oasst1", path, kind="pairs")
    assert len(loaded.rows) == 6
    assert sorted({len(row["prompt"]) for row in loaded.rows}) == [1, 3]
    deep = next(row for row in loaded.rows if len(row["prompt"]) == 3)
    assert [m["role"] for m in deep["prompt"]] == ["user", "assistant", "user"]
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    path.write_text("".join(lines))
    key = json.dumps
    again = load("oasst1", path, kind="pairs").rows
    assert sorted(map(key, again)) == sorted(map(key, loaded.rows))


def test_nested_trees_give_the_same_rows(tmp_path):
    """The published file of whole trees against the file of messages."""
    path = write_oasst1(tmp_path / "x.jsonl", 3, answers=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    nested = {row["message_id"]: {**row, "replies": []} for row in rows}
    trees = []
    for item in nested.values():
        tree, parent = item.pop("message_tree_id"), item["parent_id"]
        if parent is None:
            trees.append({"message_tree_id": tree, "tree_state": "ready", "prompt": item})
        else:
            nested[parent]["replies"].append(item)
    other = write_rows(tmp_path / "2023-04-12_oasst_ready.trees.jsonl.gz", trees)
    for kind in ("pairs", "prompts", "demonstrations"):
        flat = load("oasst1", path, kind=kind).rows
        assert sorted(map(json.dumps, load("oasst1", other, kind=kind).rows)) == sorted(
            map(json.dumps, flat)
        )


def test_prompts_and_demonstrations():
    rows = [
        oasst_row("r"),
        *answers(1, 0, None),
        oasst_row("q", "a1", tree="r", role="prompter"),
        oasst_row("b", "q", tree="r"),
    ]
    first = collect(oasst_prompts(posts_of(*rows)))
    assert (first.rows, first.counts()) == (
        [{"prompt": [{"role": "user", "content": "text of r"}], "tree": "r"}],
        {"follow_up": 1},
    )
    every = collect(oasst_prompts(posts_of(*rows), turns="all"))
    assert [len(row["prompt"]) for row in every.rows] == [1, 3]
    shown = collect(oasst_demonstrations(posts_of(*rows)))
    # The best of the ranked ones, and the only answer that nobody ranked.
    assert [row["completion"][0]["content"] for row in shown.rows] == ["text of a1", "text of b"]
    assert [len(row["prompt"]) for row in shown.rows] == [1, 3]
    assert shown.counts() == {"not_best": 2}


def test_trees_are_split_whole(tmp_path):
    loaded = load("oasst1", write_oasst1(tmp_path / "x.jsonl", 40), kind="pairs")
    train, evaluation = split_by_prompt(loaded, share=0.3)
    assert not {row["tree"] for row in train.rows} & {row["tree"] for row in evaluation.rows}
    assert set(Counter(row["tree"] for row in evaluation.rows).values()) == {2}


def test_nothing_is_lost(tmp_path):
    """Every answer is in a pair or listed."""
    path = write_oasst1(tmp_path / "x.jsonl", 8, answers=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rng = random.Random(3)
    for row in rows:
        row["deleted"] = rng.random() < 0.1
        if rng.random() < 0.2:
            row["rank"] = None
        if rng.random() < 0.1:
            row["text"] = ""
    write_rows(path, [*rows, rows[1]])
    loaded = load("oasst1", path, kind="pairs")
    used = {side[0]["content"] for r in loaded.rows for side in (r["chosen"], r["rejected"])}
    listed = {row["where"] for row in loaded.dropped}
    for number, row in enumerate(rows, start=1):
        if row["role"] == "assistant":
            assert row["text"] in used or f"{path}:{number}" in listed
    assert loaded.counts()["duplicate_message"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "user"}, "f:1: column 'role' is 'user'; expected prompter or assistant"),
        ({"rank": "0"}, "f:1: column 'rank' is '0'; expected a whole number"),
        ({"parent_id": 3}, "f:1: column 'parent_id' is 3; expected text"),
        ({"text": None}, "f:1: column 'text' is None; expected text"),
    ],
)
def test_wrong_rows_are_named(changes, message):
    for row, said in (
        (oasst_row("r", **changes), message),
        ({"text": "x"}, "f:1: column 'message_id' is missing"),
    ):
        posts, unread = read_posts([("f:1", row), ("f:2", oasst_row("other"))])
        assert list(posts) == ["other"]
        assert unread == [("f:1", BROKEN)]
        assert unread[0][1].message.startswith(said)


def test_wrong_options(tmp_path):
    path = write_oasst1(tmp_path / "x.jsonl", 1)
    with pytest.raises(UserError, match="pairs is 'best'; give 'all' or 'extremes'"):
        load("oasst1", path, kind="pairs", pairs="best")
    with pytest.raises(UserError, match=r"no row is left as pairs of oasst1 \(4 other_language\)"):
        load("oasst1", path, kind="pairs", lang="xx")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (oasst_row("a", rank=float("nan")), "column 'rank' is nan; expected a whole number"),
        (oasst_row("a", rank=float("inf")), "column 'rank' is inf"),
        (oasst_row("a", rank=0.5), "column 'rank' is 0.5"),
        (oasst_row("a", role=["prompter"]), "column 'role' is .'prompter'.; expected prompter"),
        (
            {"message_tree_id": "a", "prompt": oasst_row("a") | {"replies": 5}},
            "column 'message_id' is missing",
        ),
        (
            {"message_tree_id": "a", "prompt": oasst_row("a") | {"replies": [5]}},
            "column 'message_id' is missing",
        ),
    ],
)
def test_values_of_other_types_are_named(row, message):
    _, unread = read_posts([("x:1", row)])
    assert re.match(f"^x:1: {message}", unread[0][1].message)
