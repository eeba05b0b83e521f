"""The study as a picture and as the tables of `docs/methods.md`."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from .arms import ARMS, CANDIDATES, CLOSER, Kind
from .cells import Cell, Study, capital, interval, label, mean, number_text, p_text, wins
from .goal import goal_table
from .matched import at_same_kl, matched_table
from .results import SECONDS, Result
from .sight import sight_table, truth_table
from .statistics import Paired, paired

AFTERWARDS = {("adverts", "contrast_both_75_log_sigmoid")}
"""World and arm: run only after the other arms of that world had been seen."""

COLOURS = {
    Kind.REFERENCE: "#333333",
    Kind.LABEL_FREE: "#0072B2",
    Kind.COMBINATION: "#D55E00",
    Kind.LABELS: "#009E73",
    Kind.CONTROL: "#999999",
}

COLUMNS = 2
"""Panels beside each other in the picture."""


def comparison_table(cell: Cell) -> str:
    """Return the table of one KL target and round: every arm against retrained."""
    against, equal = cell.from_retrained()
    nothing = (None, math.nan)
    lines = []
    for arm in cell.arms:
        own, p = against.get(arm, nothing)
        at_equal, equal_p = equal.get(arm, nothing)
        reached = mean(cell.kl(arm).values())
        found = [f"{mean(cell.gold(arm).values()):.2f}", f"{reached:.1f}", interval(own)]
        lines.append([*found, p_text(p), wins(own), interval(at_equal), p_text(equal_p)])
    head = ["gold", "KL", "minus retrained (95 %)", "Holm p", "wins", "at equal KL", "Holm p"]
    return _arm_rows(cell, head, lines)


def details_table(cell: Cell) -> str:
    """Return the rest of one KL target and round: against fixed, the last policy, and costs."""
    last = cell.values("retrained", lambda r: r.gold_evaluated)
    lines = []
    for arm in cell.arms:
        fixed = paired(cell.gold(arm), cell.gold("fixed")) if arm != "fixed" else None
        evaluated = paired(cell.values(arm, lambda r: r.gold_evaluated), last)
        lines.append(
            [
                str(len(cell.gold(arm))),
                interval(fixed),
                wins(fixed),
                number_text(fixed.worst if fixed else math.nan, "+.2f"),
                interval(evaluated if arm != "retrained" else None),
                number_text(cell.number(arm, "accuracy_policy_before"), ".3f"),
                number_text(cell.number(arm, "rank_policy_before"), ".2f"),
                str(ARMS[arm].labels or "") if arm in ARMS else "",
                number_text(cell.number(arm, SECONDS), ".0f"),
            ]
        )
    head = ["seeds", "minus fixed (95 %)", "wins", "worst", "last policy", "accuracy", "rank"]
    return _arm_rows(cell, [*head, "labels", "seconds"], lines)


def _arm_rows(cell: Cell, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with a line for each of the cell's arms."""
    shown = [["arm", *head], ["---"] * (len(head) + 1)]
    shown += [[label(arm), *line] for arm, line in zip(cell.arms, lines, strict=True)]
    return "\n".join("| " + " | ".join(words) + " |" for words in shown)


