"""Verdicts on rewards whose quality is known: sharp, blind, length-loving, shrunken, exploited."""

import random

import pytest

from shiftrm.measure.diagnosis.comparison import compare
from shiftrm.measure.diagnosis.diagnosis import ScoredFile, diagnose
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredPair, ScoredResponse
from shiftrm.measure.diagnosis.verdict import NOT_SIGHT, SMALL_MAY_BE_RIGHT, overall, verdicts

PROMPTS = 300


def responses(rng, k=4):
    """(quality, length) of k responses; the two are independent."""
    return [(rng.gauss(0, 1), rng.randint(5, 60)) for _ in range(k)]


def groups(reward, *, name="policy", model="m", n=PROMPTS, seed=0, k=4, **marks):
    rng = random.Random(seed)
    return ScoredFile(
        model,
        name,
        groups=tuple(
            ScoredGroup(i, tuple(ScoredResponse(reward(q, t, rng), t, **marks) for q, t in drawn))
            for i in range(n)
            for drawn in [responses(rng, k)]
        ),
    )


def pairs(reward, *, name="labelled", model="m", n=PROMPTS, seed=0, right=lambda q, t: q):
    """Labels by `right`, without noise."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        drawn = sorted(responses(rng, 2), key=lambda pair: -right(*pair))
        rows.append(ScoredPair(i, *(ScoredResponse(reward(q, t, rng), t) for q, t in drawn)))
    return ScoredFile(model, name, pairs=tuple(rows))


def judge(*files):
    return verdicts(diagnose(files))


def sharp(q, t, rng):
    return 2 * q + rng.gauss(0, 0.5)


def zero(q, t, rng):
    return 0.25


def tiny(q, t, rng):
    return 1e-3 * rng.gauss(0, 1)


def length_loving(q, t, rng):
    return float(t)


def brevity_loving(q, t, rng):
    return -float(t)


def dice(q, t, rng):
    return rng.gauss(0, 2)


def upside_down(q, t, rng):
    return -q


@pytest.mark.parametrize(
    ("reward", "words", "says"),
    [
        (sharp, ("sees", "tells apart"), "of 300 labelled pairs"),
        (zero, ("blind", "blind"), "100 % of the 300 comparisons get the same reward"),
        (tiny, ("blind", "blind"), "no better than a coin"),
        (dice, ("blind", "tells apart"), "no better than a coin"),
        (upside_down, ("blind", "tells apart"), "it prefers the worse response"),
        (brevity_loving, ("follows length",) * 2, "1.00 [1.00, 1.00] where the chosen response is"),
        (length_loving, ("follows length",) * 2, "0.00 [0.00, 0.00] where the chosen response is"),
    ],
)
def test_models_of_known_quality(reward, words, says):
    labelled, unlabelled = judge(pairs(reward), groups(reward))
    assert (labelled.word, unlabelled.word) == words
    assert says in labelled.sentence


def test_spread_is_never_called_sight():
    """Dice lie far apart. Without labels that must not be taken for sight."""
    for reward in (dice, sharp, upside_down, length_loving):
        (found,) = judge(groups(reward))
        assert found.word != "sees"
        assert NOT_SIGHT in found.sentence
    assert "about 200 pairs" in NOT_SIGHT
    (blind,) = judge(groups(tiny))
    assert SMALL_MAY_BE_RIGHT in blind.sentence


def test_a_small_scale_that_orders_well_sees():
    """Accuracy does not depend on scale; the smallness is said beside it."""
    (found,) = judge(pairs(lambda q, t, rng: 0.001 * q))
    assert found.word == "sees"
    assert any("Differences are small: 100 %" in warning for warning in found.warnings)


def test_what_labels_show_holds_for_the_models_other_files():
    """Small differences are no mark of blindness in a model that sees by them."""

    def small(q, t, rng):
        return 0.001 * sharp(q, t, rng)

    words = [v.word for v in judge(groups(small, name="sft"), pairs(small))]
    assert words == ["tells apart", "sees"]
    words = [v.word for v in judge(groups(small), pairs(sharp, model="another"))]
    assert words == ["blind", "sees"]
    _, policy, _ = judge(
        groups(small, name="sft"),
        groups(lambda q, t, rng: 0.1 * small(q, t, rng), seed=1),
        pairs(small),
    )
    assert policy.word == "blind", "by its variance against the reference"


def test_better_than_a_coin_is_dim():
    (found,) = judge(pairs(lambda q, t, rng: q + rng.gauss(0, 5), n=2000))
    assert found.word == "dim"
    assert "below 0.60" in found.sentence


@pytest.mark.parametrize(
    ("scale", "word"), [(0.25, "blind"), (0.6, "dim"), (1.0, "tells apart"), (3.0, "tells apart")]
)
def test_variance_against_the_reference(scale, word):
    """Variance ratios 0.06, 0.36, 1 and 9."""
    reference, policy = judge(
        groups(sharp, name="sft"), groups(lambda q, t, rng: scale * sharp(q, t, rng), seed=1)
    )
    assert reference.word == "tells apart"
    assert policy.word == word
    assert "of that on sft" in policy.sentence


def test_rewards_that_depend_on_the_prompt_alone_are_dim():
    rng = random.Random(0)
    file = ScoredFile(
        "m",
        "policy",
        groups=tuple(
            ScoredGroup(i, tuple(ScoredResponse(c + 0.3 * rng.gauss(0, 1), 5) for _ in range(4)))
            for i in range(PROMPTS)
            for c in [rng.gauss(0, 5)]
        ),
    )
    (found,) = judge(file)
    assert found.word == "dim"
    assert "the rest depends on the prompt alone" in found.sentence


def test_too_few_to_say():
    few, labelled, some = judge(groups(sharp, n=10), pairs(sharp, n=10), pairs(dice, n=60, seed=4))
    assert few.word == labelled.word == some.word == "unclear"
    assert "10 prompt(s)" in few.sentence
    assert "10 prompt(s)" in labelled.sentence
    assert "holds both a coin and a model that sees" in some.sentence


def test_a_collapsed_policy_is_not_the_models_fault():
    same = groups(zero, key="x")
    (found,) = judge(same)
    assert found.word == "unclear"
    assert "nothing to tell apart" in found.sentence
    assert any("75 % of the responses repeat" in warning for warning in found.warnings)


def test_reward_up_and_spread_down_is_a_sign():
    sft, policy = judge(groups(sharp, name="sft"), groups(lambda q, t, rng: 5 + 0.1 * q, seed=1))
    assert not any("exploits" in warning for warning in sft.warnings)
    assert any("standard deviations above sft" in warning for warning in policy.warnings)


@pytest.mark.parametrize(
    ("reward", "marks", "warning"),
    [
        (lambda q, t, rng: 50 * q, {}, "probability above 0.99"),
        (lambda q, t, rng: round(q), {}, "exactly the same reward"),
        (lambda q, t, rng: q + 0.07 * t, {}, "go together within prompts: 0.7"),
        (sharp, {"finished": False}, "100 % of the responses were cut off"),
    ],
)
def test_signs(reward, marks, warning):
    (found,) = judge(groups(reward, **marks))
    assert any(warning in text for text in found.warnings), found.warnings
    (clean,) = judge(groups(lambda q, t, rng: q))
    assert clean.warnings == ()


def test_rows_that_were_left_out_are_said():
    from dataclasses import replace

    (found,) = judge(replace(groups(sharp), left_out=7))
    assert found.warnings[0].startswith("7 row(s) longer than the model's context")


def test_over_sure_models_are_told():
    (found,) = judge(pairs(lambda q, t, rng: 40 * q + 40 * rng.gauss(0, 1)))
    assert any("stated probabilities are off by" in text for text in found.warnings)


def test_the_worst_file_decides():
    files = [pairs(sharp, name="held out"), groups(sharp, name="sft"), groups(tiny, name="policy")]
    diagnoses = diagnose(files)
    (whole,) = overall(list(zip(diagnoses, verdicts(diagnoses), strict=True)))
    assert whole.word == "blind"
    assert whole.sentence == (
        "The reward model is blind on policy; it tells responses apart on sft; it sees on held out."
        " No labels say whether it orders the responses of sft and policy well."
    )


def test_two_models_are_compared_on_the_same_pairs():
    def both(before, after):
        files = [pairs(before, model="old"), pairs(after, model="new")]
        (found,) = compare(files, diagnose(files))
        return found

    def dull(q, t, rng):
        return 2 * q + rng.gauss(0, 4)

    better = both(dull, sharp)
    assert (better.before, better.after, better.reading) == ("old", "new", "sharper")
    assert better.accuracy_change.low > 0
    assert both(sharp, dull).reading == "duller"
    louder = both(sharp, lambda q, t, rng: 10 * sharp(q, t, rng))
    assert louder.reading == "louder, not sharper"
    assert louder.accuracy_change.value == 0.0
    assert louder.variance_factor == pytest.approx(100)
    assert both(sharp, sharp).reading == "no clear change in accuracy"


def test_without_labels_louder_is_all_that_can_be_said():
    files = [
        groups(reward, name=name, model=model, seed=seed)
        for model, factor in (("old", 1.0), ("new", 3.0))
        for seed, name in enumerate(("sft", "policy"))
        for reward in [lambda q, t, rng, f=factor, n=name: (f if n == "policy" else 1.0) * q]
    ]
    sft, policy = compare(files, diagnose(files))
    assert (sft.accuracy_change, sft.relative_factor) == (None, None)
    assert sft.reading.startswith("as loud; ")
    assert policy.relative_factor == pytest.approx(9)
    assert policy.reading == "louder; whether it is sharper, only labels would tell"
