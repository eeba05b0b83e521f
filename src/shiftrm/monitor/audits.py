"""Audits: pairs of today's policy that are drawn, put into a queue, and answered by labels.

An audit is a folder. `ours.jsonl` holds the responses that the reward model prefers and
`theirs.jsonl` the others, prompt by prompt, as `shiftrm evaluate sheet` and `evaluate win-rate`
read them; `draws.jsonl` says how each pair was drawn. Answers are rows of `prompt`, `ours`,
`theirs` and `outcome`, as both commands write them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.errors import UserError
from shiftrm.files import Row, new_folder, read_jsonl, write_jsonl
from shiftrm.measure.judges.comparing import Comparison, Judge, Outcome
from shiftrm.measure.judges.win_rates import verdict_rows
from shiftrm.measure.people.blinding import OUTCOMES, pair_id
from shiftrm.monitor.signals import different

__all__ = ["Answerer", "Audit", "Drawn", "draw_audit", "read_audit", "write_audit"]

Answerer = Judge | Callable[[Sequence[Comparison]], Sequence[Outcome | None]]
"""Answers comparisons at once; `ours` is the response that the reward model prefers."""

DRAWS, OURS, THEIRS, ANSWERS = "draws.jsonl", "ours.jsonl", "theirs.jsonl", "answers.jsonl"

RIGHT: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass(frozen=True)
class Drawn:
    """One draw of an audit.

    Attributes:
        pair: ours is the response of higher reward.
        weight: 1 / size of the pool, over the probability of the draw.
        largest: the largest weight in the pool.
        tied: whether both rewards are equal: half right, whatever a label says.
        correct: 1 where the label agrees with the reward model, 0 where not, between for ties and
            several raters; None as long as there is no answer.
    """

    pair: Comparison
    weight: float
    largest: float
    tied: bool = False
    correct: float | None = None


@dataclass(frozen=True)
class Audit:
    """An audit: its number (from 1), its step, and its draws."""

    number: int
    step: int
    drawn: tuple[Drawn, ...]
    episode: int = 1

    @property
    def answered(self) -> list[Drawn]:
        return [one for one in self.drawn if one.correct is not None]

    @property
    def labels(self) -> int:
        """Pairs that a label was asked for."""
        return len({pair_id(one.pair) for one in self.drawn if not one.tied})

    @property
    def accuracy(self) -> float | None:
        """The weighted share of right pairs, `sum(w x) / sum(w)`; None without answers."""
        weights = sum(one.weight for one in self.answered)
        if not weights:
            return None
        return sum(one.weight * float(one.correct or 0.0) for one in self.answered) / weights


def draw_audit(
    groups: Sequence[Row], count: int, *, targeted: float, rng: random.Random
) -> list[Drawn]:
    """Draw pairs of responses to one prompt, independently and with replacement.

    With probability `1 - targeted` a draw is even over all pairs of the pool, else proportional to
    `doubt`. So a weight is at most `1 / (1 - targeted)`, and the weighted answers estimate the
    pool's accuracy without bias whatever `doubt` says.

    Args:
        groups: `{"prompt", "responses", "finished", "rewards"}`.

    Returns:
        Draws without answers but for tied rewards; none if no prompt has two different responses.
    """
    pool: list[Comparison] = []
    gaps: list[float] = []
    for row in groups:
        for i, j in zip(*different(row["responses"], row["finished"]), strict=True):
            gap = row["rewards"][i] - row["rewards"][j]
            first, second = (i, j) if gap >= 0 else (j, i)
            texts, ended = row["responses"], row["finished"]
            pool.append(
                Comparison(row["prompt"], texts[first], texts[second], ended[first], ended[second])
            )
            gaps.append(abs(gap))
    if not pool:
        return []
    q_N = (1 - targeted) / len(pool) + targeted * doubt(np.array(gaps))
    weight_N = 1 / len(pool) / q_N
    largest = float(weight_N.max())
    return [
        Drawn(pool[k], float(weight_N[k]), largest, gaps[k] == 0, 0.5 if gaps[k] == 0 else None)
        for k in rng.choices(range(len(pool)), weights=q_N.tolist(), k=count)
    ]


def doubt(gaps_N: Floats) -> Floats:
    """Return shares of targeted draws, which sum to 1: more where reward differences are small.

    `s_i = 1 / (1 + gap_i / median gap)`: errors are likelier there as long as the model sees
    anything at all.
    """
    middle = float(np.median(gaps_N))
    s_N = 1 / (1 + gaps_N / middle) if middle > 0 else np.ones(len(gaps_N))
    return np.asarray(s_N / s_N.sum(), dtype=np.float64)


# -- the queue -----------------------------------------------------------------------------------


def write_audit(folder: Path, audit: Audit) -> None:
    """Write an audit's queue: the folder appears whole or not at all."""
    pairs = {pair_id(one.pair): one.pair for one in audit.drawn if not one.tied}
    rows = [
        {
            "step": audit.step,
            "episode": audit.episode,
            "prompt": one.pair.prompt,
            "ours": one.pair.ours,
            "theirs": one.pair.theirs,
            "ours_finished": one.pair.ours_finished,
            "theirs_finished": one.pair.theirs_finished,
            "weight": one.weight,
            "largest": one.largest,
            "tied": one.tied,
        }
        for one in audit.drawn
    ]
    with new_folder(folder) as work:
        write_jsonl(work / DRAWS, rows)
        for name, side in ((OURS, 0), (THEIRS, 1)):
            write_jsonl(work / name, [_row(pair, side) for pair in pairs.values()])


