"""The page of finished runs, and what is printed at the end of one."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from shiftrm.config import differences, read_yaml
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.pipeline.engine import RECORDS_FILE
from shiftrm.pipeline.folder import CONFIG_FILE
from shiftrm.records import Record, read_records
from shiftrm.report.narrative import terminal_summary
from shiftrm.report.page import write_report
from shiftrm.report.recipe import is_recipe, summary, write_recipe_report

__all__ = ["PAGE_FILE", "finish", "write_page"]

PAGE_FILE = "report.html"


def finish(run: Path, config: dict[str, Any], *, started: float) -> Path:
    """Write the page of a run that has just ended and print its summary.

    Args:
        config: the run's configuration as plain data.
        started: when the command started, by `time.monotonic`.

    Returns:
        The page.
    """
    records = read_records(run / RECORDS_FILE)
    if is_recipe(config):
        page = write_recipe_report(records, run / PAGE_FILE, run, config)
        said = summary(records, config)
    else:
        page = write_page([run], run / PAGE_FILE)
        said = terminal_summary(records)
    minutes = (time.monotonic() - started) / 60
    console = Console(soft_wrap=True)
    console.print(said, markup=False, highlight=False)
    console.print(f"\n{minutes:.1f} minutes. Page: {page}", markup=False, highlight=False)
    return page


def write_page(runs: list[Path], output: Path) -> Path:
    """Write the page of one or several runs (seeds) from their records.

    Runs of a recipe get the recipe's page.

    Raises:
        UserError: a folder without records, two runs of the same seed, or runs of both kinds.
    """
    records: list[Record] = []
    seeds: dict[int, Path] = {}
    for run in runs:
        if not (run / RECORDS_FILE).is_file():
            raise UserError(
                f"{run}: no {RECORDS_FILE}; expected the output folder of a finished run"
            )
        found = read_records(run / RECORDS_FILE)
        for seed in {record.seed for record in found}:
            if seed in seeds:
                raise UserError(f"{run} and {seeds[seed]} are both of seed {seed}; give one")
            seeds[seed] = run
        records += found
    configs = [
        read_yaml(run / CONFIG_FILE) if (run / CONFIG_FILE).exists() else None for run in runs
    ]
    config = configs[0]
    for run, other in zip(runs, configs, strict=True):
        if is_recipe(other) != is_recipe(config):
            raise UserError(
                f"{run} and {runs[0]}: one is a recipe's run, the other is not; give runs of one "
                "kind"
            )
    if is_recipe(config):
        notes = _differences(runs, configs)
        return write_recipe_report(records, output, runs[0], config, notes=notes)
    return write_report(records, output, config=config, samples=_samples(runs[0], config or {}))


def _differences(runs: list[Path], configs: list[dict[str, Any] | None]) -> list[str]:
    """What else than the seed the recipes of merged runs differ in, a sentence a run."""
    free = ("seed", "name", "execution")
    first, *others = ({k: v for k, v in (c or {}).items() if k not in free} for c in configs)
    notes = []
    for run, other in zip(runs[1:], others, strict=True):
        if changed := differences(first, other):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            notes.append(
                f"{run} was run with other settings than {runs[0]} ({'; '.join(changed[:3])}"
                f"{more}): these are not seeds of one experiment, and means over them mix two."
            )
    return notes


def _samples(run: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The first few responses of SFT and of every arm's last round, for the page."""
    kept = config.get("evaluation", {}).get("kept_samples", 6)
    folders = [("sft", 0, run / "evaluation")]
    folders += [("dpo", 1, run / "methods" / "dpo" / "evaluation")]
    rounds = config.get("rounds", 0)
    for method in config.get("methods", []):
        path = run / "methods" / method / f"round-{rounds}" / "evaluation"
        folders.append((method, rounds, path))
    samples = []
    for method, number, folder in folders:
        path = folder / "responses.jsonl"
        if not path.is_file():
            continue
        for row in read_jsonl(path)[:kept]:
            samples.append(
                {
                    "method": method,
                    "round": number,
                    "prompt": row["prompt"],
                    "response": row["responses"][0],
                    "gold": row["gold"][0],
                    "proxy": row["proxy"][0],
                }
            )
    return samples
