"""The gold world's controls as a picture and as tables for `docs/gold-world.md`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.records import Record
from shiftrm.world.world import World

from .checks import LAST_STEPS, Check, Table
from .controls import ControlsConfig, at_kl

# Okabe and Ito's palette, as in the report.
_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = "#333333", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_GREY = "#888888"


def controls_figure(records: Sequence[Record], config: ControlsConfig) -> Figure:
    """Four panels: (a, e) the proxy, (a, b, e) gold, (d) gold at matched KL, (c) shuffled labels.

    Thick lines are means over the seeds; thin lines and points are single seeds.
    """
    table = Table(records)
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    proxy, gold, matched, shuffled = figure.subplots(2, 2).flat
    penalty = f"proxy, KL penalty {config.penalty:g} (e)"
    runs = {"proxy_no_kl": ("proxy, no KL penalty (a)", _ORANGE), "proxy_kl": (penalty, _BLUE)}
    _lines(proxy, table, "standardised_mean", runs)
    _dress(
        proxy, "Proxy: what the reward model says (a, e)", "PPO step", "reward, SFT standard dev."
    )
    _lines(
        gold, table, "gold_mean", {**runs, "gold_no_kl": ("gold itself, no penalty (b)", _GREEN)}
    )
    _dress(gold, "Gold: what the responses are worth (a, b, e)", "PPO step", "gold reward")
    _sft_level(gold, table)
    _matched_panel(matched, table, config)
    free = {
        at_kl("shuffled", config.shuffled_kl): (f"held at KL {config.shuffled_kl:g}", _BLUE),
        "shuffled_no_kl": ("no KL penalty", _ORANGE),
    }
    _lines(shuffled, table, "gold_mean", free)
    _dress(shuffled, "Gold with a reward model on shuffled labels (c)", "PPO step", "gold reward")
    _sft_level(shuffled, table)
    by_seed = [table.shuffled_accuracies(seed) for seed in table.seeds]
    means = ", ".join(f"{sum(values) / len(values):.3f}" for values in by_seed)
    proxy.legend(frameon=False, fontsize=9, loc="lower right")
    gold.legend(frameon=False, fontsize=9, loc="lower left")
    low, high = shuffled.get_ylim()
    shuffled.set_ylim(low, high + 0.4 * (high - low))  # room for the legend above the curves
    shuffled.legend(
        frameon=False,
        fontsize=9,
        loc="upper right",
        title=f"held-out accuracy by seed: {means}",
        title_fontsize=9,
        alignment="left",
    )
    return figure


def _lines(axes: Axes, table: Table, metric: str, runs: dict[str, tuple[str, str]]) -> None:
    for method, (label, colour) in runs.items():
        curves = [table.curve(seed, method, metric) for seed in table.seeds]
        steps = range(1, len(curves[0]) + 1)
        if len(curves) > 1:
            for curve in curves:
                axes.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.45)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(steps, mean, color=colour, linewidth=1.9, label=label)


def _sft_level(axes: Axes, table: Table) -> None:
    golds = [table.evaluated(seed, "sft") for seed in table.seeds]
    level = sum(golds) / len(golds)
    axes.axhline(level, color=_GREY, linewidth=1, linestyle="--", label="SFT policy")


def _matched_panel(axes: Axes, table: Table, config: ControlsConfig) -> None:
    names = [*(f"pairs_{count}" for count in config.pair_counts), "gold"]
    labels = [*(f"{count:,} pairs" for count in config.pair_counts), "gold as reward"]
    styles = zip((_PINK, _BLUE, _BLACK), ("o", "s", "^"), strict=True)
    for index, (target, (colour, marker)) in enumerate(
        zip(config.kl_targets, styles, strict=False)
    ):
        means = []
        for x, name in enumerate(names):
            golds = [table.at_end(seed, at_kl(name, target), "gold_mean") for seed in table.seeds]
            means.append(sum(golds) / len(golds))
            places = [x + 0.09 * (index - 1)] * len(golds)
            axes.plot(places, golds, marker, color=colour, markersize=4, alpha=0.55)
        places = [x + 0.09 * (index - 1) for x in range(len(names))]
        axes.plot(places, means, color=colour, linewidth=1.6, marker=marker, label=f"KL {target:g}")
    axes.set_xticks(range(len(names)), labels)
    _dress(axes, "Gold at matched KL, by reward (d)", "", "gold reward")
    _sft_level(axes, table)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def feature_table(world: World) -> str:
    """The terms of a gold reward as a Markdown table."""
    rows = []
    for feature in world.features:
        factors = [of[feature.name] for of in world.domain_factors.values()]
        span = f"{min(factors):.2f} to {max(factors):.2f}" if feature.varies else "the same"
        tasks = [
            f"{task} x {changes[feature.name]:g}"
            for task, changes in world.task_factors.items()
            if feature.name in changes
        ]
        rows.append(
            [
                f"`{feature.name}`",
                f"{feature.weight:+g}",
                feature.meaning,
                span,
                ", ".join(tasks) or "-",
            ]
        )
    return _markdown(["feature", "weight", "counts", "domain factors", "task factors"], rows)


def controls_tables(
    records: Sequence[Record], config: ControlsConfig, checks: Sequence[Check]
) -> str:
    """All numbers of the controls, seed by seed, as Markdown."""
    table = Table(records)
    return "\n\n".join(
        (
            "Evaluated policies (gold and KL of 800 responses after the last step):",
            _evaluations(table, config),
            "Held-out accuracy of the reward models:",
            _accuracies(table, config),
            f"Gold at matched KL, mean of the last {LAST_STEPS} steps (KL in brackets):",
            _matched_table(table, config),
            "The checks:",
            checks_table(checks),
        )
    )


def _evaluations(table: Table, config: ControlsConfig) -> str:
    runs = {
        "sft": "SFT policy",
        "proxy_no_kl": "(a) proxy, no penalty",
        "gold_no_kl": "(b) gold, no penalty",
        at_kl("shuffled", config.shuffled_kl): f"(c) shuffled, KL {config.shuffled_kl:g}",
        "shuffled_no_kl": "(c) shuffled, no penalty",
        "proxy_kl": f"(e) proxy, penalty {config.penalty:g}",
    }
    rows = []
    for method, label in runs.items():
        cells = [
            f"{table.evaluated(seed, method):.2f} ({table.evaluated(seed, method, 'kl'):.1f})"
            for seed in table.seeds
        ]
        rows.append([label, *cells])
    return _markdown(["gold (KL)", *_seed_headings(table)], rows)


def _accuracies(table: Table, config: ControlsConfig) -> str:
    names = {f"pairs_{count}": f"{count:,} pairs" for count in config.pair_counts}
    for shuffle in range(1, config.shuffles + 1):
        names[f"shuffled_{shuffle}"] = f"{config.proxy_pairs:,} pairs, shuffle {shuffle}"
    rows = [
        [label, *(f"{table.accuracy(seed, name):.3f}" for seed in table.seeds)]
        for name, label in names.items()
    ]
    return _markdown(["reward model", *_seed_headings(table)], rows)


def _matched_table(table: Table, config: ControlsConfig) -> str:
    names = {f"pairs_{count}": f"{count:,} pairs" for count in config.pair_counts}
    names["gold"] = "gold as reward"
    rows = []
    for target in config.kl_targets:
        for name, label in names.items():
            run = at_kl(name, target)
            golds = [table.at_end(seed, run, "gold_mean") for seed in table.seeds]
            kls = [table.at_end(seed, run, "sequence_kl") for seed in table.seeds]
            cells = [f"{gold:.2f} ({kl:.1f})" for gold, kl in zip(golds, kls, strict=True)]
            rows.append([f"{target:g}", label, *cells, f"{sum(golds) / len(golds):.2f}"])
    return _markdown(["KL target", "reward", *_seed_headings(table), "mean"], rows)


def checks_table(checks: Sequence[Check]) -> str:
    """Claims with their verdicts and numbers."""
    rows = []
    for check in checks:
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in check.numbers.items())
        seed = "all" if check.seed is None else str(check.seed)
        rows.append(
            [check.control, check.claim, seed, "holds" if check.holds else "FAILS", numbers]
        )
    return _markdown(["", "claim", "seed", "", "numbers"], rows)


def _seed_headings(table: Table) -> list[str]:
    return [f"seed {seed}" for seed in table.seeds]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def replace_block(path: Path, name: str, content: str) -> None:
    """Put generated text between `<!-- name:begin -->` and `<!-- name:end -->` of a document.

    Raises:
        UserError: the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path}: no block {name!r}; restore its begin and end comments")
    atomic_write_text(path, f"{before}{begin}\n{content}\n{end}{after}")


def block(path: Path, name: str) -> str:
    """The generated text between the markers of a block of a document."""
    rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->")[2]
    return rest.partition(f"<!-- {name}:end -->")[0].strip("\n")
