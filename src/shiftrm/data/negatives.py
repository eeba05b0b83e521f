"""Ways to make a response that is presumably worse, without labels.

Each way takes an answer of the policy and makes a response that should be worse under the same
prompt: the answer to another prompt, or the answer itself with a fault. That holds for most prompts
and texts, not for all. The better half of an answer that goes on too long may be the first one, so
that cutting it is no fault. Measure it where a true reward is known (docs/methods.md).

To add a way, register a `Negative` here, or give `package.module:attribute` as its name.

Answers to other prompts are the "non-contextual" negatives of RRM (Liu et al., arXiv 2409.13156),
who draw them from labelled pairs.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shiftrm.config import parse_yaml
from shiftrm.data.edits import cut, repeated, shuffled, words_of
from shiftrm.data.languages import SENTENCES, language_of
from shiftrm.data.loaded import no_text
from shiftrm.data.matching import (
    CANDIDATES,
    MATCHINGS,
    NEAR,
    Drawn,
    Score,
    check_matching,
    match,
    near_in_length,
)
from shiftrm.data.replies import Answer, answers_of, has_prompt, normal_spaces, reply, with_reply
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text, option_columns
from shiftrm.registry import Registry

__all__ = [
    "MATCHINGS",
    "NEGATIVES",
    "Fits",
    "Negative",
    "Score",
    "lacking",
    "negative_pairs",
    "two_way_pairs",
    "with_own",
]

Fits = Callable[[Answer], bool]
"""Whether a response can be read with its prompt, such as within a length limit."""

MISSES = 100_000
"""Draws in a row without a worse response after which a way is given up."""


@dataclass(frozen=True)
class Negative:
    """A way to make a worse response.

    Attributes:
        label: what the worse response is, for pages and messages.
        needs: what it needs, for the error if no answer has it.
        usable: returns those of the answers that it can make worse.
        worse: `worse(answer, answers, rng)` draws a worse response under the answer's prompt (with
            its `text` and `finished`), or None where this draw gives none.
        matched: whether a matching chooses among several. If not, one is drawn whatever the
            matching: of a text cut at 16 places, the nearest in length is always the latest cut.
        low: what a reward model does not see that prefers the answer in few of the pairs.
        warns: whether a low share is a warning. In the gold world reward models that did not see
            cut or shuffled responses were the more accurate ones (docs/methods.md).
    """

    label: str
    needs: str
    usable: Callable[[Sequence[Answer]], list[Answer]]
    worse: Callable[[Answer, Sequence[Answer], random.Random], Answer | None]
    matched: bool = True
    low: str = "A number near 0.5 means that the reward does not see this change."
    warns: bool = True


NEGATIVES = Registry[Negative]("way to make a worse response", Negative)


def negative_pairs(
    groups: Sequence[Row],
    kind: str,
    count: int,
    *,
    matching: str = "random",
    seed: int = 0,
    score: Score | None = None,
    fits: Fits | None = None,
) -> list[Row]:
    """Return `count` pairs of a response (chosen) and one that is worse (rejected).

    Answers are drawn with replacement, so two pairs may share one. The same arguments give the same
    pairs.

    Args:
        groups: `{"prompt", "responses", "finished"?}`, strings or chat messages; prompts may
            repeat. Responses without a prompt, and blank ones, are left out.
        kind: a name in `NEGATIVES`.
        matching: which of `CANDIDATES` worse responses is taken; see `matching.match`. "random"
            draws one. Where responses to other prompts are matched by length or style, each of the
            two is preferred under its own prompt once: a reward that does not look at the prompt
            is right in one half of the pairs, whatever the lengths.
        score: for hard: see `matching.Score`. Up to `CANDIDATES * count` responses are scored.
        fits: responses for which it is false are neither taken nor made; by default all fit.

    Returns:
        Preference rows with `prompt`, `chosen`, `rejected`, `chosen_finished`,
        `rejected_finished`, and the prompt's columns for the chat template. The two sides always
        differ.

    Raises:
        UserError: an unknown kind or matching, hard without `score`, or no answer that this kind
            can make worse.
    """
    two_way = _is_two_way(kind, matching)
    size = -(-count // 2) if two_way else count
    drawn = _drawn(groups, kind, size, matching=matching, seed=seed, score=score, fits=fits)
    if two_way:
        return [pair for couple in drawn for pair in _both_ways(*couple)][:count]
    return [_pair(answer, worse) for answer, worse in drawn]


def two_way_pairs(groups: Sequence[Row], count: int, *, seed: int = 0) -> list[tuple[Row, Row]]:
    """Return `count` couples of answers to two prompts of about one length, each as two pairs.

    A reward that does not look at the prompt, such as the length, is right in exactly one pair of a
    couple or ties in both. No pair comes twice. There are fewer couples if some of those drawn are
    not of about one length (`matching.near_in_length`), or come again.

    Raises:
        UserError: as `negative_pairs` for other_prompt; or no couple is of about one length.
    """
    drawn = _drawn(groups, OTHER_PROMPT, count, matching="length", seed=seed, score=None, fits=None)
    near = [couple for couple in drawn if near_in_length(*couple)]
    if not near:
        raise UserError(
            f"{OTHER_PROMPT}: no response has about the length of one to another prompt (within a "
            f"factor of {NEAR:g}), so length would be a cue"
        )
    found: set[str] = set()
    couples = []
    for one, other in near:
        pairs = _both_ways(one, other)
        names = [json.dumps(pair, sort_keys=True) for pair in pairs]
        if found.isdisjoint(names):
            couples.append(pairs)
            found.update(names)
    return couples


def _drawn(
    groups: Sequence[Row],
    kind: str,
    count: int,
    *,
    matching: str,
    seed: int,
    score: Score | None,
    fits: Fits | None,
) -> list[tuple[Answer, Answer]]:
    """Return answers, each with one that is worse; see `negative_pairs`."""
    negative = NEGATIVES.get(kind)
    check_matching(matching, setting="matching")
    if matching == "hard" and score is None:
        raise UserError("matching is 'hard', which needs a reward model to choose by; give score")
    answers = _fitting(answers_of(groups), fits)
    usable = negative.usable(answers)
    if not usable:
        raise UserError(f"{kind}: {negative.label} needs {_needs(negative, groups)}")
    matching = matching if negative.matched else "random"
    size = 1 if matching == "random" else CANDIDATES
    ways = 2 if _is_two_way(kind, matching) else 1
    rng = random.Random(f"contrast/{seed}" if kind == OTHER_PROMPT else f"{kind}/{seed}")
    drawn: list[Drawn] = []
    misses = 0
    while len(drawn) < count:
        answer = rng.choice(usable)
        found = [negative.worse(answer, answers, rng) for _ in range(size)]
        others = [
            worse
            for worse in found
            if worse is not None
            and _differs(worse.text, answer)
            and (fits is None or all(map(fits, _exchanged(answer, worse)[:ways])))
        ]
        if others:
            drawn.append((answer, others))
        misses = 0 if others else misses + 1
        if misses >= MISSES:
            raise UserError(f"{kind}: {negative.label} needs {negative.needs}; hardly any has")
    chosen = match(drawn, matching, score=score)
    return [(answer, worse) for (answer, _), worse in zip(drawn, chosen, strict=True)]


def with_own(names: str | Sequence[str] | None) -> list[str]:
    """Return the registered kinds, and those of the names that are import paths."""
    given = parse_yaml(names, "contrast_negatives", word=True) if isinstance(names, str) else names
    given = [given] if isinstance(given, str) else given or []
    own = dict.fromkeys(name for name in given if isinstance(name, str) and ":" in name)
    return [*NEGATIVES.names(), *own]


def lacking(groups: Sequence[Row], kind: str, *, fits: Fits | None = None) -> str | None:
    """Return what `negative_pairs` needs to make this kind and these groups lack; else None."""
    negative = NEGATIVES.get(kind)
    usable = negative.usable(_fitting(answers_of(groups), fits))
    return None if usable else _needs(negative, groups)


def _fitting(answers: list[Answer], fits: Fits | None) -> list[Answer]:
    return answers if fits is None else [answer for answer in answers if fits(answer)]


def _needs(negative: Negative, groups: Sequence[Row]) -> str:
    """Return what groups that are not usable lack: prompts, text, or what the kind needs."""
    if groups and not any(has_prompt(row) for row in groups):
        return "responses with a prompt of their own (column 'prompt')"
    if groups and not answers_of(groups):
        return "responses that are not blank"
    return negative.needs


def _differs(text: Text, answer: Answer) -> bool:
    return normal_spaces(text) != normal_spaces(answer.text) and not no_text(text)


def _is_two_way(kind: str, matching: str) -> bool:
    return kind == OTHER_PROMPT and matching in ("length", "style")


def _exchanged(answer: Answer, worse: Answer) -> tuple[Answer, Answer]:
    """Each of the two under the other one's prompt."""
    return worse.under(answer), answer.under(worse)


