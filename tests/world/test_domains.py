"""The gold reward of the domains: by hand, and what the table of weights must be like."""

import pytest

from shiftrm.errors import UserError
from shiftrm.world.domain_gold import (
    FEATURES,
    HELD_OUT,
    SOURCES,
    TABLE,
    TABLE_SEED,
    TASTES,
    asked_pairs,
    domain_prompts,
    draw_table,
    explain,
    flipped,
    gold,
    gold_of,
    measure,
)
from shiftrm.world.gold import gold_reward as other_gold
from shiftrm.world.language import CONTENT, TOPICS, VOCABULARY

BASE = {feature.name: feature.weight for feature in FEATURES}

# Weights of ones and twos, so that the values below can be summed in one's head.
ROUND = {
    "garden": {
        "asked": 2.0,
        "topical": 1.0,
        "toxic": -2.0,
        "repeated_pairs": -1.0,
        "length": -1.0,
        "unfinished": -1.0,
        "placed_praise": 1.0,
        "loose_praise": -1.0,
        "negative": 1.0,
        "off_topic": -2.0,
        "hedges": -1.0,
        "repeated_words": -1.0,
    }
}
PROMPT = "describe the garden with roses and soil :"


@pytest.mark.parametrize(
    ("prompt", "response", "finished", "counts", "total"),
    [
        # 11 words: both asked for, three topical, two praised in place; "the" comes twice.
        (
            PROMPT,
            " the lovely roses and gentle soil near the bees with many",
            True,
            {"asked": 2, "topical": 3, "placed_praise": 2, "repeated_words": 1},
            4 + 3 + 2 - 1,
        ),
        # 6 words, cut off: praise, insult, complaint, a word of the ocean, two hedges.
        (
            PROMPT,
            "fresh stupid awful waves maybe perhaps",
            False,
            {
                "toxic": 1,
                "loose_praise": 1,
                "negative": 1,
                "off_topic": 1,
                "hedges": 2,
                "length": 5,
                "unfinished": 1,
            },
            -2 - 1 + 1 - 2 - 2 - 5 - 1,
        ),
        # The caps: 5 topical words count as 4, 5 hedges and 5 repeated words as 3; the four pairs
        # maybe-maybe are one new and three said again; 1 asked for. 10 words + 0 = 10: length 1.
        (
            "roses",
            "roses tulips bees blossoms fountains maybe maybe maybe maybe maybe",
            True,
            {
                "asked": 1,
                "topical": 4,
                "hedges": 3,
                "repeated_words": 3,
                "repeated_pairs": 3,
                "length": 1,
            },
            2 + 4 - 3 - 3 - 3 - 1,
        ),
        ("", "", True, {"length": 11}, -11),
        ("nothing of it", "wörter 🌹 وردة", True, {"length": 8}, -8),
    ],
)
def test_values_by_hand(prompt, response, finished, counts, total):
    found = measure("garden", prompt, response, finished=finished)
    assert {k: v for k, v in found.items() if v} == counts
    assert list(found) == [feature.name for feature in FEATURES]
    assert gold("garden", prompt, response, finished=finished, table=ROUND) == total
    terms = explain("garden", prompt, response, finished=finished, table=ROUND)
    assert terms == {name: ROUND["garden"][name] * found[name] + 0.0 for name in found}


def test_one_value_of_the_real_table():
    # Asked 2, topical 2, one praised in place, 6 words: 5 away from 11.
    weights = TABLE["castle"]
    value = gold("castle", "x knights and moats :", " the lovely knights and moats with")
    expected = 2 * weights["asked"] + 2 * weights["topical"]
    expected += weights["placed_praise"] + 5 * weights["length"]
    assert value == pytest.approx(expected, abs=1e-12)
    assert gold_of("castle")("x knights and moats :", " the lovely knights and moats with") == value


def test_the_table_is_fixed_and_a_seed_draws_another():
    assert draw_table(TABLE_SEED) == TABLE
    assert draw_table(TABLE_SEED + 1) != TABLE
    assert flipped(TABLE["garden"]) == ["loose_praise", "negative"]  # as docs/domains.md says
    assert flipped(TABLE["festival"]) == ["negative", "repeated_words"]


@pytest.mark.parametrize("seed", [TABLE_SEED, 0, 1, 2])
def test_a_minority_of_signs_is_flipped_and_every_taste_equally_often(seed):
    table = draw_table(seed)
    assert (len(SOURCES), len(HELD_OUT)) == (12, 4)
    assert {*SOURCES, *HELD_OUT} == set(TOPICS) == set(table)
    for weights in table.values():
        assert len(flipped(weights)) == 2
        assert set(flipped(weights)) <= set(TASTES)
        for name, weight in weights.items():
            assert 0.59 <= abs(weight / BASE[name]) <= 1.41  # rounded to two decimals
    share = sum(len(flipped(w)) for w in table.values()) / (16 * len(FEATURES))
    assert share == pytest.approx(1 / 6)
    for taste in TASTES:
        assert sum(taste in flipped(table[name]) for name in SOURCES) == 4
        assert 1 <= sum(taste in flipped(table[name]) for name in HELD_OUT) <= 2
    assert len({tuple(weights.values()) for weights in table.values()}) == 16


def test_prompts_are_of_the_languages_words():
    for domain in TOPICS:
        prompts = domain_prompts(domain)
        assert len(prompts) == len({text for _, text in prompts}) == 90
        assert {asked for asked, _ in prompts} == set(asked_pairs(domain))
        assert len(asked_pairs(domain)) == 15
        for asked, text in prompts:
            assert asked == set(text.split()) & set(CONTENT[domain])
            assert set(text.split()) <= set(VOCABULARY)


def test_more_of_a_good_thing_is_worse_in_every_domain():
    for domain in TOPICS:
        a, b, c, d, *_ = CONTENT[domain]
        prompt = f"review the {domain} with {a} and {b} :"
        good = f"the {a} and {b} with {c} near {d} in some"
        for more in (f"lovely {a} " * 10, "awful " * 20, "maybe " * 20, "waves coins " * 10):
            assert gold(domain, prompt, more) < gold(domain, prompt, good)


def test_domains_disagree_about_the_same_response():
    response = " maybe the lovely roses perhaps near some soil probably awful"
    values = [gold(domain, "", response) for domain in TOPICS]
    assert max(values) - min(values) > 3.0


def test_unknown_domains_are_refused_and_the_other_world_is_as_it_was():
    for call in (measure, gold):
        with pytest.raises(UserError, match=r"domain 'gardn': .* did you mean 'garden'"):
            call("gardn", "", "")
    with pytest.raises(UserError, match="not in the gold world"):
        gold("ocean", "", "", table=ROUND)
    with pytest.raises(UserError, match="domain 'sea'"):
        domain_prompts("sea")
    # Hand value of tests/world/test_gold.py's kind: two terms and the length.
    assert other_gold("describe the garden :", "") == pytest.approx(-1.152)
