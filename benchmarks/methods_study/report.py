"""The study as a picture and as the tables of `docs/methods.md`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from shiftrm.measure.sight import Prediction, predicts
from shiftrm.records import Record

from .arms import ARMS, CANDIDATES, Kind
from .plan import START
from .results import SECONDS, Result
from .statistics import Paired, at_target, holm, paired, pooled_slope

CHOOSING = (100, 101, 102, 103)
"""Seeds on which settings were chosen; none of them is reported in the comparison."""

SHARING = ("log_sigmoid", "par", "clip", "reference_reset")
"""Arms whose reward model is that of `retrained`."""

AFTERWARDS = {("adverts", "contrast_both_75_log_sigmoid")}
"""World and arm: run only after the other arms of that world had been seen."""

CLOSER = (
    ("contrast_75_log_sigmoid", "retrained_750_log_sigmoid"),
    ("contrast_75_same_steps", "log_sigmoid"),
    ("contrast_75_log_sigmoid", "log_sigmoid"),
    ("contrast_log_sigmoid", "log_sigmoid"),
)
"""Pairs of arms that differ from each other in less than from `retrained`."""

COLOURS = {
    Kind.REFERENCE: "#333333",
    Kind.LABEL_FREE: "#0072B2",
    Kind.COMBINATION: "#D55E00",
    Kind.LABELS: "#009E73",
    Kind.CONTROL: "#999999",
}

COLUMNS = 2
"""Panels beside each other in the picture."""

WORLD_NAMES = {"": "", "adverts": "second world, "}
"""How a world is called in headings."""

Measure = Callable[[Result], float]


class Study:
    """The reported results of one world, by KL target and round."""

    def __init__(self, results: Sequence[Result], world: str, *, chosen_on: bool = False) -> None:
        self.world = world
        self.results = [
            r for r in results if r.world == world and (r.seed in CHOOSING) == chosen_on
        ]

    def cell(self, kl: float, number: int) -> "Cell":
        return Cell([r for r in self.results if r.kl_target == kl and r.round == number], kl)

    def __iter__(self) -> Iterator[tuple[float, int, "Cell"]]:
        """Yield the cells that have at least two arms, in order of KL and round."""
        for kl, number in sorted({(r.kl_target, r.round) for r in self.results}):
            cell = self.cell(kl, number)
            if len(cell.arms) > 1:
                yield kl, number, cell

    def title(self, kl: float, number: int) -> str:
        return _capital(f"{WORLD_NAMES.get(self.world, self.world)}KL {kl:g}, round {number}")


class Cell:
    """All arms and seeds at one KL target and round."""

    def __init__(self, results: Sequence[Result], kl: float) -> None:
        self.results, self.kl = list(results), kl
        present = {r.arm for r in results}
        self.arms = [name for name in ARMS if name in present]
        self.arms += sorted(present - set(self.arms) - {START})
        points = [(r.arm, r.kl, r.gold) for r in results if r.arm != "gold"]
        self.slope = pooled_slope(points)

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        return {r.seed: measure(r) for r in self.results if r.arm == arm}

    def gold(self, arm: str) -> dict[int, float]:
        return self.values(arm, lambda r: r.gold)

    def adjusted(self, arm: str) -> dict[int, float]:
        return self.values(arm, lambda r: at_target(r.gold, r.kl, self.kl, self.slope))

    def number(self, arm: str, name: str) -> float:
        """Return the mean over seeds of a number of the evaluation; NaN if it is not there."""
        found = [r.numbers[name] for r in self.results if r.arm == arm and name in r.numbers]
        return sum(found) / len(found) if found else math.nan


def comparison_table(cell: Cell) -> str:
    """Return the table of one KL target and round: every arm against retrained and fixed."""
    others = [arm for arm in cell.arms if arm != "retrained"]
    against = {arm: paired(cell.gold(arm), cell.gold("retrained")) for arm in others}
    equal = {
        arm: paired(cell.adjusted(arm), cell.adjusted("retrained"))
        for arm in others
        if arm != "gold"  # the slope is that of arms that over-optimise, which gold does not
    }
    p_of = dict(zip(others, holm([against[arm].p for arm in others]), strict=True))
    equal_p = dict(zip(equal, holm([found.p for found in equal.values()]), strict=True))
    last = cell.values("retrained", lambda r: r.gold_evaluated)
    lines = [
        "| arm | seeds | gold | KL | minus retrained (95 %) | Holm p | wins | at equal KL | Holm p "
        "| last policy | minus fixed (95 %) | wins | worst | accuracy | rank | labels | seconds |",
        "|" + "---|" * 17,
    ]
    for arm in cell.arms:
        gold = cell.gold(arm)
        about = ARMS.get(arm)
        fixed = paired(gold, cell.gold("fixed"))
        own = against.get(arm)
        evaluated = paired(cell.values(arm, lambda r: r.gold_evaluated), last)
        lines.append(
            "| "
            + " | ".join(
                [
                    about.label if about else arm,
                    str(len(gold)),
                    f"{_mean(gold.values()):.2f}",
                    f"{_mean(cell.values(arm, lambda r: r.kl).values()):.1f}",
                    _interval(own),
                    _p(p_of.get(arm, math.nan)),
                    _wins(own),
                    _interval(equal.get(arm)),
                    _p(equal_p.get(arm, math.nan)),
                    _interval(evaluated if own else None),
                    _interval(fixed if arm != "fixed" else None),
                    _wins(fixed if arm != "fixed" else None),
                    _number(fixed.worst if arm != "fixed" else math.nan, "+.2f"),
                    _number(cell.number(arm, "accuracy_policy_before"), ".3f"),
                    _number(cell.number(arm, "rank_policy_before"), ".2f"),
                    str(about.labels or "") if about else "",
                    _number(cell.number(arm, SECONDS), ".0f"),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def closer_table(cell: Cell) -> str:
    """Return the differences of the pairs of arms in `CLOSER`; empty where there is none."""
    lines = []
    for one, other in CLOSER:
        if one in cell.arms and other in cell.arms:
            raw = paired(cell.gold(one), cell.gold(other))
            equal = paired(cell.adjusted(one), cell.adjusted(other))
            cells = [ARMS[one].label, ARMS[other].label, _interval(raw), _wins(raw)]
            lines.append("| " + " | ".join([*cells, _interval(equal)]) + " |")
    head = ["| arm | minus | gold (95 %) | wins | at equal KL |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def seeds_table(cell: Cell) -> str:
    """Return gold of every arm and seed."""
    seeds = sorted({r.seed for r in cell.results})
    lines = ["| arm | " + " | ".join(map(str, seeds)) + " |", "|---" * (len(seeds) + 1) + "|"]
    for arm in cell.arms:
        gold = cell.gold(arm)
        shown = [f"{gold[seed]:.2f}" if seed in gold else "" for seed in seeds]
        label = ARMS[arm].label if arm in ARMS else arm
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def picture(studies: Sequence[Study]) -> Figure:
    """One panel per world, KL target and round: difference to retrained with its interval."""
    cells = [(study.title(kl, number), cell) for study in studies for kl, number, cell in study]
    columns = min(COLUMNS, max(1, len(cells)))
    rows = -(-max(1, len(cells)) // columns)
    arms_of_row = [
        max((len(cell.arms) for _, cell in cells[start : start + columns]), default=1)
        for start in range(0, rows * columns, columns)
    ]
    heights = [0.24 * most + 1.1 for most in arms_of_row]
    figure = Figure(figsize=(5.2 * columns, sum(heights)), layout="constrained")
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
        axes.set_yticks(
            range(len(arms)), [ARMS[arm].label if arm in ARMS else arm for arm in arms], fontsize=8
        )
        axes.set_title(title, fontsize=10)
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
                f"{_mean(gold.values()):.2f}",
                f"{_mean(cell.values(arm, lambda r: r.kl).values()):.1f}",
                "" if arm == "retrained" else _interval(found),
                _number(cell.number(arm, "accuracy_policy_before"), ".3f"),
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
        equal = paired(cell.adjusted(best), cell.adjusted("retrained"))
        later = (study.world, best) in AFTERWARDS
        sentences.append(
            f"- **{study.title(kl, number)}, {most} seeds**: of the methods without labels, "
            f"*{ARMS[best].label}* {'(run after the others were seen) ' if later else ''}"
            f"ends highest, {_interval(against[best])} gold above retraining "
            f"({_interval(equal)} at equal KL) "
            f"and {_interval(fixed)} above the fixed reward model{_shaping_alone(cell, best)}. "
            f"{_others(against)}{_way_to_gold(against, best)}"
        )
    return "\n".join(sentences)


def _shaping_alone(cell: Cell, arm: str) -> str:
    """Compare an arm that shapes its reward, too, with the shaping alone."""
    if ARMS[arm].kind is not Kind.COMBINATION or "log_sigmoid" not in cell.arms:
        return ""
    found = paired(cell.gold(arm), cell.gold("log_sigmoid"))
    return f", and {_interval(found)} above log-sigmoid shaping alone"


def _way_to_gold(against: Mapping[str, Paired], arm: str) -> str:
    if "gold" not in against or not against["gold"].mean > 0:
        return ""
    share = against[arm].mean / against["gold"].mean
    return f" That is {100 * share:.0f} % of the distance from retraining to gold as the reward."


def _others(against: Mapping[str, Paired]) -> str:
    named = {"gold": "gold itself as the reward", "fresh_labels": "300 fresh labels"}
    found = [f"{words} {_interval(against[arm])}" for arm, words in named.items() if arm in against]
    return f"Against retraining, {' and '.join(found)}." if found else ""


def sight_table(study: Study) -> str:
    """Return how each sight test ranks the reward models, against what labels would say.

    Every reward model (seed, arm, round, KL target) is one point; intervals resample seeds. Arms
    that share a reward model count once. The second rows leave out arms that were trained on pairs
    like those of the tests.
    """
    alone = [r for r in study.results if r.arm not in ("gold", START, *SHARING)]
    lines = [
        "| sight test | reward models | accuracy on policy pairs | rank correlation with gold "
        "| models | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for label, results in (
        ("all", alone),
        ("not trained on such pairs", [r for r in alone if not r.arm.startswith("contrast")]),
    ):
        records = [
            Record("evaluate", f"{r.arm} {r.kl_target:g}", r.round, name, value, seed=r.seed)
            for r in results
            for name, value in r.numbers.items()
            if name.startswith(("sight_", "accuracy_policy_", "rank_policy_"))
        ]
        ranks = {p.kind: p for p in predicts(records, when="before", target="rank_policy")}
        for one in predicts(records, when="before"):
            cells = [one.kind, label, _rho(one), _rho(ranks[one.kind]), str(one.n), str(one.seeds)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means_table(cell: Cell, beginning: str, ending: str = "", form: str = ".2f") -> str:
    """Return the means over seeds of all numbers with this beginning and ending, by arm.

    Empty where there is no such number.
    """
    names = sorted(
        {
            name
            for r in cell.results
            for name in r.numbers
            if name.startswith(beginning) and name.endswith(ending)
        }
    )
    short = [name.removeprefix(beginning).removesuffix(ending).replace("_", " ") for name in names]
    if not names:
        return ""
    lines = ["| arm | " + " | ".join(short) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in cell.arms:
        values = [_number(cell.number(arm, name), form) for name in names]
        if any(values):
            label = ARMS[arm].label if arm in ARMS else arm
            lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def pages(results: Sequence[Result]) -> dict[str, str]:
    """Return the generated parts of docs/methods.md by the name of their block."""
    first, second = studies(results)
    found = {
        "answer": "\n".join(filter(None, (answer(first), answer(second)))),
        "comparison": _by_cell(first, comparison_table),
        "second": _by_cell(second, comparison_table)
        + "\n\n"
        + _by_cell(second, lambda cell: means_table(cell, "overpays_"), "what is paid for, "),
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
    return "\n\n".join(f"**{_capital(title)}**\n\n{text}" for title, text in found if text)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _mean(values: object) -> float:
    found = list(values)  # type: ignore[call-overload]
    return sum(found) / len(found) if found else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _rho(found: Prediction) -> str:
    if found.rho is None or found.low is None or found.high is None:
        return "" if found.rho is None else f"{found.rho:+.2f}"
    return f"{found.rho:+.2f} ({found.low:+.2f}, {found.high:+.2f})"


def _interval(found: Paired | None) -> str:
    if found is None or not found.n:
        return ""
    if math.isnan(found.low):
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} ({found.low:+.2f}, {found.high:+.2f})"


def _wins(found: Paired | None) -> str:
    return "" if found is None or not found.n else f"{found.wins}/{found.n}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0")
