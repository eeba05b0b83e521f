"""The rows of a contrast: responses of the policy, or of the pairs, against presumably worse ones.

Responses that are too long for the trainer are left out before anything is drawn, so that as many
rows are made as were asked for.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftrm.data.groups import read_groups
from shiftrm.data.negatives import NEGATIVES, lacking, negative_pairs
from shiftrm.data.pairs import FINISHED
from shiftrm.data.replies import Answer, answers_of, reply
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.score_once import score_fitting
from shiftrm.models.rendering import (
    Text,
    encode,
    encode_prompt,
    option_columns,
    template_options,
)
from shiftrm.models.responses import Response
from shiftrm.models.rope import LengthLimit
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.pair_batches import without_added_nulls

if TYPE_CHECKING:
    from shiftrm.trainers.contrast import ContrastSettings

__all__ = ["FitsLimit", "LongIsWorst", "as_groups", "contrast_rows", "rows_of"]

logger = logging.getLogger(__name__)


NEAR_LIMIT = 64
"""Tokens by which the sum of the tokens of a prompt and of a response may miss those of both."""


class FitsLimit:
    """Whether a response with its prompt is within a limit.

    Most are far from it: every prompt and every response is encoded once, and both together only
    where their sum is near the limit.
    """

    def __init__(self, tokenizer: Any, limit: LengthLimit) -> None:
        self.limit = limit
        self._tokenizer = tokenizer
        self._counts: dict[int, int] = {}

    def __call__(self, answer: Answer | Response) -> bool:
        if self.limit.tokens is None:
            return True
        about = self._count(reply(answer.text))
        if answer.prompt:
            about += self._count(answer.prompt, dict(answer.template_options))
        if abs(about - self.limit.tokens) > NEAR_LIMIT:
            return about < self.limit.tokens
        ids = encode(
            self._tokenizer,
            answer.prompt,
            answer.text,
            finished=answer.finished,
            template_options=dict(answer.template_options),
        )
        return len(ids) <= self.limit.tokens

    def _count(self, text: Text, options: dict[str, Any] | None = None) -> int:
        name = hash(repr((text, options)))
        if name not in self._counts:
            ids = encode_prompt(self._tokenizer, text, template_options=options)
            self._counts[name] = len(ids)
        return self._counts[name]


@dataclass(frozen=True)
class _Source:
    """Groups that a contrast is made from, and how many of their responses are too long."""

    name: str
    groups: list[Row]
    answers: int
    too_long: int

    def too_long_words(self, fits: FitsLimit | None) -> str:
        if fits is None or not self.too_long:
            return ""
        return (
            f"; {self.too_long} of {self.answers} responses are {fits.limit.reason} with their "
            "prompts"
        )


def contrast_rows(
    args: "ContrastSettings",
    pairs: Sequence[Row],
    groups: Any,
    reward: str | Path | None,
    *,
    count: int | None,
    fits: FitsLimit | None = None,
) -> list[Row]:
    """Return contrast rows as the settings say, as many of each way and source (give or take one).

    A way that can make nothing worse is left out with a warning, unless all are such.

    Args:
        pairs, groups: the labelled pairs, and the groups of the policy's responses or their file.
        reward: folder of a reward model, for hard.
        count: of rows; None: one for each response of the sources that is not too long.
        fits: holds for every side of every row; other responses are left out, counted in a warning.

    Raises:
        UserError: the source or the reward model is missing, all responses are too long, or no way
            can make anything worse.
    """
    sources = _sources(args, pairs, groups, fits)
    score = None
    if args.contrast_matching == "hard":
        if reward is None:
            raise UserError(
                "contrast_matching is 'hard', which needs the last round's reward model; use a "
                "method that is given it, such as contrast_hard"
            )
        score = LongIsWorst(reward)
    if count is None:
        count = sum(source.answers - source.too_long for source in sources)
    cells = _usable(sources, args.contrast_negatives, fits)
    made: list[Row] = []
    for number, (source, kind) in enumerate(cells):
        part = count // len(cells) + (number < count % len(cells))
        matching, seed = args.contrast_matching, args.seed
        try:
            made += negative_pairs(
                source.groups, kind, part, matching=matching, seed=seed, score=score, fits=fits
            )
        except UserError as error:
            raise UserError(f"{error}{source.too_long_words(fits)}") from None
    return made


def _sources(
    args: "ContrastSettings", pairs: Sequence[Row], groups: Any, fits: FitsLimit | None
) -> list[_Source]:
    """Return what the settings name; say what is too long, and refuse if nothing else is left."""
    given = []
    if args.contrast_source != "pairs":
        if groups is None:
            raise UserError(
                f"contrast_source is {args.contrast_source!r}, which needs groups of the policy's "
                "responses; give them, or set contrast_source to pairs"
            )
        given.append(("the groups", rows_of(groups, read_groups)))
    if args.contrast_source != "policy":
        given.append(("the pairs", as_groups(pairs)))
    sources = []
    for name, rows in given:
        answers = answers_of(rows)
        too_long = 0 if fits is None else sum(not fits(answer) for answer in answers)
        sources.append(_Source(name, rows, len(answers), too_long))
    total, long = (sum(getattr(one, name) for one in sources) for name in ("answers", "too_long"))
    if fits is not None and total and long == total:
        raise UserError(
            f"contrast: all {total} responses of {' and '.join(one.name for one in sources)} are "
            f"{fits.limit.reason} with their prompts, so nothing is left to contrast; "
            f"{fits.limit.advice}"
        )
    for one in sources:
        if fits is not None and one.too_long:
            logger.warning(
                "contrast: left out %d of the %d responses of %s, %s with their prompts",
                one.too_long,
                one.answers,
                one.name,
                fits.limit.reason,
            )
    return sources


def _usable(
    sources: Sequence[_Source], kinds: Sequence[str], fits: FitsLimit | None
) -> list[tuple[_Source, str]]:
    """Return the sources with the ways that can make something worse of them.

    Raises:
        UserError: there is none; says what the first one lacks.
    """
    found: list[tuple[_Source, str]] = []
    without: list[tuple[_Source, str, str]] = []
    for source in sources:
        for kind in kinds:
            needs = lacking(source.groups, kind, fits=fits)
            if needs is None:
                found.append((source, kind))
            else:
                without.append((source, kind, needs + source.too_long_words(fits)))
    if not found:
        source, kind, needs = without[0]
        label = NEGATIVES.get(kind).label
        raise UserError(f"{kind}: {label} needs {needs} (contrast of {source.name})")
    for source, kind, needs in without:
        logger.warning("contrast leaves out %s of %s, which needs %s", kind, source.name, needs)
    return found


def as_groups(pairs: Iterable[Row]) -> list[Row]:
    """Return pairs as groups of two, the chosen response first."""
    return [
        {
            "prompt": pair.get("prompt"),
            "responses": [pair["chosen"], pair["rejected"]],
            "finished": [True if pair.get(name) is None else pair[name] for name in FINISHED],
            **option_columns(template_options(pair)),
        }
        for pair in pairs
    ]


class LongIsWorst:
    """The rewards of a checkpoint; text beyond its context gets -inf."""

    def __init__(self, reward: str | Path) -> None:
        self._name = str(reward)
        self._scorer = Scorer.from_pretrained(reward).to_accelerator()

    def score(self, responses: Sequence[Response]) -> list[float]:
        """Return the rewards of responses."""
        places = [f"contrast, row {i}" for i in range(len(responses))]
        rewards = score_fitting(self._scorer, responses, places, name=self._name)
        return [-math.inf if one is None else one for one in rewards]


def rows_of(source: Any, read: Any) -> list[Row]:
    """Return rows that are given as such, as a data set, or as the name of one."""
    given = read(source) if isinstance(source, str | Path) else without_added_nulls(source)
    return list(given)
