"""A win rate in words, and as rows and plain data for files."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shiftrm.core.intervals import LEVEL, Measured, sign_test
from shiftrm.files import Row
from shiftrm.measure.judges.comparing import Verdict
from shiftrm.measure.judges.win_rates import WinRate

__all__ = ["headline", "sentences", "verdict_rows", "warnings"]

_FEW = 30  # prompts; below, an interval is wider than a fifth to both sides


def headline(rate: WinRate) -> str:
    """Who wins, as far as the interval lets one say."""
    low, high = rate.rate.low, rate.rate.high
    # The bootstrap of a few prompts that agree has no width: the exact test does not mind.
    wins, losses = (round(share.value * rate.counted) for share in (rate.win, rate.lose))
    chance = sign_test(wins, losses)
    if low is None or high is None or low <= 0.5 <= high or chance >= LEVEL:
        return "No clear difference between ours and theirs."
    return "Ours is better." if low > 0.5 else "Theirs is better."


def sentences(rate: WinRate) -> list[str]:
    """The numbers, one thought a line."""
    found = [
        f"Ours wins {_percent(rate.win)}, ties {_percent(rate.tie)} and loses "
        f"{_percent(rate.lose)} of {_count(rate.counted, 'prompt')}, says {rate.judge}.",
        f"Wins and half the ties: {_with_interval(rate.rate)}.",
        f"Mean length: {rate.length_ours:.0f} characters ours, {rate.length_theirs:.0f} theirs. "
        + (
            f"At equal lengths the rate would be {_with_interval(rate.controlled)}."
            if rate.controlled is not None
            else "The rate at equal lengths cannot be had: all lengths differ by about the same."
        ),
    ]
    if rate.identical:
        found.append(f"{rate.identical} of the ties are responses that are the same.")
    if rate.position is not None:
        share = rate.position.first_share
        found.append(
            f"Both orders agree on {_percent(rate.position.consistency)} of the prompts; "
            + (
                "all answers are ties."
                if share is None
                else f"where an answer names a winner, it is the first response in "
                f"{_percent(share)} of the cases (a fair judge: 50 %)."
            )
        )
    if rate.problems:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rate.problems.items())
        found.append(
            f"{rate.asked - rate.counted} of {_count(rate.asked, 'prompt')} are not counted, since "
            f"the judge gave no verdict that can be read: {reasons}."
        )
    return found


def warnings(rate: WinRate) -> list[str]:
    """What should make one careful."""
    found = []
    if rate.counted < _FEW:
        found.append(f"Only {_count(rate.counted, 'prompt')}: too few to tell small differences.")
    if rate.rate.low is not None and rate.rate.low == rate.rate.high:
        found.append("All prompts have the same outcome, so the interval has no width: ignore it.")
    if rate.asked - rate.counted > 0.05 * rate.asked:
        found.append(
            "More than one prompt in twenty is not counted; the rest may not stand for all. "
            "Read the raw answers in verdicts.jsonl."
        )
    if rate.extrapolated and rate.controlled is not None:
        found.append(
            "One side is the longer one for every prompt, so the rate at equal lengths lies at "
            "the end of what was seen; do not lean on it."
        )
    if rate.position is not None:
        share = rate.position.first_share
        if share is not None and share.low is not None and share.high is not None:
            place = "first" if share.low > 0.5 else "second" if share.high < 0.5 else ""
            if place:
                found.append(
                    f"The judge prefers the {place} place. Asking in both orders turns that into "
                    "ties, which hide differences."
                )
    return found


def verdict_rows(verdicts: Sequence[Verdict]) -> list[Row]:
    """One row a comparison, with everything that the judge said."""
    return [_row(verdict) for verdict in verdicts]


def _row(verdict: Verdict) -> Row:
    comparison = verdict.comparison
    row: dict[str, Any] = {
        "prompt": comparison.prompt,
        "ours": comparison.ours,
        "theirs": comparison.theirs,
        "outcome": verdict.outcome,
        "note": verdict.note,
    }
    if verdict.scores is not None:
        row["score_ours"], row["score_theirs"] = verdict.scores
    if verdict.answers:
        row["answers"] = [
            {"response_a": first, **asdict(answer)}
            for first, answer in zip(("ours", "theirs"), verdict.answers, strict=True)
        ]
    return row


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _percent(found: Measured) -> str:
    return f"{100 * found.value:.0f} %"


def _with_interval(found: Measured) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} (95 % interval {found.low:.2f} to {found.high:.2f})"
