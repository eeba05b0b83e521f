"""Comparisons of two responses to a prompt, verdicts on them, and the `Judge` interface."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from shiftrm.data.groups import check_prompt, check_responses
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text, check_template_options, check_text, template_options
from shiftrm.models.responses import Response, group_responses
from shiftrm.progress import Advance

Outcome = Literal["win", "tie", "lose"]
Letter = Literal["A", "B", "C"]


@dataclass(frozen=True)
class Comparison:
    """One prompt with our response and theirs; `finished` as in `rendering.encode`.

    Attributes:
        sampled: both responses with their tokens, if the rows they come from have tokens.
    """

    prompt: Text
    ours: Text
    theirs: Text
    ours_finished: bool = True
    theirs_finished: bool = True
    sampled: tuple[Response, Response] | None = field(default=None, compare=False, repr=False)

    @property
    def sides(self) -> tuple[Response, Response]:
        """Our response and theirs, with tokens if there are any."""
        return self.sampled or (
            Response(self.prompt, self.ours, self.ours_finished),
            Response(self.prompt, self.theirs, self.theirs_finished),
        )

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts."""
        return json.dumps(self.prompt, sort_keys=True)

    @property
    def same_text(self) -> bool:
        """Return whether both texts are equal, so that a reader cannot prefer one."""
        return self.ours == self.theirs

    @property
    def identical(self) -> bool:
        """Return whether the texts are equal, and both are finished or both truncated."""
        return self.same_text and self.ours_finished == self.theirs_finished


@dataclass(frozen=True)
class JudgeAnswer:
    """What a judge wrote, and the verdict read from it.

    Attributes:
        raw: the full text, or the server's message if it refused to answer.
        letter: "A", "B", "C" (tie), or None if no verdict could be read.
        problem: why no verdict could be read; else empty.
        finish_reason: as reported by the server.
    """

    raw: str
    letter: Letter | None
    problem: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one comparison.

    Attributes:
        outcome: ours wins, ties or loses; None if no verdict could be read.
        answers: for judges that read text: with ours as response A, then with theirs as A.
        scores: for judges that give scores: ours and theirs.
        note: "identical", or why there is no outcome.
    """

    comparison: Comparison
    outcome: Outcome | None
    answers: tuple[JudgeAnswer, ...] = ()
    scores: tuple[float, float] | None = None
    note: str = ""

    @property
    def letters(self) -> tuple[Letter, Letter] | None:
        """The verdicts in both orders, if both were read."""
        if len(self.answers) != 2:
            return None
        first, second = (answer.letter for answer in self.answers)
        return None if first is None or second is None else (first, second)


class Judge(Protocol):
    """Compares responses. Reports refer to it by `name`."""

    name: str

    def judge(
        self, comparisons: Sequence[Comparison], *, progress: Advance | None = None
    ) -> list[Verdict]:
        """Return one verdict per comparison, in the same order."""


def of_both_orders(first: Letter, second: Letter) -> Outcome:
    """Combine the verdicts of both orders (ours as A, then theirs as A) into the outcome for ours.

    If the orders disagree, it is a tie (MT-bench, arXiv 2306.05685, Section 3.4), even for a win
    in one order and a tie in the other.
    """
    if (first, second) == ("A", "B"):
        return "win"
    if (first, second) == ("B", "A"):
        return "lose"
    return "tie"


def judge_pairs(
    judge: Judge,
    rows_ours: Sequence[Row],
    rows_theirs: Sequence[Row],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Advance | None = None,
) -> list[Verdict]:
    """Match two sets of responses by prompt, draw `limit` prompts, and have them judged.

    Args:
        rows_ours, rows_theirs: `{"prompt", "responses", "finished"?}` as `shiftrm sample` writes
            them, or `{"prompt", "response"}`; see `match_rows`.
        limit, seed: see `draw`; None judges all.

    Raises:
        UserError: as `match_rows`, and as the judge raises.
    """
    chosen = draw(match_rows(rows_ours, rows_theirs), limit, seed=seed)
    return judge.judge(chosen, progress=progress)


def match_rows(
    rows_ours: Sequence[Row],
    rows_theirs: Sequence[Row],
    *,
    names: tuple[str, str] = ("ours", "theirs"),
) -> list[Comparison]:
    """Return comparisons of rows with equal prompts, in the order of ours.

    The first response of a row is compared, whatever others it has. A prompt that occurs several
    times must do so on both sides; the occurrences are matched in order.

    Raises:
        UserError: rows without prompt or response, or prompts that differ (with an example).
    """
    ours, theirs = (
        [_first(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
        for name, rows in zip(names, (rows_ours, rows_theirs), strict=True)
    )
    for name, found in zip(names, (ours, theirs), strict=True):
        if not found:
            raise UserError(f"{name}: no responses to compare")
    _require_equal_prompts([key for key, *_ in ours], [key for key, *_ in theirs], names)
    waiting: defaultdict[str, list[Response]] = defaultdict(list)
    for key, _, response in reversed(theirs):
        waiting[key].append(response)
    comparisons = []
    for key, prompt, first in ours:
        other = waiting[key].pop()
        comparisons.append(
            Comparison(
                prompt, first.text, other.text, first.finished, other.finished, (first, other)
            )
        )
    return comparisons


def draw(comparisons: Sequence[Comparison], limit: int | None, *, seed: int) -> list[Comparison]:
    """Draw `limit` comparisons at random, in their original order; all if there are no more.

    The draw depends only on the set of prompts and the seed, not on the order of the rows, so every
    pair of policies is judged on the same prompts.
    """
    if limit is None or limit >= len(comparisons):
        return list(comparisons)
    by_prompt = sorted(range(len(comparisons)), key=lambda i: comparisons[i].prompt_key)
    chosen = random.Random(seed).sample(by_prompt, limit)
    return [comparisons[i] for i in sorted(chosen)]


def _first(row: Row, where: str) -> tuple[str, Text, Response]:
    """Return the key of the prompt, the prompt, and the first response."""
    check_prompt(row, where)
    check_template_options(row, where)
    prompt = row.get("prompt")
    if prompt is None or prompt == []:
        raise UserError(f"{where}: has no 'prompt'; responses are matched by their prompts")
    if "responses" in row:
        if not check_responses(row, where):
            raise UserError(f"{where}: column 'responses' is an empty list; remove the row")
        first = group_responses(row)[0]
    elif "response" in row:
        check_text(row["response"], f"{where}: column 'response'")
        finished = row.get("finished", True)
        if not isinstance(finished, bool):
            raise UserError(f"{where}: column 'finished' is {finished!r}; expected true or false")
        first = Response(prompt, row["response"], finished, template_options=template_options(row))
    else:
        raise UserError(
            f"{where}: has neither 'responses' nor 'response'; it has {', '.join(map(repr, row))}"
        )
    return json.dumps(prompt, sort_keys=True), prompt, first


def _require_equal_prompts(ours: list[str], theirs: list[str], names: tuple[str, str]) -> None:
    missing = {
        names[0]: Counter(theirs) - Counter(ours),
        names[1]: Counter(ours) - Counter(theirs),
    }
    said = [
        f"{counts.total()} not in {name}, such as {_shown(next(iter(counts)))}"
        for name, counts in missing.items()
        if counts
    ]
    if said:
        raise UserError(
            f"{names[0]} and {names[1]} answer different prompts: {'; '.join(said)}; sample both "
            "policies on the same prompts"
        )


def _shown(key: str) -> str:
    """Return the start of a prompt. It is safe to print, since JSON has no control characters."""
    return key if len(key) <= 80 else f"{key[:77]}..."
