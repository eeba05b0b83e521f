"""Win, tie and lose rates between two sets of responses to the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import RESAMPLES, Measured, measured, weighted_mean
from shiftrm.measure.judges.comparing import Comparison, Judge, Verdict
from shiftrm.measure.judges.length_control import length_controlled_rate
from shiftrm.measure.judges.questions import plain_text

__all__ = ["Position", "WinRate", "summarise", "win_rate", "win_tie_lose"]

_SCORE = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass(frozen=True)
class Position:
    """What the place of a response did to the judge's verdicts. Only judges that read have this.

    Attributes:
        first, second, tie: how many answers named A, B or neither, over both orders of the counted
            prompts.
        first_share: A among the answers that named A or B; a judge blind to places gives 1/2,
            since each response stands first once. None if all were ties.
        consistency: prompts in which both orders say the same of the responses.
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
        judge: who judged.
        asked: comparisons that were judged; counted: those with an outcome, which all that follows
            is over.
        problems: why the others have none, and how many each.
        identical: counted ties because both sides said the same.
        win, tie, lose: shares of the counted; they add up to one.
        rate: wins and half the ties.
        length_ours, length_theirs: mean characters of a response.
        controlled: the rate at equal lengths; see `length_control`. None where it cannot be had.
        extrapolated: whether one side is the longer (or as long) everywhere, so that equal lengths
            lie at the end of what was seen.
        position: None for judges that give numbers.
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
    """The rates of some verdicts; None if not one of them has an outcome.

    Args:
        judge: who judged.
        seed, resamples: of the bootstrap over prompts.

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
        found = measured(
            lambda w: weighted_mean(values, w), prompts, seed=seed, resamples=resamples
        )
        assert found is not None  # the weights of all rows are one
        return found

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
    """Why verdicts have no outcome, and how many each, the most frequent first."""
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

    consistency = measured(
        lambda w: weighted_mean(same, w), prompts, seed=seed, resamples=resamples
    )
    assert consistency is not None
    return Position(
        first=int(first.sum()),
        second=int(second.sum()),
        tie=sum(pair.count("C") for pair in letters),
        first_share=measured(share, prompts, seed=seed, resamples=resamples),
        consistency=consistency,
    )


def win_tie_lose(
    ours: Sequence[float], theirs: Sequence[float], *, tie_margin: float
) -> tuple[float, float, float]:
    """Shares of prompts where our response is better, about equal, or worse.

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
