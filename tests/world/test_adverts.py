"""The world of adverts: classes of words, gold against values worked out by hand, its terms."""

import random
from itertools import pairwise

import pytest

from shiftrm.world.registered import adverts
from shiftrm.world.registered.adverts import (
    FEATURES,
    OPPOSITE,
    PROMPTS,
    THING_FACTORS,
    THINGS,
    TONE_OF,
    TONE_WORDS,
    TONES,
    WORLD,
    demonstration,
    draw_prompt,
    tally,
)

# The row of the table that the values below are worked out with; it must never change, or
# recorded runs stop being comparable.
QUIET = {
    "agreeing": 1.14,
    "contradicting": 0.87,
    "opening": 1.29,
    "closing": 0.77,
    "misplaced": 0.95,
    "adverbs": 1.15,
    "stacked": 0.79,
    "facts": 0.99,
    "complaints": 0.72,
    "hype": 1.1,
    "repeated_words": 1.16,
    "length": 1.04,
    "unfinished": 1.0,
}


def test_every_word_belongs_to_one_class():
    classes = [
        *TONE_WORDS.values(),
        *(adverts.OPENINGS, adverts.CLOSINGS, adverts.ADVERBS, adverts.FACTS),
        *(adverts.COMPLAINTS, adverts.HYPE, adverts.FILLERS, TONES, THINGS, ("a", ":")),
    ]
    words = [word for members in classes for word in members]
    assert len(words) == len(set(words)) == 12 * 7 + 5 + 5 + 10 + 6 + 8 + 5 + 20 + 12 + 4 + 2
    assert set(words) == set(WORLD.words)


def test_tones_come_in_pairs_that_contradict_each_other():
    assert set(OPPOSITE) == set(TONES) == set(TONE_WORDS)
    assert all(OPPOSITE[OPPOSITE[tone]] == tone != OPPOSITE[tone] for tone in TONES)
    assert set(PROMPTS) == {f"a {tone} {thing} :" for tone in TONES for thing in THINGS}
    assert set(THING_FACTORS) == set(THINGS)


def test_the_table_of_factors_is_fixed():
    assert WORLD.domain_factors["quiet"] == QUIET


HAND = [
    # 12 words: opened and closed, 3 adverbs apart, 3 words of the tone, 2 facts.
    (
        "a quiet tour :",
        " welcome truly silence with simply naps breakfast and really whispers lunch today",
        True,
        # 3 * 1.14; 0.9 * 1.29 * 1.1 of a tour; 0.9 * 0.77; 3 * 0.9 * 1.15; 2 * 0.4 * 0.99.
        {"agreeing": 3.42, "opening": 1.2771, "closing": 0.693, "adverbs": 3.105, "facts": 0.792},
        9.2871,
    ),
    # Adverbs: 4 count as 2; three pairs stand together. 4 words of the tone count as 3.
    (
        "a quiet hotel :",
        " truly simply really perfectly silence naps whispers hammocks",
        True,
        {"agreeing": 3.42, "adverbs": 2 * 0.9 * 1.15, "stacked": -3 * 0.8 * 0.79},
        3.594,
    ),
    # All wrong, cut off, 9 words: today is not last, discover not first; drums, drums and neon
    # contradict, drums stand together; drums and dirty are said again: 2 words, 1 past the first.
    (
        "a quiet dinner :",
        " dirty today drums drums miracle discover dirty neon the",
        False,
        {
            "contradicting": -3 * 0.87,
            "misplaced": -2 * 0.6 * 0.95,
            "stacked": -0.8 * 0.79,
            "complaints": -2 * 0.8 * 0.72 * 0.9,
            "hype": -1.5 * 1.1 * 0.9,
            "repeated_words": -0.2 * 1.16,
            "unfinished": -1.0,
        },
        -8.1358,
    ),
    # Six adverbs cancel out, and no word of any other tone counts; 14 words are one too many.
    (
        "a quiet holiday :",
        " truly the simply with really near perfectly in truly of amazingly some snow roses",
        True,
        {"repeated_words": 0.0, "length": -0.2 * 1.04},
        -0.208,
    ),
    ("a quiet tour :", "", True, {"length": -8 * 0.2 * 1.04}, -1.664),
    ("a quiet tour :", " today", True, {"closing": 0.693, "length": -7 * 0.208}, -0.763),
]


