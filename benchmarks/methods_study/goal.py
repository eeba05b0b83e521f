"""The study's goal, clause by clause, beside what was measured."""

import math
from collections.abc import Iterator

from .cells import Study, interval, p_text
from .statistics import paired

BEST = "contrast_75_log_sigmoid"
"""The method that was chosen on the seeds for choosing."""

LEAST = {6.0: 0.4, 12.0: 0.8}
"""The gain over `retrained` that the goal asks for, by KL target."""

P, SEEDS_ABOVE, WORST, HALF = 0.001, 0.9, -0.3, 0.5

Row = tuple[str, str, str]
"""What is asked for, what was measured, and whether it is reached."""


def goal_table(first: Study, second: Study) -> str:
    """Return a row for each clause: what the goal asks for, the numbers, and whether it is met."""
    rows = [row for kl in LEAST for row in _at(first, kl)]
    rows += _after_three_rounds(first)
    cell = second.cell(12.0, 2)
    if BEST in cell.arms:
        gain, equal = cell.differences(BEST, "retrained")
        shown = f"{interval(gain)}; {interval(equal)} at equal KL"
        rows.append(("second world: above retrained", shown, _said(gain.low > 0, equal.low > 0)))
    lines = ["| the goal asks for | measured | reached |", "|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _said(met: bool, at_equal_kl: bool) -> str:
    if met == at_equal_kl:
        return "yes" if met else "no"
    return "yes, but not at equal KL" if met else "at equal KL only"


def _at(study: Study, kl: float) -> Iterator[Row]:
    cell = study.cell(kl, 2)
    if BEST not in cell.arms:
        return
    against, at_equal = cell.from_retrained()
    (gain, p), (equal, equal_p) = against[BEST], at_equal[BEST]
    place = f"KL {kl:g}: "
    yield (
        f"{place}at least {LEAST[kl]:+.1f} over retrained",
        f"{interval(gain)}; {interval(equal)} at equal KL (mean {equal.mean:+.3f})",
        _said(gain.mean >= LEAST[kl], equal.mean >= LEAST[kl]),
    )
    said = f"p {p_text(p)}, of {len(against)} comparisons; {p_text(equal_p)} at equal KL"
    yield f"{place}p < .001 after correction", said, _said(p < P, equal_p < P)
    fixed = paired(cell.gold(BEST), cell.gold("fixed"))
    yield (
        f"{place}above fixed in at least nine of ten seeds, never below it by more than 0.3",
        f"{fixed.wins} of {fixed.n}; worst {fixed.worst:+.2f}",
        "yes" if fixed.wins >= SEEDS_ABOVE * fixed.n and fixed.worst >= WORST else "no",
    )
    if "fresh_labels" in cell.arms:
        labels, same = cell.differences(BEST, "fresh_labels")
        shown = f"{interval(labels)}; {interval(same)} at equal KL"
        yield f"{place}better than 300 random labels", shown, _said(labels.low > 0, same.low > 0)


def _after_three_rounds(study: Study) -> Iterator[Row]:
    for kl in LEAST:
        cell = study.cell(kl, 3)
        if BEST not in cell.arms:
            yield f"KL {kl:g}: half of the distance to gold after three rounds", "not run", ""
            continue
        room = paired(cell.gold("gold"), cell.gold("retrained")).mean
        gains = cell.differences(BEST, "retrained")
        raw, equal = (gain.mean / room if room > 0 else math.nan for gain in gains)
        yield (
            f"KL {kl:g}: half of the distance to gold after three rounds",
            f"{100 * raw:.0f} %; {100 * equal:.0f} % if its gain is taken at equal KL",
            _said(raw >= HALF, equal >= HALF),
        )
