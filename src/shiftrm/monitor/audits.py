"""Audits: pairs of today's policy that are drawn, put into a queue, and answered by labels.

An audit is a folder. `ours.jsonl` holds the responses that the reward model prefers and
`theirs.jsonl` the others, prompt by prompt, as `shiftrm evaluate sheet` and `evaluate win-rate`
read them; `draws.jsonl` says how each pair was drawn. Answers are rows of `prompt`, `ours`,
`theirs` and `outcome`, as both commands write them.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.errors import UserError
from shiftrm.files import Row, new_folder, read_jsonl, write_jsonl
from shiftrm.measure.judges.comparing import Comparison, Judge, Outcome
from shiftrm.measure.judges.win_rates import verdict_rows
from shiftrm.measure.people.blinding import OUTCOMES, pair_id
from shiftrm.monitor.rewards import prompt_name
from shiftrm.monitor.signals import different

__all__ = ["Answerer", "Audit", "Drawn", "draw_audit", "ordered_pairs", "read_audit", "write_audit"]

Answerer = Judge | Callable[[Sequence[Comparison]], Sequence[Outcome | None]]
"""Answers comparisons at once; `ours` is the response that the reward model prefers."""

DRAWS, OURS, THEIRS, ANSWERS = "draws.jsonl", "ours.jsonl", "theirs.jsonl", "answers.jsonl"

RIGHT: dict[str, float] = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass(frozen=True)
class Drawn:
    """One pair of an audit.

    Attributes:
        pair: ours is the response of higher reward.
        weight: 1 / number of pairs that the prompt has, over the probability of this one.
        largest: the largest weight in the pool.
        correct: 1 where the label agrees with the reward model, 0 where not, between for a label
            that is a tie and for several raters; None as long as there is no answer.
    """

    pair: Comparison
    weight: float
    largest: float
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
        """Pairs that a label was asked for; they are all different."""
        return len(self.drawn)

    @property
    def accuracy(self) -> float | None:
        """The weighted share of right pairs, `sum(w x) / sum(w)`; None without answers."""
        weights = sum(one.weight for one in self.answered)
        if not weights:
            return None
        return sum(one.weight * float(one.correct or 0.0) for one in self.answered) / weights


Pairs = dict[str, list[tuple[Comparison, float]]]
"""The ordered pairs of every prompt, with their differences of reward."""


def ordered_pairs(groups: Sequence[Row]) -> Pairs:
    """Return the pairs of different responses that the reward model orders, by prompt.

    Equal rewards say nothing that a label could agree with: their share is the free signal "ties".

    Args:
        groups: `{"prompt", "responses", "finished", "rewards"}`.
    """
    found: Pairs = {}
    for row in groups:
        texts, ended = row["responses"], row["finished"]
        for i, j in zip(*different(texts, ended), strict=True):
            gap = row["rewards"][i] - row["rewards"][j]
            if gap:
                first, second = (i, j) if gap > 0 else (j, i)
                pair = Comparison(
                    row["prompt"], texts[first], texts[second], ended[first], ended[second]
                )
                found.setdefault(prompt_name(row["prompt"]), []).append((pair, abs(gap)))
    return found


def draw_audit(
    pools: Sequence[Pairs],
    count: int,
    *,
    targeted: float,
    rng: random.Random,
    asked: Collection[str] = (),
) -> list[Drawn]:
    """Draw different prompts evenly, without replacement, and one pair of each.

    At most `count` prompts. Within a prompt of n pairs a pair is drawn with probability
    `q = (1 - targeted) / n + targeted * doubt`; its weight is `w = (1 / n) / q`, at most
    `1 / (1 - targeted)`. So whatever `doubt` says, `E[w x]` is the prompt's own share of right
    pairs and `E[w] = 1`.

    No label is used twice, and an audit of m prompts multiplies the evidence by at most 1 in
    expectation, if the reward model orders, averaged over prompts, at least the threshold's share
    of the pairs rightly. Let `g_p` be a prompt's expected pay-off (`core.betting.e_values`).

    - Of the pool at hand: if its mean of `g_p` is at most 1, the expected product over m prompts
      drawn without replacement is the elementary symmetric mean of the `g_p`, which is at most
      their mean to the power m (Maclaurin), so at most 1. This holds at the end of every audit.
    - Of the policy: if prompts are drawn independently, the pay-offs are independent, too, and it
      holds after every label. (The pool's largest weight, by which stakes are divided, counts as
      given: it must say nothing about how right the prompts are.)

    Args:
        pools: the ordered pairs of one step or several.
        asked: `pair_id`s of earlier audits: these pairs are not drawn again; their prompt may be.

    Returns:
        Pairs without answers; none if the reward model orders no pair.
    """
    pool: Pairs = {}
    for step in pools:
        for name, pairs in step.items():
            fresh = [one for one in pairs if pair_id(one[0]) not in asked] if asked else pairs
            if fresh:
                pool.setdefault(name, []).extend(fresh)
    prompts = list(pool.values())
    q_PN = [
        (1 - targeted) / len(pairs) + targeted * doubt(np.array([gap for _, gap in pairs]))
        for pairs in prompts
    ]
    weight_PN = [1 / len(q_N) / q_N for q_N in q_PN]
    largest = max((float(weight_N.max()) for weight_N in weight_PN), default=1.0)
    drawn = []
    for p in rng.sample(range(len(prompts)), min(count, len(prompts))):
        (k,) = rng.choices(range(len(prompts[p])), weights=q_PN[p].tolist())
        drawn.append(Drawn(prompts[p][k][0], float(weight_PN[p][k]), largest))
    return drawn


def doubt(gaps_N: Floats) -> Floats:
    """Return the shares of a prompt's targeted draws: more where reward differences are small.

    `s_i = 1 / (1 + gap_i / median gap)`: errors are likelier there as long as the model sees
    anything at all.
    """
    gaps_N = np.minimum(gaps_N, 1e300)  # of rewards near the largest floats
    middle = float(np.median(gaps_N))
    s_N = 1 / (1 + gaps_N / middle) if middle > 0 else np.ones(len(gaps_N))
    return np.asarray(s_N / s_N.sum(), dtype=np.float64)


# -- the queue -----------------------------------------------------------------------------------


def write_audit(folder: Path, audit: Audit) -> None:
    """Write an audit's queue: the folder appears whole or not at all."""
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
        }
        for one in audit.drawn
    ]
    with new_folder(folder) as work:
        write_jsonl(work / DRAWS, rows)
        for name, side in ((OURS, 0), (THEIRS, 1)):
            write_jsonl(work / name, [_row(one.pair, side) for one in audit.drawn])


