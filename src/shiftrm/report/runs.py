"""The page of finished runs, and what is printed at the end of one."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from shiftrm.config import differences, read_yaml
from shiftrm.errors import UserError
from shiftrm.pipeline.engine import RECORDS_FILE
from shiftrm.pipeline.folder import CONFIG_FILE
from shiftrm.records import Record, read_records
from shiftrm.report.domains import domain_summary, is_domain_run, write_domain_report
from shiftrm.report.page import PAGE_FILE, write_report
from shiftrm.report.samples import read_samples
from shiftrm.report.terminal import summary

__all__ = ["PAGE_FILE", "finish", "write_page"]


def finish(run: Path, config: dict[str, Any], *, started: float) -> Path:
    """Write the page of a run that has just ended and print its summary.

    Args:
        config: the run's configuration as plain data.
        started: when the command started, by `time.monotonic`.

    Returns:
        The page.
    """
    records = read_records(run / RECORDS_FILE)
    if is_domain_run(config):
        page = write_domain_report(records, run / PAGE_FILE, config=config)
        said = domain_summary(records)
    else:
        page = write_report(records, run / PAGE_FILE, config=config, samples=read_samples(run))
        said = summary(records, config)
    minutes = (time.monotonic() - started) / 60
    console = Console(soft_wrap=True)
    console.print(said, markup=False, highlight=False)
    console.print(f"\n{minutes:.1f} minutes. Page: {page}", markup=False, highlight=False)
    return page


def write_page(runs: list[Path], output: Path) -> Path:
    """Write the page of one or several runs (seeds) from their records.

    Raises:
        UserError: a folder without records, or two runs of the same seed.
    """
    records: list[Record] = []
    seeds: dict[int, Path] = {}
    for run in runs:
        if not (run / RECORDS_FILE).is_file():
            raise UserError(
                f"{run}: no {RECORDS_FILE}; expected the output folder of a finished run"
            )
        found = read_records(run / RECORDS_FILE)
        if not found:
            raise UserError(f"{run / RECORDS_FILE}: holds no measurements; repeat the run")
        for seed in {record.seed for record in found}:
            if seed in seeds:
                raise UserError(f"{run} and {seeds[seed]} are both of seed {seed}; give one")
            seeds[seed] = run
        records += found
    configs = [
        read_yaml(run / CONFIG_FILE) if (run / CONFIG_FILE).exists() else None for run in runs
    ]
    config, notes = configs[0], _differences(runs, configs)
    if config is not None and is_domain_run(config):
        return write_domain_report(records, output, config=config, notes=notes)
    return write_report(records, output, config=config, samples=read_samples(runs[0]), notes=notes)


def _differences(runs: list[Path], configs: list[dict[str, Any] | None]) -> list[str]:
    """Return a sentence for each run whose settings differ in more than the seed."""
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
