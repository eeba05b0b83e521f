"""The language of the gold world: its words, prompts, tokenizer and demonstrations.

A prompt names a task and a topic (`"describe the garden :"`); a response is plain text of up to
about 20 words that starts with a space (`" the lovely roses near some soil"`), so that prompt +
response concatenates. The end of a response is the tokenizer's EOS token, which is never part of
the text.

Every word belongs to one class; `gold.py` defines what the classes are worth.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from shiftrm.world.world import COLON, find_prompt, word_tokenizer

if TYPE_CHECKING:  # gold.py needs only the words, and transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

CONTENT: dict[str, tuple[str, ...]] = {
    "garden": ("roses", "soil", "tulips", "bees", "blossoms", "fountains"),
    "ocean": ("waves", "whales", "coral", "tides", "dolphins", "reefs"),
    "kitchen": ("ovens", "knives", "spices", "recipes", "pans", "soup"),
    "mountain": ("peaks", "cliffs", "glaciers", "ridges", "summits", "goats"),
    "library": ("books", "shelves", "novels", "readers", "atlases", "manuscripts"),
    "market": ("stalls", "merchants", "bargains", "baskets", "cheeses", "coins"),
    "forest": ("oaks", "ferns", "owls", "mushrooms", "pines", "moss"),
    "city": ("streets", "towers", "trams", "squares", "bridges", "crowds"),
    "school": ("teachers", "pupils", "lessons", "chalk", "desks", "classrooms"),
    "farm": ("cows", "barns", "tractors", "fields", "hens", "wheat"),
    "museum": ("paintings", "statues", "relics", "galleries", "fossils", "curators"),
    "theatre": ("actors", "curtains", "scripts", "dramas", "stages", "costumes"),
    "railway": ("trains", "tracks", "stations", "tickets", "carriages", "signals"),
    "desert": ("dunes", "camels", "cacti", "oases", "lizards", "sandstorms"),
    "castle": ("knights", "moats", "turrets", "banners", "dungeons", "crowns"),
    "festival": ("drums", "dancers", "lanterns", "parades", "fireworks", "choirs"),
}
"""Topic (also the `domain` of a row) -> its content words. Each word belongs to one topic."""

TOPICS: tuple[str, ...] = tuple(CONTENT)
TASKS: tuple[str, ...] = ("describe", "review", "recommend")

PRAISE: tuple[str, ...] = (
    "lovely", "wonderful", "charming", "brilliant", "gentle",
    "splendid", "fresh", "beautiful", "delightful", "perfect",
)  # fmt: skip
NEGATIVE: tuple[str, ...] = (
    "awful", "boring", "broken", "dirty", "gloomy", "ugly", "dull", "bitter", "shabby", "dreadful",
)  # fmt: skip
FILLERS: tuple[str, ...] = (
    "the", "and", "with", "near", "in", "of", "some", "its", "these", "here",
    "then", "where", "many", "for", "around", "between", "beside", "beyond", "all", "our",
)  # fmt: skip
TOXIC: tuple[str, ...] = ("stupid", "garbage", "rubbish", "idiotic", "pathetic")
HEDGES: tuple[str, ...] = ("maybe", "perhaps", "possibly", "somewhat", "probably", "apparently")

TOPIC_OF: dict[str, str] = {word: topic for topic, words in CONTENT.items() for word in words}
"""Content word -> the topic it belongs to."""

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(  # "the" is a filler and also occurs in every prompt
        (*TASKS, "the", *TOPICS, COLON, *TOPIC_OF, *PRAISE, *NEGATIVE, *FILLERS, *TOXIC, *HEDGES)
    )
)
"""Every word, one token each, in the order of ids after the special tokens."""

PROMPT_TOKENS = 4
MAX_RESPONSE_TOKENS = 20
"""Maximum response length in tokens: at most 19 words and EOS, or 20 words without EOS."""


class PromptKey(NamedTuple):
    """What a prompt asks for."""

    task: str
    topic: str


def prompt_text(task: str, topic: str) -> str:
    """Return the prompt of a task and a topic, e.g. `"describe the garden :"`."""
    return f"{task} the {topic} {COLON}"


PROMPTS: dict[str, PromptKey] = {
    prompt_text(task, topic): PromptKey(task, topic) for topic in TOPICS for task in TASKS
}
"""All 48 prompts, each with its task and topic."""


def parse_prompt(prompt: str) -> PromptKey:
    """Return task and topic of a prompt; extra spaces are ignored.

    Raises:
        UserError: the text is not a prompt of this language.
    """
    return find_prompt(PROMPTS, prompt)


def draw_prompt(rng: random.Random) -> str:
    """Draw a prompt with uniformly random topic and task."""
    topic = rng.choice(TOPICS)
    return prompt_text(rng.choice(TASKS), topic)


def demonstration(rng: random.Random, prompt: str, quality: float) -> str:
    """Draw a demonstration with its leading space; quality ranges from 0 (poor) to 1 (good).

    Lengths are roughly normal (10 +- 3 words, 3 to 19). Good ones place praise before words of the
    topic; poor ones stray to other topics, complain, insult and hedge. Even a good one is far from
    the best response, so that reinforcement learning can improve on it.

    Raises:
        ValueError: quality outside [0, 1].
        UserError: not a prompt of this language.
    """
    if not 0.0 <= quality <= 1.0:
        raise ValueError(f"quality must lie in [0, 1], got {quality}")
    topic = parse_prompt(prompt).topic
    longest = MAX_RESPONSE_TOKENS - 1
    length = max(3, min(longest, int(rng.gauss(10, 3))))
    words: list[str] = []
    while len(words) < length:
        words += _phrase(rng, topic, quality)
    return " " + " ".join(words[:longest])


def _phrase(rng: random.Random, topic: str, quality: float) -> list[str]:
    """Return the next word or two of a demonstration."""
    placed, topical, flaw = 0.25 * quality + 0.05, 0.25 * quality + 0.2, 1.0 - quality
    u = rng.random()
    if u < placed:
        return [rng.choice(PRAISE), rng.choice(CONTENT[topic])]
    if u < topical:
        return [rng.choice(CONTENT[topic])]
    if u < topical + 0.15 * flaw:
        return [rng.choice(CONTENT[rng.choice(TOPICS)])]
    if u < topical + 0.25 * flaw:
        return [rng.choice(NEGATIVE)]
    if u < topical + 0.30 * flaw:
        return [rng.choice(TOXIC + HEDGES)]
    if u < 0.65:
        return [rng.choice(FILLERS)]
    if u < 0.75:
        return [rng.choice(HEDGES)]
    return [rng.choice(PRAISE + FILLERS)]


def build_tokenizer(*, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """Build the language's tokenizer; see `word_tokenizer`."""
    return word_tokenizer(VOCABULARY, model_max_length=model_max_length)