def _both_ways(one: Answer, other: Answer) -> tuple[Row, Row]:
    return _pair(one, other), _pair(other, one)


def _pair(answer: Answer, worse: Answer) -> Row:
    return {
        "prompt": answer.prompt,
        "chosen": answer.text,
        "rejected": worse.text,
        "chosen_finished": answer.finished,
        "rejected_finished": worse.finished,
        **option_columns(answer.template_options),
    }


# -- an answer to another prompt -----------------------------------------------------------------

OTHER_PROMPT = "other_prompt"


def _all_or_none(answers: Sequence[Answer]) -> list[Answer]:
    several = (
        len({a.key for a in answers}) > 1 and len({str(normal_spaces(a.text)) for a in answers}) > 1
    )
    return list(answers) if several else []


def _to_another_prompt(
    answer: Answer, answers: Sequence[Answer], rng: random.Random
) -> Answer | None:
    other = rng.choice(answers)
    return other if other.key != answer.key and _differs(other.text, answer) else None


NEGATIVES.register(OTHER_PROMPT)(
    Negative(
        "a response to another prompt",
        "responses to at least two prompts, and not all equal",
        _all_or_none,
        _to_another_prompt,
        low="A number near 0.5 means that the reward hardly looks at the prompt; a policy can "
        "raise it by answers that fit any prompt.",
    )
)


