"""The gold reward: the true value of a response, a sum of features of its words.

It is not monotone in any feature that it rewards. Up to four topical words help. Praise right
before a topical word helps up to three times; up to four praise words elsewhere earn a little.
Beyond that, repetition and length cost more than praise earns. In the first policy's data, praise
and topical words always look good, so a reward model that extrapolates is wrong where the policy
moves.

Each weight is `base * domain factor * task factor`. The domain factors are drawn once, uniformly
from [0.7, 1.3] and rounded to two decimals, from the fixed seed `TABLE_SEED` (they do not depend on
the seed of a run); the task factors are in `TASK_FACTORS`. `weights(prompt)` shows the product.

The gold reward labels pairs and measures policies. It is not used for training or selection, except
in controls that say so.
"""

from itertools import pairwise
from typing import NamedTuple

from shiftrm.world.language import (
    HEDGES,
    MAX_RESPONSE_TOKENS,
    NEGATIVE,
    PRAISE,
    PROMPT_TOKENS,
    PROMPTS,
    TOPIC_OF,
    TOPICS,
    TOXIC,
    VOCABULARY,
    demonstration,
    draw_prompt,
    parse_prompt,
)
from shiftrm.world.world import (
    DEFAULT_WORLD,
    TABLE_SEED,
    Feature,
    GoldReward,
    World,
    domain_factors,
)

__all__ = [
    "DOMAIN_FACTORS", "FEATURES", "TABLE_SEED", "TASK_FACTORS", "WORLD", "GoldReward", "Tally",
    "explain", "gold_reward", "tally", "weights",
]  # fmt: skip

BEST_LENGTH = 12
"""Number of words up to which a response has no length penalty."""


class Tally(NamedTuple):
    """The counts of one response from which the features are computed."""

    words: int
    distinct_topical: int  # different content words of the prompt's topic
    placed_praise: int  # praise words right before a content word of the prompt's topic
    praise: int
    negative: int
    off_topic: int  # content words of another topic
    toxic: int
    hedges: int
    repeated_pairs: int  # neighbouring word pairs that occurred before
    repeated_words: int  # words that occurred before
    finished: bool


FEATURES: tuple[Feature, ...] = (
    Feature("topical", 1.0, lambda t: min(t.distinct_topical, 4), "different topical words, to 4"),
    Feature("placed_praise", 0.8, lambda t: min(t.placed_praise, 3), "praise of the topic, to 3"),
    Feature("praise_words", 0.2, lambda t: min(t.praise, 4), "praise words anywhere, to 4"),
    Feature("negative", -0.6, lambda t: t.negative, "negative words"),
    Feature("off_topic", -0.5, lambda t: t.off_topic, "words of another topic"),
    Feature("toxic", -1.5, lambda t: t.toxic, "insults"),
    Feature("repeated_pairs", -0.5, lambda t: t.repeated_pairs, "word pairs said again"),
    Feature(
        "repeated_words", -0.35, lambda t: max(0, t.repeated_words - 1), "words said again, past 1"
    ),
    Feature("hedges", -0.15, lambda t: max(0, t.hedges - 1), "hedges past the first"),
    Feature("length", -0.1, lambda t: abs(t.words - BEST_LENGTH), "words away from 12"),
    Feature("unfinished", -1.0, lambda t: float(not t.finished), "no end", varies=False),
)
"""The gold reward's terms, base weights and caps."""

TASK_FACTORS: dict[str, dict[str, float]] = {
    "describe": {"topical": 1.1},
    "review": {"negative": 0.9, "hedges": 0.9},
    "recommend": {"placed_praise": 1.1},
}
"""Task -> feature -> factor; 1 if missing."""


DOMAIN_FACTORS: dict[str, dict[str, float]] = domain_factors(TOPICS, FEATURES)
"""Topic -> feature -> factor in [0.7, 1.3]."""


_PRAISE, _NEGATIVE, _TOXIC, _HEDGES = map(frozenset, (PRAISE, NEGATIVE, TOXIC, HEDGES))


def tally(prompt: str, response: str, *, finished: bool = True) -> Tally:
    """Count what the features need. Words without a class count for length and repetition only."""
    topic = parse_prompt(prompt).topic
    words = response.split()
    topics = [TOPIC_OF.get(word) for word in words]
    praised = [word in _PRAISE for word in words]
    topical = {word for word, of in zip(words, topics, strict=True) if of == topic}
    pairs = list(pairwise(words))
    return Tally(
        words=len(words),
        distinct_topical=len(topical),
        placed_praise=sum(
            is_praise and after == topic
            for is_praise, after in zip(praised, topics[1:], strict=False)
        ),
        praise=sum(praised),
        negative=sum(word in _NEGATIVE for word in words),
        off_topic=sum(of is not None and of != topic for of in topics),
        toxic=sum(word in _TOXIC for word in words),
        hedges=sum(word in _HEDGES for word in words),
        repeated_pairs=len(pairs) - len(set(pairs)),
        repeated_words=len(words) - len(set(words)),
        finished=finished,
    )


WORLD = World(
    name=DEFAULT_WORLD,
    about="Responses describe a topic; gold likes words of the topic and praise of it.",
    words=VOCABULARY,
    prompts=PROMPTS,
    draw_prompt=draw_prompt,
    demonstration=demonstration,
    features=FEATURES,
    domain_factors=DOMAIN_FACTORS,
    task_factors=TASK_FACTORS,
    tally=tally,
    prompt_tokens=PROMPT_TOKENS,
    max_response_tokens=MAX_RESPONSE_TOKENS,
)

weights, explain, gold_reward = WORLD.weights, WORLD.explain, WORLD.gold_reward
