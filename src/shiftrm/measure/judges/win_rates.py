"""Win, tie and lose rates between two sets of responses to the same prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import LEVEL, RESAMPLES, Measured, measured, measured_mean, sign_test
from shiftrm.files import Row
from shiftrm.measure.judges.comparing import Comparison, Judge, Verdict
from shiftrm.measure.judges.length_control import length_controlled_rate
from shiftrm.measure.judges.questions import plain_text

_SCORE = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass(frozen=True)
class Position:
    """Effect of the response order on the verdicts, for judges that read text.

    Attributes:
        first, second, tie: number of answers that chose A, B or neither, over both orders of the
            counted prompts.
        first_share: share of A among the answers that chose A or B; 1/2 for an unbiased judge,
            since each response comes first once. None if all were ties.
        consistency: share of prompts on which both orders agree.
    """

    first: int
    second: int
    tie: int
    first_share: Measured | None
    consistency: Measured


@dataclass(frozen=True)
class WinRate:
    """Rates over the prompts with an outcome, with 95 % bootstrap intervals by prompt.

    Attributes:
        judge: name of the judge.
        asked: comparisons that were judged.
        counted: comparisons with an outcome; everything below is over these.
        problems: why the others have no outcome, with counts.
        identical: ties between identical responses.
        win, tie, lose: shares; they add up to one.
        rate: wins plus half the ties.
        length_ours, length_theirs: mean length of a response in characters.
        controlled: the rate at equal lengths (see `length_control`), or None if undefined.
        extrapolated: whether one side is at least as long on every prompt, so that equal lengths
            are at the edge of the data.
        position: None for judges that give scores.
    """

    judge: str
    asked: int
    counted: int
    problems: dict[str, int]
    identical: int
    win: Measured
    tie: Measured
    lose: Measured
    rate: Measured
    length_ours: float
    length_theirs: float
    controlled: Measured | None
    extrapolated: bool
    position: Position | None


def summarise(
    verdicts: Sequence[Verdict], *, judge: str = "", seed: int = 0, resamples: int = RESAMPLES
) -> WinRate | None:
    """Compute the rates of some verdicts; None if none of them has an outcome.

    Args:
        judge: name of the judge.
        seed, resamples: parameters of the bootstrap over prompts.

    Raises:
        ValueError: no verdicts.
    """
    if not verdicts:
        raise ValueError("no verdicts")
    counted = [verdict for verdict in verdicts if verdict.outcome is not None]
    if not counted:
        return None
    prompts = [verdict.comparison.prompt_key for verdict in counted]
    scores = np.array([_SCORE[str(verdict.outcome)] for verdict in counted])
    lengths = np.array([_lengths(verdict.comparison) for verdict in counted])
    difference = lengths[:, 0] - lengths[:, 1]

    def mean(values: Floats) -> Measured:
        return measured_mean(values, prompts, seed=seed, resamples=resamples)

    return WinRate(
        judge=judge,
        asked=len(verdicts),
        counted=len(counted),
        problems=problems(verdicts),
        identical=sum(verdict.note == "identical" for verdict in counted),
        win=mean((scores == 1.0).astype(np.float64)),
        tie=mean((scores == 0.5).astype(np.float64)),
        lose=mean((scores == 0.0).astype(np.float64)),
        rate=mean(scores),
        length_ours=float(lengths[:, 0].mean()),
        length_theirs=float(lengths[:, 1].mean()),
        controlled=length_controlled_rate(
            scores.tolist(), difference.tolist(), prompts, seed=seed, resamples=resamples
        ),
        extrapolated=bool(difference.any() and (difference.min() >= 0 or difference.max() <= 0)),
        position=_position(counted, seed=seed, resamples=resamples),
    )


def win_rate(
    judge: Judge,
    comparisons: Sequence[Comparison],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WinRate | None:
    """Judge and summarise; see `Judge.judge` and `summarise`."""
    return summarise(judge.judge(comparisons), judge=judge.name, seed=seed, resamples=resamples)


def problems(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Count the reasons for missing outcomes, most frequent first."""
    notes = [verdict.note or "no verdict" for verdict in verdicts if verdict.outcome is None]
    counts = {note: notes.count(note) for note in dict.fromkeys(notes)}
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def _lengths(comparison: Comparison) -> tuple[int, int]:
    return len(plain_text(comparison.ours)), len(plain_text(comparison.theirs))


