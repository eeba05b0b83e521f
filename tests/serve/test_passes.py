"""Rows and passes: every sequence once, within the budget, and the rewards of a plain pass."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftrm.models.scoring import Scorer
from shiftrm.serve.passes import common_length, compute, passes_of, rows_of

IDS = st.lists(st.integers(4, 6), min_size=1, max_size=12)


@given(IDS, IDS)
def test_common_length_is_that_of_a_loop(a, b):
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert common_length(a, b) == count


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=20), st.booleans(), st.integers(1, 60))
def test_rows_hold_each_sequence_once_and_cost_no_more(sequences, shared, budget):
    rows = rows_of(sequences, shared=shared, budget=budget)
    assert sorted(i for row in rows for i in row.members) == list(range(len(sequences)))
    for length, members in rows:
        lengths = [len(sequences[i]) for i in members]
        if len(members) == 1:
            assert length == lengths[0]
            continue
        assert shared
        assert length <= budget
        prefix = 0
        while all(prefix < n - 1 for n in lengths) and (
            len({sequences[i][prefix] for i in members}) == 1
        ):
            prefix += 1
        assert length == sum(lengths) - (len(members) - 1) * prefix
        assert length**2 <= sum(n**2 for n in lengths)


@settings(max_examples=100, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=20), st.integers(1, 60))
def test_passes_stay_within_the_budget(sequences, budget):
    seen = []
    for rows in passes_of(sequences, shared=True, budget=budget):
        assert len({len(row.members) > 1 for row in rows}) == 1
        assert len(rows) == 1 or len(rows) * max(row.length for row in rows) <= budget
        seen += [i for row in rows for i in row.members]
    assert sorted(seen) == list(range(len(sequences)))


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_rewards_are_those_of_each_sequence_alone(reward_model, tokenizer, budget):
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 20) for _ in range(20)] for _ in range(3)]
    sequences = [
        rng.choice(prompts) + [rng.randrange(4, 20) for _ in range(rng.randrange(1, 9))]
        for _ in range(30)
    ]
    scorer = Scorer(reward_model, tokenizer)
    alone = [scorer.score_ids([ids])[0] for ids in sequences]
    found, shared = {}, 0
    for rows in passes_of(sequences, shared=True, budget=budget):
        found |= compute(scorer, sequences, rows)
        shared += sum(len(row.members) > 1 for row in rows)
    assert [found[i] for i in range(30)] == pytest.approx(alone, abs=1e-6)
    assert (shared > 0) == (budget > 1)
