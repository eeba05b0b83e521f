"""Several seeds of the demo as one picture and one page of tables.

    for s in 0 1 2 3 4; do shiftrm demo --seed $s --output runs/seed-$s; done
    python benchmarks/demo_seeds.py runs/seed-*

Writes docs/demo.png and docs/demo.md from the runs' records alone.
"""

import argparse
import os
from pathlib import Path

from matplotlib.figure import Figure

from shiftrm.config import read_yaml
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.records import read_records
from shiftrm.report import sight, tables, win_tables
from shiftrm.report.headline import headline, kl_sentences
from shiftrm.report.measurements import estimate
from shiftrm.report.results import Results
from shiftrm.report.warnings import warnings

DOCS = Path(__file__).resolve().parents[1] / "docs"

INTRODUCTION = """# The demo over {seeds} seeds

`shiftrm demo` on the gold world: {arms} arms, {rounds} rounds, KL target {kl_target}, {steps} PPO
steps a round, from the same SFT policy and the same pairs. Made on {machine} with {versions},
source commit {commits}, by

```
for s in {seed_list}; do shiftrm demo --seed $s --output runs/seed-$s; done
python benchmarks/demo_seeds.py runs/seed-*
```

**{headline}**

{sentences}

![Gold, accuracy and variance by round](demo.png)

*Left: gold reward after each round at the same KL target, mean over seeds with its 95 % interval;
points are single seeds. Middle: accuracy of the round's reward model on fresh pairs of the policy
it was made for (before PPO); 0.5 is a coin. Right: variance of the fixed reward model's reward
differences while PPO moves the policy, relative to SFT samples; thin lines are seeds.*

{kl}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="in words")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="default: docs/")
    args = parser.parse_args()
    records = [record for run in args.runs for record in read_records(run / "records.jsonl")]
    m = Results(records, read_yaml(args.runs[0] / "config.yaml"))
    if len(m.seeds) < 2:
        raise UserError("give the runs of at least two seeds")
    args.docs.mkdir(parents=True, exist_ok=True)
    picture(m).savefig(args.docs / "demo.png", dpi=130, metadata={"Software": None})
    atomic_write_text(args.docs / "demo.md", page(m, args.machine))
    print(f"{args.docs / 'demo.md'}, {args.docs / 'demo.png'}")


def picture(m: Results) -> Figure:
    """Gold by round, accuracy on the policy's pairs by round, variance while PPO runs."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    gold, accuracy, variance = figure.subplots(1, 3)
    arms = _arms(m)
    for place, arm in enumerate(arms):
        style = m.arms[arm]
        shift = 0.07 * (place - (len(arms) - 1) / 2)
        for axes, metric in ((gold, "gold_mean"), (accuracy, "accuracy_policy_before")):
            if style.is_gold and axes is accuracy:
                continue
            rounds = m.rounds(arm)
            found = [m.estimate("evaluate", arm, r, metric) for r in rounds]
            axes.errorbar(
                [r + shift for r in rounds],
                [e.mean if e else float("nan") for e in found],
                yerr=[(e.half_width or 0.0) if e else 0.0 for e in found],
                color=style.colour,
                marker=style.marker,
                capsize=2,
                linewidth=1.5,
                markersize=5,
                label=style.short,
            )
            for r in rounds:
                values = list(m.final("evaluate", arm, r, metric).values())
                axes.plot(
                    [r + shift] * len(values),
                    values,
                    ".",
                    color=style.colour,
                    alpha=0.35,
                    markersize=4,
                )
    start = m.estimate("evaluate", "sft", 0, "gold_mean")
    if start:
        gold.axhline(start.mean, color="#56B4E9", linestyle=":", label="SFT")
    accuracy.axhline(0.5, color="grey", linestyle=":")
    _variance(m, variance)
    for axes, title in (
        (gold, "Gold reward at matched KL"),
        (accuracy, "Accuracy on the policy's own pairs"),
        (variance, "Variance of reward differences (fixed)"),
    ):
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (gold, accuracy):
        axes.set_xlabel("round")
        axes.set_xticks(m.all_rounds)
    figure.legend(
        *gold.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    return figure


def _arms(m: Results) -> list[str]:
    """The arms with rounds: those with reward models, and gold as the reward."""
    return [*m.with_rewards, *([m.ceiling] if m.ceiling else [])]


def _variance(m: Results, axes) -> None:  # type: ignore[no-untyped-def]
    """The fixed arm's rounds one after the other, on a logarithmic axis."""
    lines: dict[int, list[tuple[int, float]]] = {}
    offset = 0
    for r in m.rounds("fixed"):
        curves = m.curve("ppo", "fixed", r, "relative_difference_variance")
        for seed, points in curves.items():
            lines.setdefault(seed, []).extend((offset + step, value) for step, value in points)
        offset += max((points[-1][0] for points in curves.values()), default=0)
        axes.axvline(offset, color="grey", linestyle=":", linewidth=0.8)
    for points in lines.values():
        axes.plot(*zip(*points, strict=True), color="#333333", alpha=0.4, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("PPO step, all rounds")


def page(m: Results, machine: str) -> str:
    """The page's text, from the numbers."""
    head = headline(m)
    (_, versions), *_ = sorted(m.provenance)
    steps = max(int(p[-1][0]) for p in m.curve("ppo", "fixed", 1, "sequence_kl").values())
    text = INTRODUCTION.format(
        seeds=len(m.seeds),
        arms=len(_arms(m)),
        kl_target=f"{m.section('policy')['settings']['kl_target']:g}",
        rounds=len(m.all_rounds),
        steps=steps,
        machine=machine,
        versions=versions,
        commits=" and ".join(sorted({commit for commit, _ in m.provenance})),
        seed_list=" ".join(map(str, m.seeds)),
        headline=head.title,
        sentences="\n".join(f"- {s}" for s in [*head.by_gold, *warnings(m)]),
        kl=" ".join(kl_sentences(m)),
    )
    shown = (
        _gold_by_seed(m),
        win_tables.win_table(m),
        win_tables.best_round_table(m),
        tables.metrics_table(m),
        *sight.sight_tables(m),
    )
    return text + "\n" + "\n".join(_markdown(table) for table in shown)


def _gold_by_seed(m: Results) -> tables.Table:
    rows = []
    for arm in _arms(m):
        for r in m.rounds(arm):
            values = m.final("evaluate", arm, r, "gold_mean")
            kls = m.final("evaluate", arm, r, "kl")
            found = estimate(values)
            rows.append(
                (
                    m.name(arm),
                    str(r),
                    *(f"{values[s]:.2f} @ {kls[s]:.1f}" if s in values else "-" for s in m.seeds),
                    tables.number(found),
                )
            )
    columns = ("Arm", "Round", *(f"seed {s}" for s in m.seeds), "mean and 95 % interval")
    return tables.Table("Gold @ KL, every seed", columns, tuple(rows), "", text_columns=2)


def _markdown(table: tables.Table) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" for _ in table.columns) + "|"
    body = "\n".join([line(table.columns), rule, *map(line, table.rows)])
    return f"## {table.title}\n\n{body}\n\n{table.note}\n"


if __name__ == "__main__":
    main()