def closer_table(cell: Cell) -> str:
    """Return the differences of the pairs of arms in `CLOSER`; empty where there is none."""
    lines = []
    for one, other in CLOSER:
        if one in cell.arms and other in cell.arms:
            raw, equal = cell.differences(one, other)
            cells = [ARMS[one].label, ARMS[other].label, interval(raw), wins(raw)]
            lines.append("| " + " | ".join([*cells, interval(equal)]) + " |")
    head = ["| arm | minus | gold (95 %) | wins | at equal KL |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def seeds_table(cell: Cell) -> str:
    """Return gold of every arm and seed."""
    seeds = sorted({r.seed for r in cell.results})
    golds = [cell.gold(arm) for arm in cell.arms]
    lines = [[f"{gold[s]:.2f}" if s in gold else "" for s in seeds] for gold in golds]
    return _arm_rows(cell, [str(seed) for seed in seeds], lines)


def picture(studies: Sequence[Study]) -> Figure:
    """One panel per world, KL target and round: difference to retrained with its interval."""
    cells = [(study.title(kl, number), cell) for study in studies for kl, number, cell in study]
    cells.sort(key=lambda one: -len(one[1].arms))  # panels of like height beside each other
    columns = min(COLUMNS, max(1, len(cells)))
    rows = -(-max(1, len(cells)) // columns)
    arms_of_row = [
        max((len(cell.arms) for _, cell in cells[start : start + columns]), default=1)
        for start in range(0, rows * columns, columns)
    ]
    heights = [0.2 * most + 1.1 for most in arms_of_row]
    figure = Figure(figsize=(7.0 * columns, sum(heights)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    for axes, (title, cell) in zip(panels, cells, strict=False):
        arms = [arm for arm in cell.arms if arm != "retrained"]
        found = {arm: paired(cell.gold(arm), cell.gold("retrained")) for arm in arms}
        arms = sorted((arm for arm in arms if found[arm].n), key=lambda arm: found[arm].mean)
        for place, arm in enumerate(arms):
            one = found[arm]
            colour = COLOURS[ARMS[arm].kind] if arm in ARMS else "#999999"
            if not math.isnan(one.low):
                axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.8)
            axes.plot(one.mean, place, "o", color=colour, markersize=5)
        axes.axvline(0.0, color="#333333", linewidth=0.8)
        axes.set_yticks(range(len(arms)), [label(arm) for arm in arms], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-0.8, max(len(arms), 1) - 0.2)
        axes.set_xlabel("gold, difference from retrained", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def tried_table(study: Study) -> str:
    """Return what was tried on the choosing seeds: gold and the difference to retrained."""
    lines = [
        "| KL | setting | seeds | gold | KL reached | minus retrained | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for kl, number, cell in study:
        for arm in cell.arms:
            about = {**ARMS, **CANDIDATES}.get(arm)
            gold = cell.gold(arm)
            found = paired(gold, cell.gold("retrained"))
            cells = [
                f"{kl:g}, round {number}",
                about.label if about else arm,
                str(len(gold)),
                f"{mean(gold.values()):.2f}",
                f"{mean(cell.kl(arm).values()):.1f}",
                "" if arm == "retrained" else interval(found),
                number_text(cell.number(arm, "accuracy_policy_before"), ".3f"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answer(study: Study) -> str:
    """Return a sentence per KL target and round: the best arm without labels, and the ceiling."""
    sentences = []
    for kl, number, cell in study:
        free = [
            arm
            for arm in cell.arms
            if arm in ARMS and ARMS[arm].kind in (Kind.LABEL_FREE, Kind.COMBINATION)
        ]
        if not free:
            continue
        against = {arm: paired(cell.gold(arm), cell.gold("retrained")) for arm in cell.arms}
        most = max(against[arm].n for arm in free)
        best = max(
            (arm for arm in free if against[arm].n == most), key=lambda arm: against[arm].mean
        )
        fixed = paired(cell.gold(best), cell.gold("fixed"))
        equal = at_same_kl(study, best, "retrained", target=kl, number=number)
        later = (study.world, best) in AFTERWARDS
        sentences.append(
            f"- **{study.title(kl, number)}, {most} seeds**: of the methods without labels, "
            f"*{ARMS[best].label}* {'(run after the others were seen) ' if later else ''}"
            f"ends highest, {interval(against[best])} gold above retraining "
            f"({interval(equal)} at equal KL) "
            f"and {interval(fixed)} above the fixed reward model{_shaping_alone(cell, best)}. "
            f"{_others(against)}{_way_to_gold(against, best)}"
        )
    return "\n".join(sentences)


def _shaping_alone(cell: Cell, arm: str) -> str:
    """Compare an arm that shapes its reward, too, with the shaping alone."""
    if ARMS[arm].kind is not Kind.COMBINATION or "log_sigmoid" not in cell.arms:
        return ""
    found = paired(cell.gold(arm), cell.gold("log_sigmoid"))
    return f", and {interval(found)} above log-sigmoid shaping alone"


def _way_to_gold(against: Mapping[str, Paired], arm: str) -> str:
    if "gold" not in against or not against["gold"].mean > 0:
        return ""
    share = against[arm].mean / against["gold"].mean
    return f" That is {100 * share:.0f} % of the distance from retraining to gold as the reward."


def _others(against: Mapping[str, Paired]) -> str:
    named = {"gold": "gold itself as the reward", "fresh_labels": "300 fresh labels"}
    found = [f"{words} {interval(against[arm])}" for arm, words in named.items() if arm in against]
    return f"Against retraining, {' and '.join(found)}." if found else ""


def means_table(cell: Cell, beginning: str, ending: str = "", form: str = ".2f") -> str:
    """Return the means over seeds of all numbers with this beginning and ending, by arm.

    A mean is left out where a seed lacks the number, such as that of a feature that no response of
    the seed's policy has. Empty where there is none.
    """
    present = sorted({name for r in cell.results for name in r.numbers})
    names = [
        name
        for name in present
        if name.startswith(beginning)
        and name.endswith(ending)
        and not all(math.isnan(cell.number(arm, name)) for arm in cell.arms)
    ]
    short = [name.removeprefix(beginning).removesuffix(ending).replace("_", " ") for name in names]
    if not names:
        return ""
    lines = ["| arm | " + " | ".join(short) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in cell.arms:
        values = [number_text(cell.number(arm, name), form) for name in names]
        if any(values):
            lines.append(f"| {label(arm)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def pages(results: Sequence[Result]) -> dict[str, str]:
    """Return the generated parts of docs/methods.md by the name of their block."""
    first, second = studies(results)
    found = {
        "goal": goal_table(first, second),
        "truth": truth_table((first, second)),
        "answer": "\n".join(filter(None, (answer(first), answer(second)))),
        "comparison": _by_cell(first, comparison_table),
        "details": _by_cell(first, details_table),
        "second": _by_cell(second, comparison_table)
        + "\n\n"
        + _by_cell(second, details_table)
        + "\n\n"
        + _by_cell(second, lambda cell: means_table(cell, "overpays_"), "what is paid for, "),
        "matched": "\n\n".join(filter(None, (matched_table(first), matched_table(second)))),
        "closer": _by_cell(first, closer_table) + "\n\n" + _by_cell(second, closer_table),
        "seeds": _by_cell(first, seeds_table) + "\n\n" + _by_cell(second, seeds_table),
        "tried": tried_table(Study(results, "", chosen_on=True)),
        "sight": sight_table(first)
        + "\n\n"
        + _by_cell(first, lambda cell: means_table(cell, "sight_", "_before")),
        "meta": _by_cell(first, lambda cell: means_table(cell, "meta_", form=".2g")),
        "pays": _by_cell(first, lambda cell: means_table(cell, "overpays_")),
    }
    return {name: text.strip() or "Nothing has been run yet." for name, text in found.items()}


def studies(results: Sequence[Result]) -> tuple[Study, Study]:
    """Return the reported results of the first and of the second world."""
    return Study(results, ""), Study(results, "adverts")


def _by_cell(study: Study, table: Callable[[Cell], str], what: str = "") -> str:
    found = [(what + study.title(kl, number), table(cell)) for kl, number, cell in study]
    return "\n\n".join(f"**{capital(title)}**\n\n{text}" for title, text in found if text)
