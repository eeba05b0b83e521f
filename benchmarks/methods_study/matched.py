"""Differences between arms at the same KL, without extrapolation.

Arms do not all reach the KL that PPO steers to. Where the other arm was run at several targets, its
gold at a KL between two of its own runs follows from these two.
"""

import math

import numpy as np

from .arms import CLOSER
from .cells import Cell, Corrected, Study, interval, label, mean, p_text, wins
from .statistics import Paired, holm, paired

COVERED = 0.8
"""Share of an arm's seeds that must be within the range of the other arm's runs."""


def gold_at_kl_of(
    study: Study, arm: str, other: str, *, target: float, number: int
) -> dict[int, float]:
    """Return the gold of another arm at the KL that an arm's run at a KL target reached, by seed.

    Interpolated between the other arm's runs in the round. Seeds whose KL is outside of the range
    of these runs are left out.
    """
    theirs = [r for r in study.results if (r.arm, r.round) == (other, number)]
    found = {}
    for seed, reached in study.cell(target, number).kl(arm).items():
        points = sorted((r.kl, r.gold) for r in theirs if r.seed == seed)
        kls, golds = [kl for kl, _ in points], [gold for _, gold in points]
        if points and kls[0] <= reached <= kls[-1]:
            found[seed] = float(np.interp(reached, kls, golds))
    return found


def matched(study: Study, arm: str, other: str, *, target: float, number: int) -> Paired:
    """Compare an arm's run at a KL target with another arm at the KL of that run."""
    theirs = gold_at_kl_of(study, arm, other, target=target, number=number)
    return paired(study.cell(target, number).gold(arm), theirs)


def at_same_kl(study: Study, arm: str, other: str, *, target: float, number: int) -> Paired:
    """Compare two arms at the same KL: by interpolation, or else along the slope of all arms."""
    cell = study.cell(target, number)
    found = matched(study, arm, other, target=target, number=number)
    return found if _is_covered(cell, arm, found) else cell.differences(arm, other)[1]


def matched_table(study: Study) -> str:
    """Return a line for each arm with all seeds in the range of the other arm's runs.

    Against retraining, with Holm's p, and for the pairs in `CLOSER`. Empty where no arm was run at
    several targets.
    """
    lines = []
    for target, number, cell in study:
        against = {
            (arm, "retrained"): one for arm, one in from_retrained(study, target, number).items()
        }
        closer = ((pair, matched(study, *pair, target=target, number=number)) for pair in CLOSER)
        inside = {pair: (one, math.nan) for pair, one in closer if _is_covered(cell, pair[0], one)}
        for (arm, other), (one, p) in {**against, **inside}.items():
            words = [study.title(target, number), label(arm), label(other)]
            words.append(f"{mean(cell.kl(arm).values()):.1f}")
            lines.append("| " + " | ".join([*words, interval(one), p_text(p), wins(one)]) + " |")
    head = "| target and round | arm | minus | KL | gold at this KL (95 %) | Holm p | wins |"
    return "\n".join([head, "|---" * 7 + "|", *lines]) if lines else ""


def from_retrained(study: Study, target: float, number: int) -> Corrected:
    """Return the comparisons with retraining of all arms that are within its range.

    Holm's correction counts the others, too, as if they did not differ.
    """
    cell = study.cell(target, number)
    arms = [arm for arm in cell.arms if arm != "retrained"]
    found = {a: matched(study, a, "retrained", target=target, number=number) for a in arms}
    covered = {arm: _is_covered(cell, arm, one) for arm, one in found.items()}
    p = holm([one.p if covered[arm] else 1.0 for arm, one in found.items()])
    return {a: (found[a], value) for a, value in zip(arms, p, strict=True) if covered[a]}


def _is_covered(cell: Cell, arm: str, found: Paired) -> bool:
    return found.n > 1 and found.n >= COVERED * len(cell.gold(arm))
