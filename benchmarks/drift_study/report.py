"""The tables and the picture of docs/monitor.md, from the results alone."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from gold_world.report import replace_block
from shiftrm.core.discrimination import auc
from shiftrm.core.intervals import measured
from shiftrm.errors import UserError
from shiftrm.files import Row, read_jsonl
from shiftrm.monitor.signals import SIGNALS
from shiftrm.report.plots import render

from .replay import BOUNDARY, CONFIG, VARIANTS
from .runs import EVERY, KINDS

SMOOTH = 5
"""Steps of the running mean of gold, whose peak and fall are read."""

FALL = 0.1
HORIZON = 30
"""Step at which the signals of all runs are compared; gold peaks before it in most."""

BAD = [name for name, kind in KINDS.items() if kind.bad]
BENIGN = [name for name, kind in KINDS.items() if not kind.bad]


def peak_and_fall(gold: Sequence[float]) -> tuple[int, int | None]:
    """Return the step of gold's highest running mean, and the first after it that is 10 % lower.

    Steps count from 1. A run whose gold never falls so far has no second step.
    """
    half = SMOOTH // 2
    means = [float(np.mean(gold[max(0, i - half) : i + half + 1])) for i in range(len(gold))]
    peak = int(np.argmax(means))
    limit = means[peak] - FALL * abs(means[peak])
    after = [i for i in range(peak, len(means)) if means[i] <= limit]
    return peak + 1, after[0] + 1 if after else None


def write_report(results: Path, docs: Path) -> list[Path]:
    """Write the page's blocks and the picture.

    Raises:
        UserError: no results.
    """
    if not results.is_file():
        raise UserError(
            f"{results}: no results; make some with `drift_monitor.py run` and `replay`"
        )
    rows = read_jsonl(results)
    page, image = docs / "monitor.md", docs / "monitor.png"
    blocks = {"alarms": alarms(rows), "variants": variants(rows), "signals": signals(rows)}
    for name, text in blocks.items():
        replace_block(page, name, text)
    image.write_bytes(render(picture(rows), format="png"))
    return [page, image]


# -- the audited alarm -----------------------------------------------------------------------------


def alarms(rows: Sequence[Row]) -> str:
    """Return the table of the alarm by kind of run."""
    lines = [
        "| runs | number | gold falls by 10 % | alarm before that | alarm at all | steps from "
        "gold's peak to the alarm | accuracy then | labels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, kind in KINDS.items():
        ours = [row for row in rows if row["kind"] == name]
        if ours:
            lines.append(f"| {kind.label} | {_alarm_cells(ours, 'as chosen')} |")
    exact = [row for row in rows if BOUNDARY in row["alarms"]]
    if exact:
        lines.append(f"| benign runs, {BOUNDARY} | {_alarm_cells(exact, BOUNDARY)} |")
    return "\n".join(lines)


def _alarm_cells(rows: Sequence[Row], variant: str) -> str:
    found = [(row, row["alarms"][variant]) for row in rows]
    steps = [(row, alarm["step"]) for row, alarm in found if alarm["step"] is not None]
    fallen = [row for row in rows if peak_and_fall(row["gold"])[1] is not None]
    apart = [step - peak_and_fall(row["gold"])[0] for row, step in steps]
    accuracy = [row["accuracy"][step - 1] for row, step in steps]
    cells = [
        str(len(rows)),
        str(len(fallen)),
        _share(_early(fallen, variant), len(fallen)) if fallen else "",
        _share(len(steps), len(rows)),
        _range(apart, "+.0f"),
        _range(accuracy, ".2f"),
        _range([alarm["labels"] for _, alarm in found], ".0f"),
    ]
    return " | ".join(cells)


def _early(fallen: Sequence[Row], variant: str) -> int:
    """Return in how many runs the alarm came before gold had fallen."""
    count = 0
    for row in fallen:
        step, fall = row["alarms"][variant]["step"], peak_and_fall(row["gold"])[1]
        count += step is not None and fall is not None and step < fall
    return count


def _share(count: int, of: int) -> str:
    """Return a share of runs with its exact 95 % interval (Clopper and Pearson)."""
    found = stats.binomtest(count, of).proportion_ci()
    return f"{count} of {of} ({found.low:.0%} to {found.high:.0%})"


def _range(values: Sequence[float], format: str) -> str:
    if not values:
        return ""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:{format}} ({low:{format}} to {high:{format}})"


def variants(rows: Sequence[Row]) -> str:
    """Return the table of other settings of the alarm."""
    bad = [row for row in rows if row["kind"] in BAD]
    fallen = [row for row in bad if peak_and_fall(row["gold"])[1] is not None]
    benign = [row for row in rows if row["kind"] in BENIGN]
    lines = [
        "| setting | alarm before gold fell by 10 % | alarm at all: over-optimised | benign | "
        "labels |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        at_all = [_alarmed(some, name) for some in (bad, benign)]
        labels = _range([row["alarms"][name]["labels"] for row in bad], ".0f")
        lines.append(
            f"| {name} | {_early(fallen, name)} of {len(fallen)} | {at_all[0]} of {len(bad)} | "
            f"{at_all[1]} of {len(benign)} | {labels} |"
        )
    return "\n".join(lines)


def _alarmed(rows: Sequence[Row], variant: str) -> int:
    return sum(row["alarms"][variant]["step"] is not None for row in rows)


# -- the free signals ------------------------------------------------------------------------------


def _at_horizon(row: Row, name: str) -> float | None:
    """Mean of the window that ends at the horizon."""
    values = row["signals"].get(name, [])[HORIZON - CONFIG.window * EVERY : HORIZON]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _change(row: Row, name: str) -> float | None:
    now = _at_horizon(row, name)
    start = [v for v in row["signals"].get(name, [])[: CONFIG.baseline * EVERY] if v is not None]
    return None if now is None or not start else now - float(np.mean(start))


Of = Callable[[Row, str], float | None]


def area(rows: Sequence[Row], name: str, of: Of) -> Any:
    """Return the area under the ROC curve of over-optimised against benign runs.

    1: higher (for a signal whose fall is suspicious: lower) in every over-optimised run. The
    interval draws seeds with all their runs. None if a kind is missing.
    """
    sign = 1.0 if SIGNALS.get(name).suspicious == "high" else -1.0
    found = [(row, of(row, name)) for row in rows]
    known = [(row["seed"], row["kind"] in BAD, sign * v) for row, v in found if v is not None]
    if len({bad for _, bad, _ in known}) < 2:
        return None
    bad_N, value_N = (np.array([one[i] for one in known]) for i in (1, 2))

    def drawn(weights: np.ndarray) -> float:
        times = weights.astype(np.int64)
        bad, value = np.repeat(bad_N, times), np.repeat(value_N, times)
        both = bad.any() and not bad.all()
        return auc(value[bad], value[~bad]) if both else math.nan

    return measured(drawn, [seed for seed, _, _ in known], seed=0)


def signals(rows: Sequence[Row]) -> str:
    """Return the table of the free signals."""
    lines = [
        "| signal | ROC area of its change | ROC area of its value | flagged: over-optimised, "
        "before gold fell | steps from gold's peak to the flag | flagged: gold as reward | "
        "squashed | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SIGNALS.names():
        if any(name in row["signals"] for row in rows):
            change, value = area(rows, name, _change), area(rows, name, _at_horizon)
            cells = [SIGNALS.get(name).label, *map(_interval, (change, value))]
            cells += [_flagged(rows, BAD, name), _after_peak(rows, name)]
            cells += [_flagged(rows, [kind], name) for kind in BENIGN]
            benign = [row for row in rows if row["kind"] in BENIGN]
            also = sum(row["flagged"].get(name) is not None for row in benign)
            words = verdict(change, value, also / len(benign) if benign else 0.0)
            lines.append(f"| {' | '.join([*cells, words])} |")
    return "\n".join(lines)


def _interval(found: Any) -> str:
    return "" if found is None else str(found)


def verdict(change: Any, value: Any, also: float) -> str:
    """Say what a signal told.

    Args:
        change, value: ROC areas; they tell something where the interval leaves 1/2.
        also: share of the benign runs in which the signal is flagged.
    """
    words = []
    known = [found for found in (change, value) if found is not None and found.low is not None]
    if not known:
        return "too few runs"
    for found, what in ((change, "its change"), (value, "its value")):
        if found not in known:
            continue
        if found.low > 0.5:
            words.append(f"{what} tells")
        elif found.high < 0.5:
            words.append(f"{what} misleads")
    if words and also > CONFIG.alpha:
        words.append("its flag comes in benign runs, too")
    return "; ".join(words) or "no information"


def _flagged(rows: Sequence[Row], kinds: Sequence[str], name: str) -> str:
    ours = [row for row in rows if row["kind"] in kinds]
    count = 0
    for row in ours:
        step, fall = row["flagged"].get(name), peak_and_fall(row["gold"])[1]
        bad = row["kind"] in BAD
        count += step is not None and (not bad or fall is None or step < fall)
    return f"{count} of {len(ours)}" if ours else ""


def _after_peak(rows: Sequence[Row], name: str) -> str:
    """Return the steps from gold's peak to the flag, over the over-optimised runs that have one."""
    found = [(row["flagged"].get(name), row) for row in rows if row["kind"] in BAD]
    return _range(
        [step - peak_and_fall(row["gold"])[0] for step, row in found if step is not None], "+.0f"
    )


