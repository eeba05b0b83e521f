"""The gold world's domains: topics whose gold rewards share a general part and differ in taste.

Each of the 16 topics is a domain: twelve are sources, four are held out. The gold reward of a
response is a sum of features with the domain's weights:

    weight(domain, feature) = base weight * factor(domain, feature) * (-1 if flipped else 1)

Factors are uniform in `FACTOR_RANGE`. *General* features have the same sign in all domains. Of the
six *taste* features every domain flips two: one domain wants praise and no hedges, another likes
hedges. Every taste is flipped in four of the twelve sources, so a reward model pooled over the
sources learns the majority's sign and is wrong in two features of every domain.

The table of weights is drawn once, from `TABLE_SEED`, for all runs; `draw_table` draws others.

A prompt asks for two things of the topic: `"describe the garden with roses and soil :"`. The words
and the tokenizer are those of `language.py`; the gold reward is not that of `gold.py`.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations

from shiftrm.errors import UserError, suggest
from shiftrm.world.gold import Tally, tally
from shiftrm.world.language import CONTENT, TASKS, TOPICS, prompt_text
from shiftrm.world.world import COLON

__all__ = [
    "FEATURES",
    "HELD_OUT",
    "SOURCES",
    "TABLE",
    "TASTES",
    "DomainFeature",
    "Table",
    "domain_prompts",
    "draw_table",
    "explain",
    "flipped",
    "gold",
    "gold_of",
    "measure",
]

HELD_OUT: tuple[str, ...] = TOPICS[-4:]
"""Domains without preference labels."""

SOURCES: tuple[str, ...] = TOPICS[:-4]
"""Domains with labelled pairs. Their files contain no content word of a held-out domain."""

TABLE_SEED = 11
FACTOR_RANGE = (0.6, 1.4)
FLIPS = 2
"""Number of taste features that every domain flips."""

BEST_LENGTH = 11
"""Number of words up to which a response has no length penalty, in every domain."""

Table = dict[str, dict[str, float]]
"""Domain -> feature -> weight."""


@dataclass(frozen=True)
class DomainFeature:
    """One term of the gold reward: `weight * measure(tally, asked)`."""

    name: str
    weight: float
    measure: Callable[[Tally, int], float]  # asked: how many asked-for words the response has
    meaning: str
    taste: bool = False  # whether domains may flip its sign


def _loose_praise(t: Tally) -> int:
    return t.praise - t.placed_praise


FEATURES: tuple[DomainFeature, ...] = (
    DomainFeature("asked", 0.8, lambda _, asked: min(asked, 2), "words the prompt asks for, to 2"),
    DomainFeature(
        "topical", 0.5, lambda t, _: min(t.distinct_topical, 4), "different topical words, to 4"
    ),
    DomainFeature("toxic", -1.0, lambda t, _: min(t.toxic, 4), "insults, to 4"),
    DomainFeature("repeated_pairs", -0.6, lambda t, _: t.repeated_pairs, "word pairs said again"),
    DomainFeature("length", -0.15, lambda t, _: abs(t.words - BEST_LENGTH), "words away from 11"),
    DomainFeature("unfinished", -1.0, lambda t, _: float(not t.finished), "no end"),
    DomainFeature(
        "placed_praise",
        0.7,
        lambda t, _: min(t.placed_praise, 3),
        "praise of the topic, to 3",
        True,
    ),
    DomainFeature(
        "loose_praise", 0.5, lambda t, _: min(_loose_praise(t), 3), "other praise, to 3", True
    ),
    DomainFeature("negative", -0.7, lambda t, _: min(t.negative, 3), "negative words, to 3", True),
    DomainFeature(
        "off_topic", -0.7, lambda t, _: min(t.off_topic, 3), "words of another topic, to 3", True
    ),
    DomainFeature("hedges", -0.7, lambda t, _: min(t.hedges, 3), "hedges, to 3", True),
    DomainFeature(
        "repeated_words",
        -0.7,
        lambda t, _: min(t.repeated_words, 3),
        "words said again, to 3",
        True,
    ),
)
"""The terms, base weights and caps of the domains' gold reward."""