# -- the answer with a fault ---------------------------------------------------------------------

Edit = Callable[[str, random.Random], str | None]


def _edited(
    label: str,
    needs: str,
    low: str,
    edit: Edit,
    *,
    finished_only: bool = False,
    matched: bool = True,
    warns: bool = True,
) -> Negative:
    """Return the way that changes the words of an answer with a function of `edits`."""

    def usable(answers: Sequence[Answer]) -> list[Answer]:
        ended = [a for a in answers if a.finished or not finished_only]
        return [a for a in ended if edit(reply(a.text), random.Random(0)) is not None]

    def worse(answer: Answer, _: Sequence[Answer], rng: random.Random) -> Answer | None:
        words = edit(reply(answer.text), rng)
        return None if words is None else answer._replace(text=with_reply(answer.text, words))

    return Negative(label, needs, usable, worse, matched, low, warns)


for _name, _negative in {
    "repeated": _edited(
        "the response with a part said again",
        "responses of three words or more",
        "A number near or below 0.5 means that repetition costs nothing; a policy can raise the "
        "reward by saying things twice.",
        repeated,
    ),
    "cut": _edited(
        "the response cut off in the middle",
        "finished responses of six words or more",
        "A number near or below 0.5 means that the reward does not see whether an answer is "
        "complete; a policy can stop anywhere. It may be right if the answers go on for too long: "
        "read some.",
        cut,
        finished_only=True,
        matched=False,
        warns=False,
    ),
    "shuffled": _edited(
        "the response in another order of words",
        "responses of five different words or more",
        "A number near 0.5 means that the reward looks at which words occur and not at their "
        "order; a policy can raise it by listing words that score well.",
        shuffled,
        warns=False,
    ),
}.items():
    NEGATIVES.register(_name)(_negative)


# -- another language ----------------------------------------------------------------------------


def _of_known_language(answers: Sequence[Answer]) -> list[Answer]:
    """The finished answers to prompts of a known language, unless they are in another one."""
    found = {a.key: language_of(_all_words(a.prompt)) for a in answers}
    return [
        a
        for a in answers
        if a.finished
        and found[a.key] is not None
        and reply(a.text).strip()
        and language_of(reply(a.text)) in (None, found[a.key])
    ]


def _in_another_language(answer: Answer, _: Sequence[Answer], rng: random.Random) -> Answer | None:
    """General sentences of another language, of about the answer's length.

    No sentence comes twice, so the length falls short of answers of more than about 600 letters.
    """
    own = language_of(_all_words(answer.prompt))
    words = reply(answer.text)
    name = rng.choice([name for name in SENTENCES if name != own])
    order = rng.sample(SENTENCES[name], len(SENTENCES[name]))
    length, text = len(words.strip()), ""
    for sentence in order:
        longer = f"{text} {sentence}".strip()
        if abs(len(longer) - length) < abs(len(text) - length):
            text = longer
    text = words_of(words).lead + (text or min(order, key=len))
    return answer._replace(text=with_reply(answer.text, text), finished=True)


def _all_words(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(reply([message]) for message in prompt)


NEGATIVES.register("language")(
    Negative(
        "general sentences in another language",
        "finished responses to prompts of a known language (English, German, French, Spanish, "
        "Italian or Portuguese)",
        _of_known_language,
        _in_another_language,
        low="A number near 0.5 means that the reward does not see in which language an answer is; "
        "a policy may change the language.",
    )
)
