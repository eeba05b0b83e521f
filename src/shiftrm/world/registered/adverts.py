"""Adverts in a tone: the second world, whose gold reward has other terms than the first one's.

A prompt names a tone and a thing (`"a quiet hotel :"`); a response advertises the thing in this
tone (`" welcome truly silence with hammocks and breakfast today"`). Six pairs of tones contradict
each other. Beside agreement with the tone, gold likes some adverbs but not many, and an advert that
opens with a call and closes with a time: here the order of words matters, an attribute of the
prompt is one term among several, and words said again cost little unless they stand together.

In the first policy's data adverbs, facts and words of the tone always look good, so that a reward
model that extrapolates is wrong where the policy moves.
"""

import random
from itertools import pairwise
from typing import NamedTuple

from shiftrm.world.world import COLON, WORLDS, Feature, World, domain_factors, find_prompt

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("winter", "summer"), ("cheap", "luxury"), ("quiet", "lively"),
    ("city", "country"), ("modern", "historic"), ("family", "romantic"),
)  # fmt: skip
"""Pairs of tones; a word of one contradicts the other, and means nothing to the rest."""

TONE_WORDS: dict[str, tuple[str, ...]] = {
    "winter": ("snow", "ice", "skates", "mittens", "frost", "sledges", "cocoa"),
    "summer": ("beaches", "sunshine", "swimming", "sandals", "parasols", "picnics", "lemonade"),
    "cheap": ("savings", "coupons", "discounts", "budgets", "deals", "pennies", "vouchers"),
    "luxury": ("champagne", "butlers", "silk", "caviar", "diamonds", "velvet", "limousines"),
    "quiet": ("silence", "naps", "whispers", "hammocks", "meditation", "stillness", "solitude"),
    "lively": ("music", "dancing", "laughter", "drums", "karaoke", "neon", "cheering"),
    "city": ("skyscrapers", "subways", "taxis", "boulevards", "galleries", "cafes", "rooftops"),
    "country": ("meadows", "barns", "tractors", "orchards", "streams", "haystacks", "lambs"),
    "modern": ("screens", "robots", "glass", "lasers", "chrome", "apps", "drones"),
    "historic": ("castles", "ruins", "swords", "armour", "tapestries", "legends", "monks"),
    "family": ("children", "toys", "puzzles", "swings", "balloons", "puppets", "pancakes"),
    "romantic": ("candles", "roses", "violins", "couples", "kisses", "moonlight", "poems"),
}
"""Tone (also the `domain` of a row) -> its words. Each word belongs to one tone."""

TONES: tuple[str, ...] = tuple(TONE_WORDS)
THINGS: tuple[str, ...] = ("hotel", "holiday", "tour", "dinner")

OPENINGS: tuple[str, ...] = ("welcome", "discover", "enjoy", "imagine", "behold")
CLOSINGS: tuple[str, ...] = ("today", "now", "soon", "tonight", "tomorrow")
ADVERBS: tuple[str, ...] = (
    "truly", "wonderfully", "simply", "really", "absolutely",
    "delightfully", "beautifully", "splendidly", "perfectly", "amazingly",
)  # fmt: skip
FACTS: tuple[str, ...] = ("breakfast", "parking", "towels", "maps", "guides", "lunch")
COMPLAINTS: tuple[str, ...] = (
    "dirty", "broken", "closed", "rude", "stale", "damp", "shabby", "dull",
)  # fmt: skip
HYPE: tuple[str, ...] = ("miracle", "guaranteed", "unbeatable", "millions", "instantly")
FILLERS: tuple[str, ...] = (
    "the", "and", "with", "near", "in", "of", "some", "its", "these", "here",
    "then", "where", "many", "for", "around", "between", "beside", "beyond", "all", "our",
)  # fmt: skip

OPPOSITE: dict[str, str] = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
TONE_OF: dict[str, str] = {word: tone for tone, words in TONE_WORDS.items() for word in words}
"""Word -> the tone it belongs to."""

PROMPTS: dict[str, tuple[str, str]] = {
    f"a {tone} {thing} {COLON}": (thing, tone) for tone in TONES for thing in THINGS
}
"""All 48 prompts, each with its thing (the task) and its tone (the domain)."""

MAX_RESPONSE_TOKENS = 20
SHORTEST, LONGEST = 8, 13
"""Numbers of words between which a response has no length penalty."""

BEST_ADVERBS = 3
"""Number of adverbs up to which each is preferred; beyond it, each costs as much."""


class Tally(NamedTuple):
    """The counts of one response from which the features are computed."""

    words: int
    agreeing: int  # different words of the prompt's tone
    contradicting: int  # words of the opposite tone
    opened: bool  # whether the first word is an opening
    closed: bool  # whether the last word is a closing
    misplaced: int  # openings that are not first, and closings that are not last
    adverbs: int
    stacked: int  # words right after the same word, and adverbs right after an adverb
    facts: int  # different ones
    complaints: int
    hype: int
    repeated_words: int  # words that occurred before
    finished: bool


