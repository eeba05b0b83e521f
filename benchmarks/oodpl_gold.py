"""OODPL on the gold world's domains: runs a recipe, and draws figures and tables from records.

    python benchmarks/oodpl_gold.py run --seed 0 --output runs/oodpl/seed-0
    python benchmarks/oodpl_gold.py draw runs/oodpl/seed-0 runs/oodpl/seed-1 --docs docs/oodpl.md

`run` continues where it was interrupted, and draws its figures and tables into its folder, too
(results.md). Settings: recipes/gold_domains.yaml, and `key=value` words
after the options, such as `meta.outer_steps=50`.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import yaml

from oodpl_figures import (
    beta_figure,
    gold_figure,
    gradient_norm_figure,
    training_figure,
)
from oodpl_tables import all_tables
from shiftrm.config import apply_overrides, differences, from_mapping, read_yaml, to_mapping
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.pipeline.domain_config import DomainRunConfig
from shiftrm.pipeline.domain_plan import plan
from shiftrm.pipeline.engine import RECORDS_FILE, run_stages
from shiftrm.records import read_records
from shiftrm.report.plots import render

RECIPE = Path(__file__).parents[1] / "recipes" / "gold_domains.yaml"


def configure(recipe: Path, overrides: list[str]) -> DomainRunConfig:
    """The recipe with `key=value` words applied."""
    whole = to_mapping(from_mapping(DomainRunConfig, read_yaml(recipe)))
    return from_mapping(DomainRunConfig, apply_overrides(whole, overrides))


def run(config: DomainRunConfig, output: Path, *, workers: int) -> None:
    """Every stage that is not finished."""
    path = output / "config.yaml"
    settings = to_mapping(config)
    if path.exists():
        changed = differences(read_yaml(path), settings)
        if changed:
            raise UserError(f"{output}: made with another configuration ({'; '.join(changed[:3])})")
    else:
        atomic_write_text(path, yaml.safe_dump(settings, sort_keys=False))
    stages, started = plan(config), time.monotonic()
    count = [0]

    def say(event: str, name: str) -> None:
        if event != "start":
            count[0] += 1
            seconds = time.monotonic() - started
            print(f"[{count[0]}/{len(stages)}] {seconds:.0f} s: {name} {event}", flush=True)

    run_stages(stages, output, seed=config.seed, workers=workers, on_progress=say)
    draw([output], output / "results.md")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes on {workers} workers", flush=True)


def draw(runs: list[Path], docs: Path) -> None:
    """Figures beside the page, tables between its marks; prints the tables, too.

    A page that is not there is made of the tables and figures.
    """
    records = [record for folder in runs for record in read_records(folder / RECORDS_FILE)]
    beta = float(read_yaml(runs[0] / "config.yaml")["beta"])
    figures = {
        "oodpl-training": training_figure(records, beta),
        "oodpl-gold": gold_figure(records),
        "oodpl-beta": beta_figure(records),
        "oodpl-gradient-norm": gradient_norm_figure(records),
    }
    for name, figure in figures.items():
        path = docs.parent / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render(figure, format="png"))
    tables = all_tables(records)
    text = docs.read_text(encoding="utf-8") if docs.exists() else _page(tables, list(figures))
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    atomic_write_text(docs, text)


def _page(tables: Iterable[str], figures: Iterable[str]) -> str:
    """Marks for every table, and the figures."""
    parts = [f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in tables]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(["# OODPL in the gold world", *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--recipe", type=Path, default=RECIPE)
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--output", type=Path, required=True)
    runner.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    runner.add_argument("settings", nargs="*")
    drawer = commands.add_parser("draw")
    drawer.add_argument("runs", type=Path, nargs="+")
    drawer.add_argument("--docs", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.command == "run":
            config = configure(args.recipe, [f"seed={args.seed}", *args.settings])
            run(config, args.output, workers=args.workers)
        else:
            draw(args.runs, args.docs)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
