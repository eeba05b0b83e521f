"""A whole gold-world run: configuration, stages, records, page, and a summary in words."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from shiftrm.config import apply_overrides, differences, from_mapping, read_yaml, to_mapping
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.pipeline.demo_config import RunConfig
from shiftrm.pipeline.demo_plan import plan
from shiftrm.pipeline.engine import RECORDS_FILE, run_stages
from shiftrm.pipeline.folder import CONFIG_FILE, claim, progress
from shiftrm.records import Record, read_records

PAGE_FILE = "report.html"

FOLDER_README = """This folder holds one run of iterative RLHF on shiftrm's gold world.

report.html     what happened, in words and pictures; open it in a browser
records.jsonl   every measured number; the page is made from this file alone
config.yaml     every setting of the run
world/          the language: prompts, demonstrations, tokenizer, the random base model
sft/            the policy after supervised fine-tuning (an ordinary transformers checkpoint)
pairs/          preference pairs (TRL format), held-out pairs, samples of the SFT policy
reward_model/   the first reward model (an ordinary sequence-classification checkpoint)
evaluation/     the SFT policy's responses to the evaluation prompts, with their gold rewards
methods/        per method and round: groups or labels, reward model, policy, evaluation
comparison/     best rounds against each other

Each folder with a stage.json is a finished stage: its settings, records.jsonl and log.txt stand in
it. Give the same command again to continue an interrupted run, or to make the page anew.
"""


def configure(overrides: list[str]) -> RunConfig:
    """The default run with `key=value` settings applied."""
    return from_mapping(RunConfig, apply_overrides(to_mapping(RunConfig()), overrides))


def run_and_report(config: RunConfig, output: Path, *, workers: int) -> Path:
    """Run all stages that are not finished, write the page, print a summary; returns the page."""
    started = time.monotonic()
    stages = plan(config)
    claim(output, to_mapping(config), FOLDER_README)
    with progress(stages) as on_progress:
        run_stages(stages, output, seed=config.seed, workers=workers, on_progress=on_progress)
    page = report([output], output / PAGE_FILE)
    from shiftrm.report import terminal_summary

    console = Console(soft_wrap=True)
    console.print(
        terminal_summary(read_records(output / RECORDS_FILE)), markup=False, highlight=False
    )
    console.print(
        f"\n{(time.monotonic() - started) / 60:.1f} minutes. Page: {page}",
        markup=False,
        highlight=False,
    )
    return page


def report(runs: list[Path], output: Path) -> Path:
    """Write the page of one or several runs (seeds) from their records.

    Runs of a recipe get the recipe's page.

    Raises:
        UserError: a folder without records, two runs of the same seed, or runs of both kinds.
    """
    from shiftrm.report import write_report
    from shiftrm.report.recipe import is_recipe, write_recipe_report

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