# -- the picture -----------------------------------------------------------------------------------

COLOURS = {"free": "#c0392b", "kl": "#e08e0b", "gold": "#2c7fb8", "squashed": "#5aa469"}


def picture(rows: Sequence[Row]) -> Figure:
    """Gold and accuracy over the steps of every run with its alarm; what each signal told."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    for axes, column, title in (
        (left, "gold", "True reward; points: the alarm"),
        (middle, "accuracy", "Accuracy on the policy's own pairs"),
    ):
        for name, colour in COLOURS.items():
            ours = [row for row in rows if row["kind"] == name]
            for place, row in enumerate(ours):
                steps = range(1, len(row[column]) + 1)
                label = KINDS[name].label.split(":")[0] if not place else None
                axes.plot(steps, row[column], color=colour, alpha=0.35, linewidth=0.9, label=label)
                step = row["alarms"]["as chosen"]["step"]
                if step is not None:
                    axes.plot(step, row[column][step - 1], "o", color=colour, markersize=4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("PPO step", fontsize=9)
    middle.axhline(CONFIG.threshold, color="#333333", linewidth=0.8, linestyle="--")
    left.legend(fontsize=7, loc="lower left", frameon=False)
    known = [n for n in SIGNALS.names() if any(n in row["signals"] for row in rows)]
    for place, name in enumerate(known):
        for shift, of, mark in ((0.15, _change, "o"), (-0.15, _at_horizon, "s")):
            found = area(rows, name, of)
            if found is None:
                continue
            fill = "#444444" if mark == "o" else "white"
            if found.low is not None:
                right.plot([found.low, found.high], [place + shift] * 2, color="#888888")
            right.plot(found.value, place + shift, mark, color="#444444", markerfacecolor=fill)
    right.axvline(0.5, color="#333333", linewidth=0.8)
    right.set_yticks(range(len(known)), [SIGNALS.get(name).label for name in known], fontsize=8)
    right.set_xlim(-0.03, 1.03)
    right.set_title("Free signals: ROC area over runs, at step 30", fontsize=10, loc="left")
    right.set_xlabel("1/2: no information (full: change, hollow: value)", fontsize=9)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
