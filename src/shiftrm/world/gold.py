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

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from shiftrm.world.language import (
    HEDGES,
    NEGATIVE,
    PRAISE,
    TASKS,
    TOPIC_OF,
    TOPICS,
    TOXIC,
    PromptKey,
    parse_prompt,
)

BEST_LENGTH = 12
"""Number of words up to which a response has no length penalty."""

TABLE_SEED = 7
FACTOR_RANGE = (0.7, 1.3)


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


@dataclass(frozen=True)
class Feature:
    """One term of the gold reward: `weight * measure(tally)`."""

    name: str
    weight: float
    measure: Callable[[Tally], float]
    meaning: str
    varies: bool = True  # whether domains weigh it differently


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


def _draw_domain_factors() -> dict[str, dict[str, float]]:
    rng = random.Random(TABLE_SEED)
    return {
        topic: {
            feature.name: round(rng.uniform(*FACTOR_RANGE), 2) if feature.varies else 1.0
            for feature in FEATURES
        }
        for topic in TOPICS
    }


DOMAIN_FACTORS: dict[str, dict[str, float]] = _draw_domain_factors()
"""Topic -> feature -> factor in [0.7, 1.3]."""


def _weights(task: str, topic: str) -> dict[str, float]:
    return {
        feature.name: feature.weight
        * DOMAIN_FACTORS[topic][feature.name]
        * TASK_FACTORS[task].get(feature.name, 1.0)
        for feature in FEATURES
    }


_WEIGHTS = {PromptKey(task, topic): _weights(task, topic) for topic in TOPICS for task in TASKS}


def weights(prompt: str) -> dict[str, float]:
    """Return every feature's weight for a prompt: base * domain factor * task factor."""
    return dict(_WEIGHTS[parse_prompt(prompt)])


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


def explain(prompt: str, response: str, *, finished: bool = True) -> dict[str, float]:
    """Return what every feature adds to the gold reward, in the order of `FEATURES`.

    Args:
        prompt: a prompt of the language.
        response: its text, with or without the leading space, without EOS.
        finished: whether the response ended by itself (False: cut off at the length limit).

    Raises:
        UserError: not a prompt of this language.
    """
    counts = tally(prompt, response, finished=finished)
    by_name = _WEIGHTS[parse_prompt(prompt)]
    # + 0.0 turns the -0.0 of an absent flaw into 0.0.
    return {
        feature.name: by_name[feature.name] * feature.measure(counts) + 0.0 for feature in FEATURES
    }


def gold_reward(prompt: str, response: str, *, finished: bool = True) -> float:
    """Return the gold reward of one response, the sum of `explain` (same arguments)."""
    # fsum: exactly rounded, so the same number on every Python version (sum changed in 3.12).
    return math.fsum(explain(prompt, response, finished=finished).values())


class GoldReward:
    """The gold reward as a reward function over a batch, for the control that trains on it."""

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[float]:
        """Return one reward per response; `finished=None` means that all are finished.

        Raises:
            ValueError: sequences of different lengths.
            UserError: a text that is not a prompt of this language.
        """
        ended = [True] * len(responses) if finished is None else finished
        return [
            gold_reward(prompt, response, finished=bool(end))
            for prompt, response, end in zip(prompts, responses, ended, strict=True)
        ]