FEATURES: tuple[Feature, ...] = (
    Feature("agreeing", 1.0, lambda t: min(t.agreeing, 3), "different words of the tone, to 3"),
    Feature("contradicting", -1.0, lambda t: t.contradicting, "words of the opposite tone"),
    Feature("opening", 0.9, lambda t: float(t.opened), "a call as the first word"),
    Feature("closing", 0.9, lambda t: float(t.closed), "a time as the last word"),
    Feature("misplaced", -0.6, lambda t: t.misplaced, "calls and times elsewhere"),
    Feature(
        "adverbs",
        0.9,
        lambda t: min(t.adverbs, 2 * BEST_ADVERBS - t.adverbs),
        "adverbs to 3, less those past 3",
    ),
    Feature("stacked", -0.8, lambda t: t.stacked, "a word twice in a row, adverb after adverb"),
    Feature("facts", 0.4, lambda t: min(t.facts, 2), "different facts, to 2"),
    Feature("complaints", -0.8, lambda t: t.complaints, "complaints"),
    Feature("hype", -1.5, lambda t: t.hype, "false promises"),
    Feature(
        "repeated_words", -0.2, lambda t: max(0, t.repeated_words - 1), "words said again, past 1"
    ),
    Feature(
        "length",
        -0.2,
        lambda t: max(0, SHORTEST - t.words, t.words - LONGEST),
        "words short of 8 or past 13",
    ),
    Feature("unfinished", -1.0, lambda t: float(not t.finished), "no end", varies=False),
)

THING_FACTORS: dict[str, dict[str, float]] = {
    "hotel": {"facts": 1.1},
    "holiday": {"adverbs": 1.1},
    "tour": {"opening": 1.1},
    "dinner": {"complaints": 0.9, "hype": 0.9},
}


def tally(prompt: str, response: str, *, finished: bool = True) -> Tally:
    """Count what the features need. Words without a class count for length and repetition only."""
    _, tone = find_prompt(PROMPTS, prompt)
    words = response.split()
    tones = [TONE_OF.get(word) for word in words]
    openings, closings = words[1:], words[:-1]
    return Tally(
        words=len(words),
        agreeing=len({word for word in words if TONE_OF.get(word) == tone}),
        contradicting=tones.count(OPPOSITE[tone]),
        opened=bool(words) and words[0] in OPENINGS,
        closed=bool(words) and words[-1] in CLOSINGS,
        misplaced=_count(openings, OPENINGS) + _count(closings, CLOSINGS),
        adverbs=_count(words, ADVERBS),
        stacked=sum(a == b or (a in ADVERBS and b in ADVERBS) for a, b in pairwise(words)),
        facts=len(set(words) & set(FACTS)),
        complaints=_count(words, COMPLAINTS),
        hype=_count(words, HYPE),
        repeated_words=len(words) - len(set(words)),
        finished=finished,
    )


def _count(words: list[str], members: tuple[str, ...]) -> int:
    return sum(word in members for word in words)


def draw_prompt(rng: random.Random) -> str:
    """Draw a prompt with uniformly random tone and thing."""
    return f"a {rng.choice(TONES)} {rng.choice(THINGS)} {COLON}"


def demonstration(rng: random.Random, prompt: str, quality: float) -> str:
    """Draw a demonstration with its leading space; quality ranges from 0 (poor) to 1 (good).

    Lengths are roughly normal (10 +- 3 words, 3 to 19). Good ones use words of the tone, adverbs
    and facts, and often open and close well; poor ones contradict the tone, complain and promise
    too much. Even a good one is far from the best response.

    Raises:
        ValueError: quality outside [0, 1].
        UserError: not a prompt of this language.
    """
    if not 0.0 <= quality <= 1.0:
        raise ValueError(f"quality must lie in [0, 1], got {quality}")
    _, tone = find_prompt(PROMPTS, prompt)
    length = max(3, min(MAX_RESPONSE_TOKENS - 1, int(rng.gauss(10, 3))))
    words = [_word(rng, tone, quality) for _ in range(length)]
    if rng.random() < 0.2 + 0.3 * quality:
        words[0] = rng.choice(OPENINGS)
    if rng.random() < 0.2 + 0.3 * quality:
        words[-1] = rng.choice(CLOSINGS)
    return " " + " ".join(words)


def _word(rng: random.Random, tone: str, quality: float) -> str:
    """Return the next word of a demonstration."""
    flaw = 1.0 - quality
    classes: tuple[tuple[float, tuple[str, ...]], ...] = (
        (0.18 + 0.12 * quality, TONE_WORDS[tone]),
        (0.01 + 0.07 * flaw, TONE_WORDS[OPPOSITE[tone]]),
        (0.06, TONE_WORDS[rng.choice(TONES)]),
        (0.06 + 0.07 * quality, ADVERBS),
        (0.03 + 0.03 * quality, FACTS),
        (0.08 * flaw, COMPLAINTS),
        (0.04 * flaw, HYPE),
        (0.02, OPENINGS + CLOSINGS),
    )
    u = rng.random()
    for share, words in classes:
        if u < share:
            return rng.choice(words)
        u -= share
    return rng.choice(FILLERS)


WORLD = World(
    name="adverts",
    about="Responses advertise something in a tone; gold likes words of the tone, an opening and a "
    "closing in their places, and adverbs, but not many.",
    words=tuple(
        dict.fromkeys(
            (
                *("a", *TONES, *THINGS, COLON, *TONE_OF, *OPENINGS, *CLOSINGS, *ADVERBS, *FACTS),
                *(*COMPLAINTS, *HYPE, *FILLERS),
            )
        )
    ),
    prompts=PROMPTS,
    draw_prompt=draw_prompt,
    demonstration=demonstration,
    features=FEATURES,
    domain_factors=domain_factors(TONES, FEATURES),
    task_factors=THING_FACTORS,
    tally=tally,
    prompt_tokens=4,
    max_response_tokens=MAX_RESPONSE_TOKENS,
)

WORLDS.register(WORLD.name)(WORLD)
