"""The study's tables and pictures in docs/oodpl.md, from the result rows alone."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gold_world.report import replace_block
from methods_study.statistics import paired
from shiftrm.core.intervals import t_quantile_95
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.report.plots import render

from .plan import ARMS, BASELINES, SWEEP, WAYS, read_results
from .worlds import WORLDS

COMPARED = (
    ("oodpl", "pooled"),
    ("oodpl_bt", "pooled"),
    ("oodpl_meta", "pooled"),
    ("oodpl_meta", "pooled_on"),
    ("oodpl", "plain"),
    ("oodpl", "regressed"),
    ("regressed", "pooled"),
)
"""Arms and what they are compared with: variants of OODPL that were named before the fresh seeds
were run, and controls."""

SEEN = {"tastes": (0, 1, 2), "signed": (0, 1)}
"""Seeds that are not fresh: held-out results of an earlier study, or of an earlier form of the
world, had been seen on them when the arms were named."""

GOLD = {"best_of": "best_of", "weighted": "weighted_gold", "ppo": "ppo_gold"}
"""Way of guiding -> the column of its gold."""


def write_report(results: Path, docs: Path) -> list[Path]:
    """Write the page's blocks and the pictures of which there are rows.

    Raises:
        UserError: no results.
    """
    rows = read_results(results)
    if not rows:
        raise UserError(f"{results}: no results; make some with `oodpl.py arms`")
    page = docs / "oodpl.md"
    for name, text in blocks(rows).items():
        replace_block(page, name, text)
    paths = [page]
    convergence = of(rows, "convergence")
    if convergence:
        paths.append(docs / "oodpl-convergence.png")
        paths[-1].write_bytes(render(picture(convergence), format="png"))
    return paths


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the generated text of the page by the name of its block."""
    found = {"study-inner": inner_table(of(rows, "inner")), "study-sweep": sweep_table(rows)}
    for world in WORLDS:
        arms = [row for row in of(rows, "arms") if row["world"] == world]
        found[f"study-{world}"] = arms_table(arms)
        found[f"study-{world}-differences"] = differences_table(arms)
        found[f"study-{world}-seeds"] = seeds_table(arms)
        if world in SEEN:
            others = [row for row in arms if row["seed"] not in SEEN[world]]
            found[f"study-{world}-others"] = differences_table(others)
    found["study-convergence"] = norms_table(of(rows, "convergence"))
    return found


