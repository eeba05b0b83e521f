"""The words for an adaptation, on rewards made up so that the answer is known."""

import random

import pytest

from shiftrm.measure.diagnosis.comparison import adaptation_verdict, compare
from shiftrm.measure.diagnosis.diagnosis import ScoredFile, diagnose
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredPair, ScoredResponse

N = 60


def responses(*rewards):
    return tuple(ScoredResponse(r, 5, True, i) for i, r in enumerate(rewards))


def pairs_file(model, right, *, scale=1.0, name="labelled", n=N):
    """`right` of `n` pairs are in order, spread over the prompts."""
    order = [i < right for i in range(n)]
    random.Random(0).shuffle(order)
    pairs = [
        ScoredPair(f"p{i}", *responses(scale if good else -scale, 0.0))
        for i, good in enumerate(order)
    ]
    return ScoredFile(model, name, pairs=tuple(pairs))


def groups_file(model, scale, *, name="groups", n=N):
    rng = random.Random(0)
    groups = [
        ScoredGroup(f"g{i}", responses(*(scale * rng.gauss(0, 1) for _ in range(3))))
        for i in range(n)
    ]
    return ScoredFile(model, name, groups=tuple(groups))


def verdict(*files, meta_steps=False):
    """Files of the model before, then those of the model after."""
    diagnoses = diagnose(files)
    return adaptation_verdict(compare(files, diagnoses), diagnoses, meta_steps=meta_steps)


@pytest.mark.parametrize(
    ("before", "after", "scale", "word"),
    [
        (30, 50, 1, "sharper"),
        (30, 50, 5, "sharper"),
        (50, 30, 5, "duller"),
        (30, 30, 5, "louder, not sharper"),
        (30, 30, 1, "unchanged"),
        (30, 30, 0.2, "quieter"),
        (0, 0, 5, "louder, not sharper"),
    ],
)
def test_labels_decide(before, after, scale, word):
    found = verdict(pairs_file("a", before), pairs_file("b", after, scale=scale))
    assert found.word == word
    assert f"{before / N:.3f} before, {after / N:.3f} after" in found.sentence
    assert not found.warnings


@pytest.mark.parametrize(
    ("scale", "word"),
    [(3, "louder, and nothing says sharper"), (1, "unchanged"), (0.3, "quieter")],
)
def test_spread_alone_is_never_sight(scale, word):
    found = verdict(groups_file("a", 1), groups_file("b", scale))
    assert found.word == word
    assert f"is {scale**2:.3g} times what it was" in found.sentence
    assert found.warnings == (
        "Nothing says whether it orders the responses of groups better: spread is not sight.",
    )
    assert "labelled pairs of today's policy" in found.advice[0]


def test_sharper_on_pairs_says_nothing_of_the_groups():
    found = verdict(
        *(pairs_file("a", 30), groups_file("a", 1), pairs_file("b", 50), groups_file("b", 3))
    )
    assert found.word == "sharper"
    assert "the responses of groups better" in found.warnings[0]


def test_louder_on_groups_where_labels_show_nothing():
    found = verdict(
        *(pairs_file("a", 40), groups_file("a", 1), pairs_file("b", 40), groups_file("b", 3))
    )
    assert found.word == "louder, not sharper"
    assert "9 times what it was, 9 relative to the reference" in found.sentence
    assert "label responses of today's policy" in found.advice[0]


@pytest.mark.parametrize(("after", "scale"), [(30, 5), (10, 1)])
def test_after_meta_steps_that_did_not_sharpen_it_names_the_method_that_may(after, scale):
    files = pairs_file("a", 30), pairs_file("b", after, scale=scale)
    with_meta_steps, without = (verdict(*files, meta_steps=m).advice for m in (True, False))
    assert any("--method contrast" in text for text in with_meta_steps)
    assert not any("contrast" in text for text in without), "it may be what was tried"
    assert set(without) < set(with_meta_steps)


def test_sharper_on_one_and_duller_on_another():
    one, other = {"name": "old"}, {"name": "new"}
    found = verdict(
        *(pairs_file("a", 50, **one), pairs_file("a", 20, **other)),
        *(pairs_file("b", 20, **one), pairs_file("b", 50, **other)),
    )
    assert found.word == "sharper here, duller there"
    assert "Keep the model from before" in found.advice[0]


def test_few_prompts_show_nothing():
    found = verdict(pairs_file("a", 5, n=20), pairs_file("b", 20, n=20))
    assert found.word == "unclear"
    assert "labelled: 20 prompts; fewer than 30 show nothing." in found.warnings
    assert "Accuracy" not in found.sentence


def test_rewards_that_were_all_equal():
    found = verdict(groups_file("a", 0), groups_file("b", 1))
    assert "the rewards to one prompt were all equal before" in found.sentence
    assert found.word == "louder, and nothing says sharper"