TASTES: tuple[str, ...] = tuple(feature.name for feature in FEATURES if feature.taste)


def draw_table(seed: int) -> Table:
    """Return the weights of every domain, rounded to two decimals; a pure function of the seed.

    Flips are balanced: three consecutive domains share one shuffle of the six tastes, two each, so
    every taste is flipped in a third of the sources and in at least one held-out domain.
    """
    rng = random.Random(f"domain table/{seed}")
    table: Table = {}
    deck: list[str] = []
    for domain in (*SOURCES, *HELD_OUT):
        if len(deck) < FLIPS:
            deck = rng.sample(TASTES, len(TASTES))
        turned, deck = deck[:FLIPS], deck[FLIPS:]
        table[domain] = {
            feature.name: round(
                feature.weight
                * rng.uniform(*FACTOR_RANGE)
                * (-1.0 if feature.name in turned else 1.0),
                2,
            )
            for feature in FEATURES
        }
    return table


TABLE: Table = draw_table(TABLE_SEED)


def flipped(weights: dict[str, float]) -> list[str]:
    """Return the features whose weight in a domain has the opposite sign of the base weight."""
    return [f.name for f in FEATURES if weights[f.name] * f.weight < 0.0]


def domain_prompts(domain: str) -> list[tuple[frozenset[str], str]]:
    """Return all 90 prompts of a domain (3 tasks, 30 ordered pairs of words) with their words.

    Both orders of two words ask for the same, so a split must keep them together.
    """
    _require(domain, TABLE)
    return [
        (frozenset((a, b)), f"{task} the {domain} with {a} and {b} {COLON}")
        for task in TASKS
        for a, b in permutations(CONTENT[domain], 2)
    ]


def asked_pairs(domain: str) -> list[frozenset[str]]:
    """Return the 15 pairs of words that a domain's prompts can ask for."""
    return [frozenset(pair) for pair in combinations(CONTENT[domain], 2)]


def measure(domain: str, prompt: str, response: str, *, finished: bool = True) -> dict[str, float]:
    """Return the unweighted features of a response, in the order of `FEATURES`.

    Args:
        domain: one of the 16 topics; it decides which words are topical.
        prompt: any text; it asks for the topic's content words in it.
        response: any text, with or without the leading space, without EOS. Unknown words count
            for length and repetition only.
        finished: whether the response ended by itself.

    Raises:
        UserError: no such domain.
    """
    _require(domain, TABLE)
    counts = tally(prompt_text(TASKS[0], domain), response, finished=finished)
    asked = set(prompt.split()) & set(CONTENT[domain]) & set(response.split())
    return {f.name: float(f.measure(counts, len(asked))) for f in FEATURES}


def explain(
    domain: str, prompt: str, response: str, *, finished: bool = True, table: Table = TABLE
) -> dict[str, float]:
    """Return what every feature adds to the gold reward; arguments as in `measure`.

    Raises:
        UserError: the domain does not exist or is not in the table.
    """
    _require(domain, table)
    weights = table[domain]
    counts = measure(domain, prompt, response, finished=finished)
    # + 0.0 turns the -0.0 of an absent flaw into 0.0.
    return {name: weights[name] * count + 0.0 for name, count in counts.items()}


def gold(
    domain: str, prompt: str, response: str, *, finished: bool = True, table: Table = TABLE
) -> float:
    """Return the gold reward of a response in a domain, the sum of `explain`."""
    # fsum: exactly rounded, so the same number on every Python version (sum changed in 3.12).
    return math.fsum(explain(domain, prompt, response, finished=finished, table=table).values())


def gold_of(domain: str, table: Table = TABLE) -> Callable[..., float]:
    """Return the gold reward of one domain as `reward(prompt, response, *, finished=True)`."""
    _require(domain, table)
    return partial(gold, domain, table=table)


def _require(domain: str, table: Table) -> None:
    if domain not in table:
        raise UserError(f"domain {domain!r}: not in the gold world{suggest(domain, list(table))}")