def _row(pair: Comparison, side: int) -> Row:
    response = pair.sides[side]
    return {
        "prompt": pair.prompt,
        "responses": [response.text],
        "finished": [response.finished],
    }


def read_audit(folder: Path, number: int) -> Audit:
    """Read an audit with the answers that are there.

    Answers are read from `answers.jsonl` and from every `*.jsonl` in a folder of the audit (such as
    the output of `evaluate win-rate`). Several answers on a pair are averaged; rows about other
    pairs are ignored.

    Raises:
        UserError: a malformed file, or an unknown outcome.
    """
    rows = read_jsonl(folder / DRAWS)
    answers = _answers(folder)
    drawn = []
    for row in rows:
        pair = Comparison(
            row["prompt"], row["ours"], row["theirs"], row["ours_finished"], row["theirs_finished"]
        )
        given = answers.get(pair_id(pair), [])
        correct = 0.5 if row["tied"] else sum(given) / len(given) if given else None
        drawn.append(Drawn(pair, row["weight"], row["largest"], row["tied"], correct))
    return Audit(number, rows[0]["step"], tuple(drawn), rows[0]["episode"])


def _answers(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for path in sorted([*folder.glob(ANSWERS), *folder.glob("*/*.jsonl")]):
        for number, row in enumerate(read_jsonl(path), start=1):
            if not {"prompt", "ours", "theirs", "outcome"} <= row.keys():
                continue
            outcome = row["outcome"]
            if outcome is None:
                continue
            if outcome not in RIGHT:
                raise UserError(
                    f"{path}: answer {number} is {outcome!r}; write {', '.join(OUTCOMES)} or null"
                )
            name = pair_id(Comparison(row["prompt"], row["ours"], row["theirs"]))
            found.setdefault(name, []).append(RIGHT[outcome])
    return found


def answer(folder: Path, audit: Audit, answerer: Answerer) -> None:
    """Have an audit answered now, and write the answers into its folder.

    Raises:
        UserError: the number of answers differs from the number of pairs; or as the judge raises.
    """
    pairs = list({pair_id(one.pair): one.pair for one in audit.drawn if not one.tied}.values())
    if not pairs:
        return
    if hasattr(answerer, "judge"):
        rows = verdict_rows(answerer.judge(pairs))
    else:
        outcomes = list(answerer(pairs))
        if len(outcomes) != len(pairs):
            raise UserError(f"{len(outcomes)} answers for the {len(pairs)} pairs of an audit")
        rows = [
            {"prompt": pair.prompt, "ours": pair.ours, "theirs": pair.theirs, "outcome": outcome}
            for pair, outcome in zip(pairs, outcomes, strict=True)
        ]
    write_jsonl(folder / ANSWERS, rows)