def of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return Markdown."""
    if not lines:
        return "No seeds yet."
    head = [columns, ["---"] * len(columns)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*head, *lines])


def _mean(rows: Sequence[Row], name: str, places: int = 3) -> str:
    """Return mean and half a 95 % t interval over the rows that have the number.

    Two seeds have the mean alone: their interval would be twelve times the half of their distance.
    """
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{places}f}"
    if len(values) < 3:
        return mean
    half = t_quantile_95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{places}f}"


def inner_table(rows: Sequence[Row]) -> str:
    """Return A_PL and loss by D and rate, means over seeds."""
    lines = []
    for world in WORLDS:
        mine = [row for row in rows if row["world"] == world]
        for name in dict.fromkeys(row["name"] for row in mine):
            some = [row for row in mine if row["name"] == name]
            cells = [
                _inner_mean(some, who, what)
                for what in ("accuracy", "loss")
                for who in ("reference", "equal", "gold")
            ]
            first = some[0]
            where = [WORLDS[world].label, str(first["inner_steps"]), f"{first['inner_rate']:g}"]
            lines.append([*where, *cells, str(len(some))])
    what = ("A_PL before", "equal weights", "gold weights")
    columns = ["world", "D", "rate", *what, "loss before", "equal", "gold", "seeds"]
    return _table(columns, lines)


def _inner_mean(rows: Sequence[Row], who: str, what: str) -> str:
    """Return a mean over seeds; a loss that is not finite makes it meaningless."""
    if any(row[f"{who}_loss"] is None for row in rows):
        return "diverges"
    return f"{statistics.mean(row[f'{who}_{what}'] for row in rows):.3f}"


def sweep_table(rows: Sequence[Row]) -> str:
    """Return the settings of OODPL on the watched domains."""
    mine = of(rows, "sweep")
    seeds = sorted({row["seed"] for row in mine})
    keys = ("rank", "best_of", "weighted_gold", "first_loss", "best_loss", "best_step")
    lines = []
    for world, name in itertools.product(WORLDS, (*BASELINES, *SWEEP)):
        found = {r["seed"]: r for r in mine if (r["world"], r["name"]) == (world, name)}
        if found:
            label = ARMS[name].label if name in BASELINES else name
            cells = [_by_seed([found.get(seed, {}).get(key) for seed in seeds]) for key in keys]
            lines.append([WORLDS[world].label, label, *cells])
    columns = ["world", "setting", "rank correlation", "gold, best of 16", "gold, weighted"]
    return _table([*columns, "loss at the start", "lowest", "at step"], lines)


def _by_seed(values: Sequence[float | None]) -> str:
    """Return the values of the seeds in order; a dash where there is none."""
    shown = [f"{v:.3f}" if isinstance(v, float) else "-" if v is None else str(v) for v in values]
    return " / ".join(shown) if set(shown) != {"-"} else ""


def _label(name: str) -> str:
    return f"{ARMS[name].label} (ours)" if ARMS[name].ours else ARMS[name].label


def arms_table(rows: Sequence[Row]) -> str:
    """Return every arm in the held-out domains, a column for every way of guiding."""
    lines = []
    for name in ARMS:
        some = [row for row in rows if row["name"] == name]
        if some:
            label = _label(name)
            keys = ("rank", "best_of", "weighted_gold", "weighted_kl", "ppo_gold", "ppo_kl")
            own = [_mean(some, k) for k in ("policy_gold", "policy_kl")]
            lines.append([label, *[_mean(some, k) for k in keys], *own, str(len(some))])
    columns = ["method", "rank correlation", "best of 16", "weighted", "KL", "PPO", "KL"]
    return _table([*columns, "itself", "KL", "seeds"], lines)


def differences_table(rows: Sequence[Row]) -> str:
    """Return paired differences in gold, for every way of guiding."""

    def values(arm: str, column: str) -> dict[int, float]:
        return {r["seed"]: r[column] for r in rows if r["name"] == arm and column in r}

    lines = []
    for name, other in COMPARED:
        for way, column in GOLD.items():
            found = paired(values(name, column), values(other, column))
            if found.n > 1:
                ends = (round(v, 2) + 0.0 for v in (found.mean, found.low, found.high))
                interval = "{:+.2f} ({:+.2f} to {:+.2f})".format(*ends)
                wins = f"{found.wins} of {found.n}"
                lines.append([_label(name), _label(other), WAYS[way], interval, wins])
    return _table(["method", "minus", "way of guiding", "gold", "seeds above it"], lines)


def seeds_table(rows: Sequence[Row]) -> str:
    """Return the gold of every seed, of the arms that guide in some way."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name, (way, column) in itertools.product(ARMS, GOLD.items()):
        found = {r["seed"]: r[column] for r in rows if r["name"] == name and column in r}
        if found:
            cells = [f"{found[seed]:.2f}" if seed in found else "" for seed in seeds]
            lines.append([_label(name), WAYS[way], *cells])
    return _table(["method", "way of guiding", *map(str, seeds)], lines)


def norms_table(rows: Sequence[Row]) -> str:
    """Return the mean norm of the first and of the last ten steps, by beta."""
    lines = []
    for name in _betas(rows):
        norms = np.mean([row["norm"] for row in rows if row["name"] == name], axis=0)
        first, last, beta = norms[:10].mean(), norms[-10:].mean(), float(name.split()[1])
        lines.append([f"{beta:g}", f"{first:.3f}", f"{last:.3f}", f"{beta * first:.3f}"])
    return _table(["beta", "first ten steps", "last ten", "beta times the first"], lines)


def _betas(rows: Sequence[Row]) -> list[str]:
    return sorted({row["name"] for row in rows}, key=lambda name: float(name.split()[1]))


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last `width` values at every place."""
    return [float(np.mean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]


def picture(rows: Sequence[Row]) -> Figure:
    """The norm of the hypergradient, and the outer loss, over the outer steps by beta."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = _betas(rows)
    colours = dict(zip(names, ("#c0392b", "#2c7fb8", "#5aa469", "#e08e0b"), strict=False))
    shown: list[tuple[str, Callable[..., object], str]] = [
        ("norm", left.semilogy, "Norm of the hypergradient"),
        ("loss", right.plot, "Outer loss"),
    ]
    for key, draw, _ in shown:
        for name in names:
            mean = np.mean([row[key] for row in rows if row["name"] == name], axis=0)
            draw(running_mean(list(mean), 10), color=colours[name], label=name, linewidth=1.2)
    for axes, (_, _, title) in zip((left, right), shown, strict=True):
        axes.set_title(f"{title} (mean of 10 steps)", fontsize=10, loc="left")
        axes.set_xlabel("outer step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    return figure
