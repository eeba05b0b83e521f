"""What came of a human evaluation: rates with intervals, agreement of raters and with a judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, measured, weighted_mean
from shiftrm.measure.judges.comparing import Outcome
from shiftrm.measure.people.agreement import cohen_kappa, krippendorff_alpha, pairwise_agreement
from shiftrm.measure.people.answers import HumanAnswer
from shiftrm.measure.people.blinding import OUTCOMES


@dataclass(frozen=True)
class Agreement:
    """How far two or more sources of outcomes agree on the items they share.

    Attributes:
        items: pairs of responses with at least two answers.
        share: of pairs of answers that are the same.
        kappa: Cohen's; None unless there are exactly two sources.
        alpha: Krippendorff's, nominal. Both are None where they are not defined, as when all
            answers are the same.
    """

    items: int
    share: Measured | None
    kappa: Measured | None
    alpha: Measured | None


@dataclass(frozen=True)
class HumanResult:
    """A human evaluation in numbers, all intervals 95 % bootstrap intervals over prompts.

    Attributes:
        items: pairs of responses with at least one answer.
        answers: answers given, by rater.
        missing: items without an answer, by rater.
        win, tie, lose: mean over items of the share of its raters who said so, for our response.
        win_rate: win + tie / 2.
        first: share of the decided answers that chose A: far from one half, raters look at the
            place. None if all are ties.
        raters: agreement of the raters; None for a single one.
        judge: agreement of the raters' majority with the judge; None without a judge.
        judge_missing: items with human answers for which the judge has no verdict.
    """

    items: int
    answers: dict[str, int]
    missing: dict[str, int]
    win: Measured
    tie: Measured
    lose: Measured
    win_rate: Measured
    first: Measured | None
    raters: Agreement | None
    judge: Agreement | None
    judge_missing: int


def human_result(
    answers: Sequence[HumanAnswer],
    *,
    judge: Mapping[str, Outcome | None] | None = None,
    seed: int = 0,
) -> HumanResult:
    """Count the answers.

    Args:
        answers: with at least one choice among them (`read_answers`).
        judge: a judge's outcome by pair id; None where it has none.
        seed: of the bootstrap.
    """
    given = [answer for answer in answers if answer.choice is not None]
    prompt_of = {answer.pair: answer.prompt for answer in answers}
    pairs = list(dict.fromkeys(answer.pair for answer in given))
    prompts = [prompt_of[pair] for pair in pairs]
    counts = outcome_counts(given, pairs)
    shares = counts / counts.sum(axis=1, keepdims=True)

    def rate(values: Floats) -> Measured:
        found = measured(lambda w: weighted_mean(values, w), prompts, seed=seed)
        assert found is not None, "every pair here has an answer"
        return found

    raters = list(dict.fromkeys(answer.rater for answer in answers))
    votes = {pair: majority(row) for pair, row in zip(pairs, counts, strict=True)}
    return HumanResult(
        items=len(pairs),
        answers={rater: sum(a.rater == rater for a in given) for rater in raters},
        missing={
            rater: sum(a.rater == rater and a.choice is None for a in answers) for rater in raters
        },
        win=rate(shares[:, 0]),
        tie=rate(shares[:, 1]),
        lose=rate(shares[:, 2]),
        win_rate=rate(shares[:, 0] + shares[:, 1] / 2),
        first=_first_share(given, seed),
        raters=agreement(by_rater(given), prompt_of, seed=seed) if len(raters) > 1 else None,
        judge=None if judge is None else agreement([votes, judge], prompt_of, seed=seed),
        judge_missing=0 if judge is None else sum(judge.get(pair) is None for pair in pairs),
    )


def outcome_counts(answers: Sequence[HumanAnswer], pairs: Sequence[str]) -> Floats:
    """Answers of each outcome, [pairs, 3] in the order of `OUTCOMES`."""
    row_of = {pair: i for i, pair in enumerate(pairs)}
    counts = np.zeros((len(pairs), len(OUTCOMES)))
    for answer in answers:
        if answer.outcome is not None:
            counts[row_of[answer.pair], OUTCOMES.index(answer.outcome)] += 1
    return counts


def majority(counts: Floats) -> Outcome:
    """The outcome most raters gave; a tie where two come first."""
    best = np.flatnonzero(counts == counts.max())
    return OUTCOMES[int(best[0])] if len(best) == 1 else "tie"


def by_rater(answers: Sequence[HumanAnswer]) -> list[dict[str, Outcome | None]]:
    """Every rater's outcomes by pair."""
    found: dict[str, dict[str, Outcome | None]] = {}
    for answer in answers:
        found.setdefault(answer.rater, {})[answer.pair] = answer.outcome
    return list(found.values())


def agreement(
    sources: Sequence[Mapping[str, Outcome | None]],
    prompt_of: Mapping[str, str],
    *,
    seed: int = 0,
) -> Agreement:
    """Agreement of raters, or of raters and a judge, on the pairs that two of them answered.

    Args:
        sources: the outcomes of each by pair; None where there is none.
        prompt_of: the prompt of each pair, for the bootstrap; pairs without one are left out.
    """
    one_hot = np.eye(len(OUTCOMES))
    pairs = [
        pair for pair in prompt_of if sum(source.get(pair) is not None for source in sources) >= 2
    ]
    prompts = [prompt_of[pair] for pair in pairs]

    def answers(source: Mapping[str, Outcome | None]) -> Floats:
        rows = [
            one_hot[OUTCOMES.index(outcome)] if outcome else np.zeros(len(OUTCOMES))
            for outcome in map(source.get, pairs)
        ]
        return np.array(rows).reshape(len(pairs), len(OUTCOMES))

    tables = [answers(source) for source in sources]
    counts = np.sum(tables, axis=0)

    def number(statistic: Callable[[Floats], float]) -> Measured | None:
        return measured(statistic, prompts, seed=seed) if pairs else None

    return Agreement(
        items=len(pairs),
        share=number(lambda w: pairwise_agreement(counts, w)),
        kappa=number(lambda w: cohen_kappa(tables[0], tables[1], w)) if len(tables) == 2 else None,
        alpha=number(lambda w: krippendorff_alpha(counts, w)),
    )


def _first_share(given: Sequence[HumanAnswer], seed: int) -> Measured | None:
    decided = [answer for answer in given if answer.choice != "tie"]
    if not decided:
        return None
    values = np.array([float(answer.choice == "A") for answer in decided])
    prompts = [answer.prompt for answer in decided]
    return measured(lambda w: weighted_mean(values, w), prompts, seed=seed)