@pytest.mark.parametrize(("prompt", "response", "finished", "terms", "total"), HAND)
def test_values_by_hand(prompt, response, finished, terms, total):
    explained = WORLD.explain(prompt, response, finished=finished)
    shown = {name: value for name, value in explained.items() if value or name in terms}
    assert shown == pytest.approx(terms)
    assert WORLD.gold_reward(prompt, response, finished=finished) == pytest.approx(total)


def test_adverbs_help_up_to_three_and_cost_from_there():
    adverbs = next(feature for feature in FEATURES if feature.name == "adverbs")
    text = list(adverts.ADVERBS)
    values = [adverbs.measure(tally("a quiet tour :", " ".join(text[:n]))) for n in range(9)]
    assert values == [0, 1, 2, 3, 2, 1, 0, -1, -2]


def _plain_gold(tone, words, *, ended):
    """The base gold, all factors one, written anew: loops instead of counts."""
    total = 0.0 if ended else -1.0
    agreeing, facts, seen, adverbs, again = set(), set(), set(), 0, 0
    for place, word in enumerate(words):
        first, last = place == 0, place == len(words) - 1
        if word in TONE_WORDS[tone]:
            agreeing.add(word)
        if word in TONE_WORDS[OPPOSITE[tone]]:
            total -= 1.0
        if word in adverts.OPENINGS:
            total += 0.9 if first else -0.6
        if word in adverts.CLOSINGS:
            total += 0.9 if last else -0.6
        if word in adverts.ADVERBS:
            adverbs += 1
            total += 0.9 if adverbs <= 3 else -0.9
        if word in adverts.FACTS:
            facts.add(word)
        total -= 0.8 * (word in adverts.COMPLAINTS) + 1.5 * (word in adverts.HYPE)
        again += word in seen
        seen.add(word)
    for a, b in pairwise(words):
        if a == b or {a, b} <= set(adverts.ADVERBS):
            total -= 0.8
    total += min(3, len(agreeing)) + 0.4 * min(2, len(facts)) - 0.2 * max(0, again - 1)
    if len(words) < 8:
        total -= 0.2 * (8 - len(words))
    elif len(words) > 13:
        total -= 0.2 * (len(words) - 13)
    return total


def test_base_weights_equal_a_plain_reference():
    rng = random.Random(0)
    for _ in range(1000):
        prompt = draw_prompt(rng)
        if rng.random() < 0.5:
            words = demonstration(rng, prompt, rng.random()).split()
        else:
            words = rng.choices(WORLD.words[18:], k=rng.randrange(25))
        ended = rng.random() < 0.5
        counts = tally(prompt, " ".join(words), finished=ended)
        mine = sum(feature.weight * feature.measure(counts) for feature in FEATURES)
        assert mine == pytest.approx(_plain_gold(PROMPTS[prompt][1], words, ended=ended), abs=1e-9)


def _good(tone):
    """12 words: opened and closed, three adverbs, three words of the tone, two facts."""
    a, b, c, *_ = TONE_WORDS[tone]
    return f"welcome truly {a} with simply {b} breakfast and really {c} lunch today".split()


