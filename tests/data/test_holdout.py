"""Which prompts are held out: a share of the distinct ones, whatever their order."""

import random

import pytest

from shiftrm.data.holdout import held_out, overlap
from shiftrm.errors import UserError


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
def test_shares_that_are_none(share):
    with pytest.raises(UserError, match=r"--holdout is .*; it must lie between 0 and 1"):
        choose("abcdefgh", share)


@pytest.mark.parametrize(("prompts", "share"), [("aaaaaa", 0.5), ("abc", 0.2), ("abc", 0.9)])
def test_too_few(prompts, share):
    with pytest.raises(UserError, match=r"x\.jsonl: --holdout .* at least 2 and 1 are needed"):
        choose(prompts, share)


def test_overlap_counts_prompts():
    assert overlap(["a", "a", "b", "c"], ["c", "a", "d"]) == 2