def _row(pair: Comparison, side: int) -> Row:
    response = pair.sides[side]
    return {
        "prompt": pair.prompt,
        "responses": [response.text],
        "finished": [response.finished],
    }


def read_audit(folder: Path, number: int, problems: list[str] | None = None) -> Audit:
    """Read an audit with the answers that are there.

    Answers are read from `answers.jsonl` and from every `*.jsonl` in a folder of the audit (such as
    the output of `evaluate win-rate`). Several answers on a pair are averaged; an answer whose
    `ours` and `theirs` are exchanged counts turned round; rows about other pairs are ignored.

    Args:
        problems: takes what is wrong with files of answers, which are then left out.

    Raises:
        UserError: malformed draws; without `problems` also a malformed file of answers, an unknown
            outcome, or answers of which none is about a pair of the audit.
    """
    path = folder / DRAWS
    rows = read_jsonl(path)
    try:
        drawn = [
            Drawn(
                Comparison(
                    row["prompt"],
                    row["ours"],
                    row["theirs"],
                    row["ours_finished"],
                    row["theirs_finished"],
                ),
                float(row["weight"]),
                float(row["largest"]),
            )
            for row in rows
        ]
        step, episode = int(rows[0]["step"]), int(rows[0]["episode"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: not the draws of an audit; restore it, or move the folder"
        ) from None
    known = {pair_id(one.pair) for one in drawn}
    found: dict[str, list[float]] = {}
    for file in sorted([*folder.glob(ANSWERS), *folder.glob("*/*.jsonl")]):
        try:
            for name, right in _answers(file, known):
                found.setdefault(name, []).append(right)
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return Audit(number, step, tuple(_filled(one, found) for one in drawn), episode)


def _filled(one: Drawn, found: Mapping[str, Sequence[float]]) -> Drawn:
    given = found.get(pair_id(one.pair), [])
    return replace(one, correct=sum(given) / len(given) if given else None)


def _answers(path: Path, known: Collection[str]) -> list[tuple[str, float]]:
    """Return the answers of a file about these pairs."""
    found: list[tuple[str, float]] = []
    others = 0
    for number, row in enumerate(read_jsonl(path), start=1):
        if not {"prompt", "ours", "theirs", "outcome"} <= row.keys() or row["outcome"] is None:
            continue
        right = _right(row["outcome"], f"{path}: answer {number}")
        name = pair_id(Comparison(row["prompt"], row["ours"], row["theirs"]))
        turned = pair_id(Comparison(row["prompt"], row["theirs"], row["ours"]))
        if name in known:
            found.append((name, right))
        elif turned in known:
            found.append((turned, 1 - right))
        else:
            others += 1
    if others and not found:
        raise UserError(
            f"{path}: none of its {others} answers is about a pair of this audit; prompt, ours and "
            "theirs must be those of draws.jsonl"
        )
    return found


def _right(outcome: Any, where: str) -> float:
    if not isinstance(outcome, str) or outcome not in RIGHT:
        raise UserError(f"{where} is {outcome!r}; write {', '.join(OUTCOMES)} or null")
    return RIGHT[outcome]


def answer(folder: Path, audit: Audit, answerer: Answerer) -> None:
    """Have an audit answered now, and write the answers into its folder.

    Raises:
        UserError: the number of answers differs from the number of pairs; or as the judge raises.
    """
    pairs = [one.pair for one in audit.drawn]
    if hasattr(answerer, "judge"):
        rows = verdict_rows(answerer.judge(pairs))
    else:
        outcomes = list(answerer(pairs))
        if len(outcomes) != len(pairs):
            raise UserError(f"{len(outcomes)} answers for the {len(pairs)} pairs of an audit")
        for outcome in outcomes:
            if outcome is not None:
                _right(outcome, "an audit")
        rows = [
            {"prompt": pair.prompt, "ours": pair.ours, "theirs": pair.theirs, "outcome": outcome}
            for pair, outcome in zip(pairs, outcomes, strict=True)
        ]
    if all(row["outcome"] is None for row in rows):
        raise UserError(f"none of the {len(rows)} pairs of an audit got an answer")
    write_jsonl(folder / ANSWERS, rows)
