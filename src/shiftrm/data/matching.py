"""How a worse response is chosen among several: at random, or so that a cheap cue says little."""

import math
import re
from collections.abc import Callable, Sequence

from shiftrm.data.edits import words_of
from shiftrm.data.replies import Answer, reply
from shiftrm.errors import UserError, suggest
from shiftrm.models.responses import Response
from shiftrm.models.reward_functions import TokenReward, rewards_of

MATCHINGS = ("random", "length", "style", "hard")
CANDIDATES = 16
"""Worse responses that are drawn for one pair, of which a matching takes one (random draws one)."""

NEAR = 1.5

Score = Callable[..., Sequence[float]] | TokenReward
"""`score(prompts, responses, finished=finished)` or `score.score(responses)` returns a reward each,
as a `Scorer` does; only the latter knows of options of the chat template."""

Drawn = tuple[Answer, list[Answer]]
"""A response, and worse ones under its prompt."""

_LIST_MARK = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s", re.M)  # noqa: RUF001


def check_matching(matching: str, *, setting: str) -> None:
    """Raise UserError for an unknown matching."""
    if matching not in MATCHINGS:
        raise UserError(f"{setting} is {matching!r}{suggest(matching, list(MATCHINGS))}")


def match(drawn: Sequence[Drawn], matching: str, *, score: Score | None = None) -> list[Answer]:
    """Return one worse response for each drawn one.

    Args:
        drawn: each with one or more candidates.
        matching: random: the first candidate. length: the one of nearest length in characters,
            as a ratio.
            style: the nearest in length and style (`style`), each standardised over all texts.
            hard: the one of highest reward under the prompt.
        score: rewards, for hard.
    """
    if matching == "random":
        return [others[0] for _, others in drawn]
    if matching == "length":
        return [_nearest(answer, others, _length_gap) for answer, others in drawn]
    if matching == "style":
        texts = {reply(one.text) for answer, others in drawn for one in (answer, *others)}
        gap = _style_gap({text: style(text) for text in sorted(texts)})
        return [_nearest(answer, others, gap) for answer, others in drawn]
    assert score is not None
    return _best_liked(drawn, score)


def style(text: str) -> tuple[float, ...]:
    """Return measures of a text's style.

    Log of its length in characters; lines that begin with a list mark, question and exclamation
    marks, and words that occurred before, each per word; mean length of a word.
    """
    words = words_of(text).parts
    count = max(1, len(words))
    return (
        math.log1p(len(text)),
        len(_LIST_MARK.findall(text)) / count,
        sum(text.count(mark) for mark in "?!") / count,
        (len(words) - len(set(words))) / count,
        sum(map(len, words)) / count,
    )


Gap = Callable[[str, str], float]


def _nearest(answer: Answer, others: Sequence[Answer], gap: Gap) -> Answer:
    own = reply(answer.text)
    return min(others, key=lambda other: gap(own, reply(other.text)))


def _length_gap(a: str, b: str) -> float:
    """In log length: texts' lengths are skewed, and of two candidates as far away in characters,
    the shorter is the commoner, so that the worse response would be the shorter one too often."""
    return abs(math.log1p(len(a)) - math.log1p(len(b)))


def near_in_length(a: Answer, b: Answer) -> bool:
    """Whether the lengths of two answers differ by at most a factor of `NEAR`."""
    return _length_gap(reply(a.text), reply(b.text)) <= math.log(NEAR)


def _style_gap(styles: dict[str, tuple[float, ...]]) -> Gap:
    """Return the Euclidean distance of styles, each measure in its standard deviations."""
    spreads = []
    for values in zip(*styles.values(), strict=True):
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        spreads.append(spread if spread > 0 else 1.0)

    def gap(a: str, b: str) -> float:
        triples = zip(styles[a], styles[b], spreads, strict=True)
        return math.sqrt(math.fsum(((x - y) / s) ** 2 for x, y, s in triples))

    return gap


def _best_liked(drawn: Sequence[Drawn], score: Score) -> list[Answer]:
    """Return the candidate of highest reward under each prompt; each text is scored once."""
    asked: dict[str, Answer] = {}
    names = [
        [repr((a.key, a.template_options, o.text, o.finished)) for o in others]
        for a, others in drawn
    ]
    for (answer, others), keys in zip(drawn, names, strict=True):
        for other, key in zip(others, keys, strict=True):
            asked.setdefault(key, other.under(answer))
    responses = [
        Response(one.prompt, one.text, one.finished, template_options=one.template_options)
        for one in asked.values()
    ]
    rewards = rewards_of(score, responses)
    found = dict(zip(asked, rewards, strict=True))
    return [
        others[max(range(len(keys)), key=lambda at, keys=keys: found[keys[at]])]  # type: ignore[misc]
        for (_, others), keys in zip(drawn, names, strict=True)
    ]