def _position(verdicts: Sequence[Verdict], *, seed: int, resamples: int) -> Position | None:
    read = [(v.comparison.prompt_key, v.letters) for v in verdicts if v.letters is not None]
    if not read:
        return None
    prompts = [prompt for prompt, _ in read]
    letters = [pair for _, pair in read if pair is not None]
    first = np.array([pair.count("A") for pair in letters], dtype=np.float64)
    second = np.array([pair.count("B") for pair in letters], dtype=np.float64)
    same = np.array([pair in (("A", "B"), ("B", "A"), ("C", "C")) for pair in letters], dtype=float)

    def share(weights: Floats) -> float:
        named = float((weights * (first + second)).sum())
        return float((weights * first).sum()) / named if named else float("nan")

    return Position(
        first=int(first.sum()),
        second=int(second.sum()),
        tie=sum(pair.count("C") for pair in letters),
        first_share=measured(share, prompts, seed=seed, resamples=resamples),
        consistency=measured_mean(same, prompts, seed=seed, resamples=resamples),
    )


def win_tie_lose(
    ours: Sequence[float], theirs: Sequence[float], *, tie_margin: float
) -> tuple[float, float, float]:
    """Return the shares of prompts where our response is better, about equal, or worse.

    Args:
        ours, theirs: judged values of the two responses to each prompt, in the same order.
        tie_margin: differences up to this count as a tie, in units of the values.

    Raises:
        ValueError: no prompts, or lists of different length.
    """
    if not ours:
        raise ValueError("no prompts to compare on")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    wins = sum(d > tie_margin for d in differences) / n
    losses = sum(d < -tie_margin for d in differences) / n
    return wins, 1.0 - wins - losses, losses


# -- in words, and as rows -------------------------------------------------------------------

_FEW = 30  # prompts; below, an interval is wider than a fifth to both sides


def headline(rate: WinRate) -> str:
    """Say who wins, if the interval is clear."""
    low, high = rate.rate.low, rate.rate.high
    # If a few prompts all agree, the bootstrap interval has no width; the exact test still works.
    wins, losses = (round(share.value * rate.counted) for share in (rate.win, rate.lose))
    chance = sign_test(wins, losses)
    if low is None or high is None or low <= 0.5 <= high or chance >= LEVEL:
        return "No clear difference between ours and theirs."
    return "Ours is better." if low > 0.5 else "Theirs is better."


def sentences(rate: WinRate) -> Iterator[str]:
    """Describe the numbers in sentences."""
    yield (
        f"Ours wins {_percent(rate.win)}, ties {_percent(rate.tie)} and loses "
        f"{_percent(rate.lose)} of {counted(rate.counted, 'prompt')}, says {rate.judge}."
    )
    yield f"Wins and half the ties: {_with_interval(rate.rate)}."
    controlled = (
        f"At equal lengths the rate would be {_with_interval(rate.controlled)}."
        if rate.controlled is not None
        else "The rate at equal lengths is undefined: all lengths differ by about the same."
    )
    yield (
        f"Mean length: {rate.length_ours:.0f} characters ours, {rate.length_theirs:.0f} theirs. "
        f"{controlled}"
    )
    if rate.identical:
        yield f"{rate.identical} of the ties are between identical responses."
    if rate.position is not None:
        share = rate.position.first_share
        first = (
            "all answers are ties."
            if share is None
            else f"where an answer names a winner, it is the first response in "
            f"{_percent(share)} of the cases (a fair judge: 50 %)."
        )
        yield f"Both orders agree on {_percent(rate.position.consistency)} of the prompts; {first}"
    if rate.problems:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rate.problems.items())
        yield (
            f"{rate.asked - rate.counted} of {counted(rate.asked, 'prompt')} are not counted, "
            f"since the judge gave no readable verdict: {reasons}."
        )


def warnings(rate: WinRate) -> Iterator[str]:
    """Return reasons for caution."""
    if rate.counted < _FEW:
        yield f"Only {counted(rate.counted, 'prompt')}: too few to tell small differences."
    if rate.rate.low is not None and rate.rate.low == rate.rate.high:
        yield "All prompts have the same outcome, so the interval has no width: ignore it."
    if rate.asked - rate.counted > 0.05 * rate.asked:
        yield (
            "More than one prompt in twenty is not counted; the rest may not represent all. "
            "Read the raw answers in verdicts.jsonl."
        )
    if rate.extrapolated and rate.controlled is not None:
        yield (
            "One side is the longer one for every prompt, so the rate at equal lengths lies at "
            "the edge of the data; do not rely on it."
        )
    share = None if rate.position is None else rate.position.first_share
    if share is not None and share.low is not None and share.high is not None:
        place = "first" if share.low > 0.5 else "second" if share.high < 0.5 else ""
        if place:
            yield (
                f"The judge prefers the {place} place. Asking in both orders turns that into "
                "ties, which hide differences."
            )


def verdict_rows(verdicts: Sequence[Verdict]) -> list[Row]:
    """Return one row per comparison, with the judge's full answers."""
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


def counted(n: int, noun: str) -> str:
    """Return "1 prompt" or "2 prompts"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _percent(found: Measured) -> str:
    return f"{100 * found.value:.0f} %"


def _with_interval(found: Measured) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} (95 % interval {found.low:.2f} to {found.high:.2f})"
