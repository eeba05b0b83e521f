"""OODPL in the gold world: figures and tables of docs/oodpl.md from the records of runs.

shiftrm run gold_domains seed=0 --output runs/oodpl/seed-0
python benchmarks/oodpl_gold.py runs/oodpl/seed-* --docs docs/oodpl.md
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from shiftrm.config import read_yaml
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.pipeline.engine import RECORDS_FILE
from shiftrm.records import read_records
from shiftrm.report.domain_figures import all_figures
from shiftrm.report.domains import all_tables
from shiftrm.report.plots import render
from shiftrm.report.tables import Table


def draw(runs: list[Path], docs: Path) -> None:
    """Write figures beside the page and tables between its marks; print the tables.

    A page that does not exist is made of the tables and figures.
    """
    records = [record for folder in runs for record in read_records(folder / RECORDS_FILE)]
    beta = float(read_yaml(runs[0] / "config.yaml")["domains"]["beta"])
    figures = {f"oodpl-{name}": drawn for name, (_, drawn) in all_figures(records, beta).items()}
    for name, figure in figures.items():
        path = docs.parent / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render(figure, format="png"))
    tables = {name: markdown(table) for name, table in all_tables(records).items()}
    text = docs.read_text(encoding="utf-8") if docs.exists() else _page(tables, list(figures))
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    atomic_write_text(docs, text)


def _page(tables: Iterable[str], figures: Iterable[str]) -> str:
    """Return marks for every table, and the figures."""
    parts = [f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in tables]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(["# OODPL in the gold world", *parts]) + "\n"


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--docs", type=Path, required=True)
    args = parser.parse_args()
    try:
        draw(args.runs, args.docs)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
