"""The study's goal, clause by clause, beside what was measured."""

from collections.abc import Iterator

from .cells import Study, gaps, interval, p_text
from .matched import at_same_kl, from_retrained, gold_at_kl_of
from .statistics import Paired, paired, ratio

BEST = "contrast_75_log_sigmoid"
"""The method that was chosen on the seeds for choosing."""

LEAST = {6.0: 0.4, 12.0: 0.8}
"""The gain over `retrained` that the goal asks for, by KL target."""

P, SEEDS_ABOVE, WORST, HALF = 0.001, 0.9, -0.3, 0.5

ALPHA = 0.05
"""Of Holm's p, where the goal says only that there is a gain."""

Row = tuple[str, str, str]
"""What is asked for, what was measured, and whether it is reached."""


def goal_table(first: Study, second: Study) -> str:
    """Return a row for each clause: what the goal asks for, the numbers, and whether it is met."""
    rows = [row for kl in LEAST for row in _at(first, kl)]
    rows += _after_three_rounds(first)
    cell = second.cell(12.0, 2)
    if BEST in cell.arms:
        (gain, p), (equal, equal_p) = _gains(second, 12.0)
        shown = (
            f"{interval(gain)}, p {p_text(p)}; {interval(equal)}, p {p_text(equal_p)} at equal KL"
        )
        rows.append(("second world: above retrained", shown, _said(p < ALPHA, equal_p < ALPHA)))
    lines = ["| the goal asks for | measured | reached |", "|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _said(met: bool, at_equal_kl: bool) -> str:
    if met == at_equal_kl:
        return "yes" if met else "no"
    return "yes, but not at equal KL" if met else "at equal KL only"


def _gains(study: Study, kl: float) -> tuple[tuple[Paired, float], ...]:
    """Return the gain over retraining in the second round with its p, and that at the same KL."""
    raw, by_slope = (found[BEST] for found in study.cell(kl, 2).from_retrained())
    return raw, from_retrained(study, kl, 2).get(BEST, by_slope)


def _at(study: Study, kl: float) -> Iterator[Row]:
    cell = study.cell(kl, 2)
    if BEST not in cell.arms:
        return
    (gain, p), (equal, equal_p) = _gains(study, kl)
    place = f"KL {kl:g}: "
    yield (
        f"{place}at least {LEAST[kl]:+.1f} over retrained",
        f"{interval(gain)}; {interval(equal)} at equal KL (mean {equal.mean:+.3f})",
        _said(gain.mean >= LEAST[kl], equal.mean >= LEAST[kl]),
    )
    said = f"p {p_text(p)}, of {len(cell.arms) - 1} comparisons; {p_text(equal_p)} at equal KL"
    yield f"{place}p < .001 after correction", said, _said(p < P, equal_p < P)
    fixed = paired(cell.gold(BEST), cell.gold("fixed"))
    yield (
        f"{place}above fixed in at least nine of ten seeds, never below it by more than 0.3",
        f"{fixed.wins} of {fixed.n}; worst {fixed.worst:+.2f}",
        "yes" if fixed.wins >= SEEDS_ABOVE * fixed.n and fixed.worst >= WORST else "no",
    )
    if "fresh_labels" in cell.arms:
        labels = paired(cell.gold(BEST), cell.gold("fresh_labels"))
        same = at_same_kl(study, BEST, "fresh_labels", target=kl, number=2)
        shown = f"{interval(labels)}; {interval(same)} at equal KL"
        yield f"{place}better than 300 random labels", shown, _said(labels.low > 0, same.low > 0)


def _after_three_rounds(study: Study) -> Iterator[Row]:
    for kl in LEAST:
        cell = study.cell(kl, 3)
        if BEST not in cell.arms:
            yield f"KL {kl:g}: half of the distance to gold after three rounds", "not run", ""
            continue
        ours, theirs, most = (cell.gold(arm) for arm in (BEST, "retrained", "gold"))
        same = gold_at_kl_of(study, BEST, "retrained", target=kl, number=3)
        raw = equal = ratio(gaps(ours, theirs), gaps(most, theirs))
        shown = _percent(*raw)
        if same.keys() == ours.keys():
            equal = ratio(gaps(ours, same), gaps(most, same))
            shown += f"; {_percent(*equal)} from retraining at the same KL"
        reached = _said(raw[0] >= HALF, equal[0] >= HALF)
        yield f"KL {kl:g}: half of the distance to gold after three rounds", shown, reached


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
