"""No prompt on both sides, each row once, and nothing lost on the way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftrm.data.loaded import Loaded, collect
from shiftrm.data.splits import (
    deduplicated,
    held_out,
    limited,
    prompt_of,
    read_rows_with_prompts,
    split_by_prompt,
    unit_of,
    without_evaluated,
)
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl


def loaded_of(rows):
    return collect([(f"f:{number}", row) for number, row in enumerate(rows, start=1)])


def rows_of(*prompts):
    return [
        {"prompt": prompt, "chosen": f"c{i}", "rejected": "r"} for i, prompt in enumerate(prompts)
    ]


ROWS = st.lists(st.integers(0, 30), min_size=1, max_size=60).map(
    lambda numbers: rows_of(*(f"prompt {number}" for number in numbers))
)


@given(ROWS, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_row_is_on_one_side_and_no_prompt_on_both(rows, seed):
    try:
        train, evaluation = split_by_prompt(loaded_of(rows), share=0.4, seed=seed)
    except UserError:
        return
    assert sorted([*train.places, *evaluation.places]) == sorted(loaded_of(rows).places)
    assert not {r["prompt"] for r in train.rows} & {r["prompt"] for r in evaluation.rows}
    # Another order, other neighbours: every prompt stays on its side.
    more = rows[::-1] + rows_of("new one", "another")
    _, again = split_by_prompt(loaded_of(more), share=0.4, seed=seed)
    assert {r["prompt"] for r in evaluation.rows} <= {r["prompt"] for r in again.rows}


def test_the_share_is_about_what_was_asked_for():
    rows = rows_of(*(f"prompt {i}" for i in range(2000)))
    _, evaluation = split_by_prompt(loaded_of(rows), share=0.1)
    assert 150 <= len(evaluation.rows) <= 250
    other = split_by_prompt(loaded_of(rows), share=0.1, seed=1)[1]
    assert other.rows != evaluation.rows
    larger = split_by_prompt(loaded_of(rows), share=0.2)[1]
    assert set(evaluation.places) <= set(larger.places), "a larger share takes more, not others"


def test_trees_stay_whole():
    rows = [{"prompt": f"p{i}", "tree": f"t{i % 40}"} for i in range(400)]
    train, evaluation = split_by_prompt(loaded_of(rows), share=0.3)
    assert not {r["tree"] for r in train.rows} & {r["tree"] for r in evaluation.rows}
    assert unit_of(rows[0]) != unit_of({"prompt": "p0"})


def test_prompts_that_are_evaluated_on_leave_training():
    chat = [{"role": "user", "content": "hello"}]
    rows = [*rows_of("a  b", "c"), {"prompt": chat}, {"messages": [*chat, {"role": "assistant"}]}]
    evaluation = [[{"prompt": "a b\n"}], [{"prompt": chat}]]
    clean = without_evaluated(loaded_of(rows), *evaluation)
    assert [row["prompt"] for row in clean.rows] == ["c"]
    assert clean.dropped == [{"where": f"f:{n}", "reason": "in_evaluation"} for n in (1, 3, 4)]
    # By tree, and by prompt whatever the tree.
    rows = [
        {"prompt": "a", "tree": "1"},
        {"prompt": "b", "tree": "2"},
        {"prompt": "c", "tree": "3"},
    ]
    clean = without_evaluated(loaded_of(rows), [{"prompt": "x", "tree": "1"}, {"prompt": "b"}])
    assert [row["prompt"] for row in clean.rows] == ["c"]


def test_a_dialogue_and_its_continuation_stay_on_one_side():
    """A longer prompt holds the shorter one's answer."""
    system = {"role": "system", "content": "be brief"}
    rows = []
    for number in range(60):
        ask = {"role": "user", "content": f"question {number}"}
        answer = {"role": "assistant", "content": "yes"}
        more = {"role": "user", "content": "and then?"}
        rows += [{"prompt": [ask]}, {"prompt": [ask, answer, more]}]
        rows += [{"messages": [system, ask, answer]}, {"prompt": [system, ask, answer, more]}]
    train, evaluation = split_by_prompt(loaded_of(rows), share=0.3)
    sides = [{unit_of(row) for row in side.rows} for side in (train, evaluation)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 120, "two dialogues a question: with system and without"
    clean = without_evaluated(loaded_of(rows), rows[:1])
    assert [row["where"] for row in clean.dropped] == ["f:1", "f:2"]


def test_exact_duplicates_are_kept_once():
    rows = [*rows_of("a", "a"), {"rejected": "r", "chosen": "c0", "prompt": "a"}]
    loaded = deduplicated(loaded_of(rows))
    assert loaded.rows == rows[:2]
    assert loaded.dropped == [{"where": "f:3", "reason": "duplicate"}]
    assert deduplicated(loaded_of([{"prompt": "a "}, {"prompt": "a"}])).dropped == []


def test_a_limit_draws_by_the_row_and_keeps_the_order():
    rows = rows_of(*(f"prompt {i}" for i in range(50)))
    drawn = limited(loaded_of(rows), limit=10)
    assert drawn.rows == [row for row in rows if row in drawn.rows]
    assert (len(drawn.rows), drawn.counts()) == (10, {"over_limit": 40})
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    again = limited(loaded_of(shuffled), limit=10).rows
    assert sorted(r["prompt"] for r in again) == sorted(r["prompt"] for r in drawn.rows)
    assert limited(loaded_of(rows), limit=10, seed=1).rows != drawn.rows
    assert limited(loaded_of(rows), limit=50).dropped == []
    with pytest.raises(UserError, match="limit is 0; it must be at least 1"):
        limited(loaded_of(rows), limit=0)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(UserError, match="give one between 0 and 1"):
        split_by_prompt(loaded_of(rows_of("a", "b")), share=share)


def test_a_side_without_rows_is_refused():
    with pytest.raises(UserError, match=r"of 1 rows none is left to (train|evaluate) on"):
        split_by_prompt(loaded_of(rows_of("a")), share=0.5)


def test_what_was_dropped_before_stays_listed():
    loaded = loaded_of(rows_of(*(str(i) for i in range(30))))
    loaded.drop("g:1", "equal_sides")
    train, evaluation = split_by_prompt(loaded, share=0.3)
    assert (train.counts(), evaluation.counts()) == ({"equal_sides": 1}, {})
    assert Loaded().counts() == {}


def test_rows_with_prompts(tmp_path):
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "x"}]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert [prompt_of(row) for row in read_rows_with_prompts(str(path))] == ["a", []]
    write_jsonl(path, [{"chosen": "a"}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: no prompt"):
        read_rows_with_prompts(str(path))
    path.write_text("")
    with pytest.raises(UserError, match="the file has no rows"):
        read_rows_with_prompts(str(path))


# -- the prompts that `adapt` holds out ---------------------------------------------------------


def choose(keys, share=0.2, seed=0):
    return held_out(keys, share=share, seed=seed, source="x.jsonl")


def test_a_share_of_the_distinct_prompts_in_any_order():
    keys = [f"p{i % 50}" for i in range(120)]
    found = choose(keys)
    assert len(found) == 10
    shuffled = keys[:]
    random.Random(1).shuffle(shuffled)
    assert choose(shuffled) == found
    assert choose(keys, seed=1) != found
    assert found <= choose(keys, share=0.5), "a larger share holds out more, not others"


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_holdouts_that_are_none(share):
    with pytest.raises(UserError, match=r"--holdout is .*; it must lie between 0 and 1"):
        choose("abcdefgh", share)


@pytest.mark.parametrize(("prompts", "share"), [("aaaaaa", 0.5), ("abc", 0.2), ("abc", 0.9)])
def test_too_few_to_hold_out(prompts, share):
    with pytest.raises(UserError, match=r"x\.jsonl: --holdout .* at least 2 and 1 are needed"):
        choose(prompts, share)