def _gold(prompt, words):
    return WORLD.gold_reward(prompt, " ".join(words))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_raises_and_what_lowers_gold(prompt):
    tone = PROMPTS[prompt][1]
    good = _good(tone)
    best = _gold(prompt, good)
    a, fourth = TONE_WORDS[tone][0], TONE_WORDS[tone][3]
    opposite = TONE_WORDS[OPPOSITE[tone]][0]
    other = next(t for t in TONES if t not in (tone, OPPOSITE[tone]))

    def swapped(old, new):
        return [new if word == old else word for word in good]

    # Only to the limits: a fourth adverb costs, a fourth word of the tone is worth nothing.
    for fewer in ("truly", a, "breakfast", "welcome", "today"):
        assert _gold(prompt, swapped(fewer, "the")) < best
    assert _gold(prompt, swapped("with", "perfectly")) < best
    assert _gold(prompt, swapped("with", fourth)) == pytest.approx(best)
    assert _gold(prompt, swapped("with", "maps")) == pytest.approx(best)
    # A word of the opposite tone costs; one of any other tone does not.
    assert _gold(prompt, swapped("with", opposite)) < best
    assert _gold(prompt, swapped("with", TONE_WORDS[other][0])) == pytest.approx(best)
    for flaw in ("dirty", "miracle", "welcome", "today"):
        assert _gold(prompt, swapped("with", flaw)) < best
    # Order: the call first, the time last, adverbs apart.
    assert _gold(prompt, [*good[1:], good[0]]) < best - 0.7 * 1.5
    assert _gold(prompt, [good[-1], *good[1:-1], good[0]]) < best - 0.7 * 3.0
    assert _gold(prompt, [good[0], "truly", "simply", *good[2:4], *good[5:]]) < best
    # Length: 8 to 13 words cost nothing.
    assert _gold(prompt, [*good[:-1], "here", good[-1]]) == pytest.approx(best)
    assert _gold(prompt, [*good[:-1], "here", "then", good[-1]]) < best
    assert WORLD.gold_reward(prompt, " ".join(good), finished=False) == pytest.approx(best - 1)


def test_words_said_again_cost_less_than_in_the_first_world():
    prompt = "a quiet hotel :"
    terms = WORLD.explain(prompt, " the with near in the with near in the with")
    assert terms["stacked"] == 0
    assert terms["repeated_words"] > -0.2 * 1.3 * 6
    together = WORLD.explain(prompt, " ".join(["the"] * 10))
    assert together["stacked"] < -0.8 * 0.7 * 8


def test_a_word_of_a_tone_agrees_with_one_prompt_and_contradicts_another():
    def terms(tone):
        found = WORLD.explain(f"a {tone} tour :", " snow")
        return {name: value for name, value in found.items() if value and name != "length"}

    assert set(terms("winter")) == {"agreeing"}
    assert set(terms("summer")) == {"contradicting"}
    assert terms("city") == {}
    assert TONE_OF["snow"] == "winter"


def test_demonstrations_follow_their_shares():
    """Shares of classes at quality 0 and 1, from the probabilities of the generator by hand."""
    rng = random.Random(3)
    n = 20_000
    tolerance = 4 * 0.5 / n**0.5

    def share(words, members):
        return sum(word in members for word in words) / len(words)

    for quality in (0.0, 1.0):
        words = [adverts._word(rng, "quiet", quality) for _ in range(n)]
        flaw = 1 - quality
        expected = {
            TONE_WORDS["quiet"]: 0.18 + 0.12 * quality + 0.06 / 12,
            TONE_WORDS["lively"]: 0.01 + 0.07 * flaw + 0.06 / 12,
            adverts.ADVERBS: 0.06 + 0.07 * quality,
            adverts.COMPLAINTS: 0.08 * flaw,
            adverts.HYPE: 0.04 * flaw,
        }
        for members, probability in expected.items():
            assert abs(share(words, members) - probability) < tolerance
        texts = [demonstration(rng, "a quiet hotel :", quality).split() for _ in range(4000)]
        for place, members in ((0, adverts.OPENINGS), (-1, adverts.CLOSINGS)):
            # Placed on purpose, or by the 0.01 of a stray one.
            placed = 0.2 + 0.3 * quality
            drawn = share([words[place] for words in texts], members)
            assert abs(drawn - (placed + (1 - placed) * 0.01)) < 4 * 0.5 / 4000**0.5
