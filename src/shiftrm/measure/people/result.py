"""Results of a human evaluation: rates, agreement of raters and with a judge, and sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, measured, measured_mean
from shiftrm.measure.judges.comparing import Outcome
from shiftrm.measure.judges.win_rates import counted
from shiftrm.measure.people.answers import HumanAnswer
from shiftrm.measure.people.blinding import OUTCOMES


@dataclass(frozen=True)
class Agreement:
    """Agreement of two or more sources of outcomes on their shared items.

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
        win, tie, lose: mean over items of the share of raters with this outcome for our response.
        win_rate: win + tie / 2.
        first: share of A among answers that are not ties; far from one half, the position
            matters. None if all are ties.
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
    """Compute all numbers of the evaluation.

    Args:
        answers: at least one must have a choice (`read_answers`).
        judge: a judge's outcome by pair id, or None for a pair without one.
        seed: seed of the bootstrap.
    """
    given = [answer for answer in answers if answer.choice is not None]
    prompt_of = {answer.pair: answer.prompt for answer in answers}
    pairs = list(dict.fromkeys(answer.pair for answer in given))
    prompts = [prompt_of[pair] for pair in pairs]
    counts = outcome_counts(given, pairs)
    shares = counts / counts.sum(axis=1, keepdims=True)

    def rate(values: Floats) -> Measured:
        return measured_mean(values, prompts, seed=seed)

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
    """Return the number of answers with each outcome, [pairs, 3] in the order of `OUTCOMES`."""
    row_of = {pair: i for i, pair in enumerate(pairs)}
    counts = np.zeros((len(pairs), len(OUTCOMES)))
    for answer in answers:
        if answer.outcome is not None:
            counts[row_of[answer.pair], OUTCOMES.index(answer.outcome)] += 1
    return counts


def majority(counts: Floats) -> Outcome:
    """Return the most frequent outcome; a tie if two are equally frequent."""
    best = np.flatnonzero(counts == counts.max())
    return OUTCOMES[int(best[0])] if len(best) == 1 else "tie"


def by_rater(answers: Sequence[HumanAnswer]) -> list[dict[str, Outcome | None]]:
    """Return each rater's outcomes by pair."""
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
    """Compute agreement of raters (or of raters and a judge) on pairs that at least two answered.

    Args:
        sources: the outcomes of each source by pair, or None.
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
    return measured_mean(values, prompts, seed=seed)


# -- agreement beyond chance -----------------------------------------------------------------
# Categories have no order here: win against tie counts as much as win against lose.


def pairwise_agreement(counts: Floats, weights: Floats) -> float:
    """Probability that two raters of a unit gave the same answer, averaged over units.

    Args:
        counts: answers per category, [units, categories]; units with fewer than two answers are
            ignored.
        weights: how often each unit counts, [units].

    Returns:
        NaN if no unit has two answers.
    """
    answers = counts.sum(axis=1)
    several = answers >= 2
    n, w = answers[several], weights[several]
    if w.sum() == 0:
        return float("nan")
    same = (counts[several] * (counts[several] - 1)).sum(axis=1) / (n * (n - 1))
    return float((same * w).sum() / w.sum())


def krippendorff_alpha(counts: Floats, weights: Floats) -> float:
    """Krippendorff's alpha for nominal data, any number of raters, with missing answers.

    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C.

    Args:
        counts, weights: as in `pairwise_agreement`.

    Returns:
        1 for perfect agreement, 0 for chance, negative for less than chance; NaN if undefined
        (no unit has two answers, or all answers are the same).
    """
    answers = counts.sum(axis=1)
    several = (answers >= 2) & (weights > 0)
    if not several.any():
        return float("nan")
    c, n_u, w = counts[several], answers[several], weights[several]
    # o_cc' = sum_u n_uc (n_uc' - [c = c']) / (n_u - 1), here its diagonal and its row sums n_c.
    matched = (c * (c - 1) * (w / (n_u - 1))[:, None]).sum(axis=0)
    n_c = (c * w[:, None]).sum(axis=0)
    n = n_c.sum()
    expected = n * (n - 1) - (n_c * (n_c - 1)).sum()
    if expected <= 0:
        return float("nan")
    # alpha = 1 - D_o / D_e = 1 - (n - 1) sum_{c != c'} o_cc' / sum_{c != c'} n_c n_c'
    return float(1 - (n - 1) * (n - matched.sum()) / expected)


def cohen_kappa(first: Floats, second: Floats, weights: Floats) -> float:
    """Cohen's kappa of two raters who answered the same units.

    Source: Cohen, "A coefficient of agreement for nominal scales" (1960).

    Args:
        first, second: one-hot answers, [units, categories].
        weights: how often each unit counts, [units].

    Returns:
        (p_o - p_e) / (1 - p_e); NaN without units, or if both gave one and the same answer always.
    """
    total = weights.sum()
    if total == 0:
        return float("nan")
    p = (weights / total) @ np.concatenate([first, second], axis=1)
    first_shares, second_shares = p[: first.shape[1]], p[first.shape[1] :]
    observed = float((first * second).sum(axis=1) @ weights / total)
    expected = float(first_shares @ second_shares)
    if expected >= 1:
        return float("nan")
    return (observed - expected) / (1 - expected)


# -- in words --------------------------------------------------------------------------------

FEW = 30  # items; with fewer, bootstrap intervals are too narrow


def human_sentences(result: HumanResult) -> Iterator[str]:
    """Describe the result, one sentence per line."""
    given, missing = sum(result.answers.values()), sum(result.missing.values())
    raters, items = counted(len(result.answers), "rater"), counted(result.items, "item")
    yield f"{given} answers of {raters} to {items}" + (
        f"; {missing} are missing." if missing else "."
    )
    yield (
        f"Ours wins {_percent(result.win)}, ties {_percent(result.tie)}, loses "
        f"{_percent(result.lose)}."
    )
    rate = result.win_rate
    yield f"Win rate, a tie counting half: {_percent(rate)}: {_verdict(rate)}."
    if result.items < FEW:
        yield f"{items}: too few to trust the intervals; at least {FEW} are needed."
    if result.first is not None and _off_half(result.first):
        side = "first" if result.first.value > 0.5 else "second"
        yield (
            f"Raters lean to the {side} response: A was chosen in {_percent(result.first)} of the "
            "decided answers."
        )
    if result.raters is not None:
        yield f"Raters: {_agreement_words(result.raters)}"
    if result.judge is not None:
        left_out = f"; {result.judge_missing} without a verdict" if result.judge_missing else ""
        yield f"Raters' majority and the judge: {_agreement_words(result.judge, left_out)}"


def _verdict(rate: Measured) -> str:
    if not _off_half(rate):
        return "no clear difference"
    return "ours is preferred" if rate.value > 0.5 else "theirs is preferred"


def _off_half(rate: Measured) -> bool:
    return rate.low is not None and rate.high is not None and not rate.low <= 0.5 <= rate.high


def _agreement_words(found: Agreement, left_out: str = "") -> str:
    if found.share is None:
        return f"no item with two answers{left_out}."
    parts = [f"agree on {_percent(found.share)} of {counted(found.items, 'item')}{left_out}"]
    if found.kappa is not None:
        parts.append(f"Cohen's kappa {found.kappa}")
    if found.alpha is not None:
        parts.append(f"Krippendorff's alpha {found.alpha}")
    else:
        parts.append("alpha is not defined: all answers are the same")
    return "; ".join(parts) + "."


def _percent(rate: Measured) -> str:
    value = f"{100 * rate.value:.0f} %"
    if rate.low is None or rate.high is None:
        return value
    return f"{value} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
