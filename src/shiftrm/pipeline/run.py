"""Run an experiment from its recipe file, or print its plan (`--dry-run`)."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shiftrm.config import apply_overrides, from_mapping, read_yaml, to_mapping
from shiftrm.errors import UserError, suggest
from shiftrm.pipeline.data_sets import place_of
from shiftrm.pipeline.domain_plan import unequal_budgets
from shiftrm.pipeline.domain_section import domain_arms
from shiftrm.pipeline.engine import Stage, run_stages
from shiftrm.pipeline.estimate import Estimate, estimate, judging_cost
from shiftrm.pipeline.experiment import Experiment, arms_by_name
from shiftrm.pipeline.external import command_notes
from shiftrm.pipeline.folder import claim, progress
from shiftrm.pipeline.inputs import KINDS, check_data, check_judge, check_models, input_hashes
from shiftrm.pipeline.job_checks import check_job, job_of, settings_of
from shiftrm.pipeline.jobs import External
from shiftrm.pipeline.memory import MEMORY_NOTE
from shiftrm.pipeline.plan import JUDGING, plan
from shiftrm.pipeline.resources import seconds, speed, time_note

__all__ = ["RECIPES", "dry_run", "find_recipe", "read_recipe", "run_recipe"]

FREE = ("execution", *(f"judge.{name}" for name in JUDGING))
"""Settings that may differ in the call that continues an interrupted run."""

RECIPES = Path(__file__).parent / "recipes"

FOLDER_README = """This folder holds one run of iterative RLHF (shiftrm run).

report.html     what happened, in words and pictures; open it in a browser
records.jsonl   every measured number; the page is made from this file alone
config.yaml     every setting of the run
inputs.json     hashes of the files and models that it reads
data/           what the run reads: pairs, prompts, demonstrations, held-out sets; dropped.jsonl
                lists the rows that were left out and why. In the gold world: world/, the language
                with its base model, and the prompts of every stage
pairs/          in the gold world: the labelled pairs and the held-out ones
sft/model       the policy after supervised fine-tuning (an ordinary transformers checkpoint)
reward_model/   the first reward model (model/: an ordinary sequence-classification checkpoint)
responses/      the SFT policy's responses to the test prompts
evaluation/     the same with their rewards
methods/        per arm and round: groups, reward_model, policy, responses, evaluation, judgement
comparison/     best rounds against each other

In a run over domains, after data/ and sft/: start/ (the reward model that all trainings start
from), meta/, pooled/, oracle/ and dpo/ (trained models), and policies/METHOD/DOMAIN/test with a
policy, its responses and its measurements.

judge-cache.jsonl   every verdict of the judge; a rerun asks nothing twice

Each folder with a stage.json is a finished stage: its settings (with the command that made it),
records.jsonl and log.txt stand in it. Give the same command again to continue an interrupted run,
or to make the page anew. .unfinished holds the checkpoints of a stage that was interrupted.
"""


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a recipe file, with `key=value` words over it.

    Args:
        path: a file, or the name of a recipe of this package, such as "gold_demo".

    Raises:
        UserError: no such file, an unknown setting (the nearest is suggested), or a bad value.
    """
    path = find_recipe(path)
    found = read_with_base(path)
    if not {"data", "world", "domains"} & set(found):
        raise UserError(
            f"{path}: not a recipe for `shiftrm run`: it has neither data nor world nor domains; "
            "recipes of OODPL say in their first lines which command takes them"
        )
    mapping = apply_overrides(found, list(overrides), create=True)
    for methods in (found, mapping):
        if isinstance(methods.get("methods"), list):
            known = found.get("methods")
            arms = known if isinstance(known, dict) else {}
            by_name = domain_arms if "domains" in found else arms_by_name
            methods["methods"] = by_name([str(m) for m in methods["methods"]], arms)
    try:
        return from_mapping(Experiment, {"name": path.stem, **mapping})
    except TypeError as error:  # a required field of a section
        raise UserError(f"{path}: {error}") from None


def find_recipe(path: str | Path) -> Path:
    """Return the recipe's file, given its path or the name of a recipe of this package.

    Raises:
        UserError: neither; the message lists the packaged ones.
    """
    if "/" in str(path) or Path(path).exists():
        return Path(path)
    packaged = RECIPES / f"{path}.yaml"
    if packaged.is_file():
        return packaged
    names = [found.stem for found in RECIPES.glob("*.yaml")]
    near = suggest(str(path).removesuffix(".yaml"), names)
    raise UserError(f"{path}: no such file, and not a recipe of this package{near}")


def read_with_base(path: str | Path) -> dict[str, Any]:
    """Read a YAML file over the one that it names as `base`, if any, in the same folder.

    Sections are merged setting by setting; `methods` and the data sets are taken whole.

    Raises:
        UserError: a file is missing, or bases that name each other.
    """
    chain: list[dict[str, Any]] = []
    seen: list[Path] = []
    here = Path(path)
    while True:
        if here.resolve() in seen:
            raise UserError(f"{path}: its base leads back to {here}")
        seen.append(here.resolve())
        found = read_yaml(here)
        base = found.pop("base", None)
        chain.append(found)
        if base is None:
            break
        here = here.parent / str(base)
    merged: dict[str, Any] = {}
    for found in reversed(chain):
        merged = _over(merged, found, whole=False)
    return merged


def _over(old: dict[str, Any], new: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key != "methods" and not whole:
            result[key] = _over(before, value, whole=key == "data")
        else:
            result[key] = value
    return result


def run_recipe(recipe: Experiment, output: Path) -> None:
    """Run all stages that are not finished yet."""
    stages = plan(recipe)
    check_settings(stages)
    check_inputs(recipe)
    for line in notes(recipe):
        print(line, file=sys.stderr, flush=True)
    inputs = input_hashes(recipe, output)
    claim(output, to_mapping(recipe), FOLDER_README, free=FREE, inputs=inputs)
    with progress(stages) as on_progress:
        run_stages(
            stages,
            output,
            seed=recipe.seed,
            workers=recipe.execution.workers,
            threads=1 if recipe.execution.in_process else None,
            on_progress=on_progress,
        )


def check_inputs(recipe: Experiment) -> None:
    """Check models, formats, files and the judge before a stage hours from now needs them.

    Raises:
        UserError: names the setting.
    """
    check_data(recipe)
    check_models(recipe)
    check_judge(recipe)


def check_settings(stages: Sequence[Stage]) -> None:
    """Check the settings of every training as the job itself will, before anything is done.

    Raises:
        UserError: an unknown setting or a bad value; names the stage.
    """
    seen: list[Any] = []
    for stage in stages:
        job = job_of(stage)
        own = getattr(job, "settings", None)
        key = (type(job), getattr(job, "method", None), own, settings_of(stage))
        if job is None or key in seen:
            continue
        seen.append(key)
        try:
            check_job(job, stage.execution["way"], processes=stage.execution["processes"])
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None


def notes(recipe: Experiment) -> list[str]:
    """Return a line for each setting that has less effect than one might expect."""
    data, found = recipe.data, []
    named, other = ("heldout", "prompts") if data and data.heldout else ("eval_prompts", "pairs")
    if data and data.heldout_share is not None and (data.heldout or data.eval_prompts):
        found.append(
            f"note: data.heldout_share={data.heldout_share} is a share of data.{other} alone: "
            f"data.{named} is named"
        )
    if recipe.domains is not None:
        found += unequal_budgets(recipe)
    found += command_notes(recipe)
    for name, arm in recipe.methods.items():
        again = arm.reward == "retrained" and recipe.rounds_of(name) == 1
        if again and not arm.is_dpo and not arm.settings:
            found.append(
                f"note: methods.{name} trains on the same pairs, from the same head and in the "
                "same order as the first reward model, so it will be that one again; give it "
                "settings of its own, or leave it out"
            )
    return found


def dry_run(recipe: Experiment) -> None:
    """Print the resolved plan: rows, stages, steps, memory, disk, time, and every command."""
    stages = plan(recipe)
    check_settings(stages)
    check_inputs(recipe)
    found = estimate(recipe, stages)
    console = Console(soft_wrap=True)
    say = {"markup": False, "highlight": False}
    console.print(f"{recipe.name}: {len(stages)} stages", **say)  # type: ignore[arg-type]
    for line in [*_sizes(recipe, found), *notes(recipe)]:
        console.print(line, **say)  # type: ignore[arg-type]
    rate, processes = speed(), recipe.execution.processes
    times = [
        seconds(stage, of_stage.operations, rate * processes)
        for stage, of_stage in zip(stages, found.stages, strict=True)
    ]
    table = Table("", "stage", "steps", "memory", "disk", "time", box=None, pad_edge=False)
    for number, (of_stage, took) in enumerate(zip(found.stages, times, strict=True), start=1):
        kept = None if of_stage.disk is None else of_stage.disk.kept
        numbers = (_count(of_stage.steps), _bytes(of_stage.memory), _bytes(kept), _duration(took))
        table.add_row(str(number), of_stage.stage, *numbers)
    console.print(table)
    console.print(_disk(recipe, found), **say)  # type: ignore[arg-type]
    known = [took for took in times if took is not None]
    rest = "" if len(known) == len(times) else ", without the stages marked ?"
    said = f"time, one stage after the other: {_duration(sum(known))}{rest}"
    console.print(said, **say)  # type: ignore[arg-type]
    console.print("\nCommands (paths of other stages are below the run's folder):", **say)  # type: ignore[arg-type]
    for stage_ in stages:
        if (job := job_of(stage_)) is not None:
            made = job.on_machine(stage_.execution["way"])
            words = shlex.join(made.command(f"{stage_.name}/{job.makes}"))
            program = "" if isinstance(job, External) else "shiftrm "
            console.print(f"{stage_.name}:\n  {program}{words}", **say)  # type: ignore[arg-type]
    time_said = time_note(rate, processes, in_process=recipe.execution.in_process)
    console.print(
        f"\n{MEMORY_NOTE}\n{time_said}\nNothing was run or written.",
        **say,  # type: ignore[arg-type]
    )


def _sizes(recipe: Experiment, found: Estimate) -> list[str]:
    lines = []
    size = "unknown (its configuration is not on this machine)"
    if found.parameters is not None:
        size = f"{found.parameters / 1e6:,.1f} million parameters"
    world = "" if recipe.world is None else f" {recipe.world.kind}"
    lines.append(f"model {recipe.model or f'of the gold world{world}'}: {size}")
    for name, rows in found.rows.items():
        if recipe.data is None:
            if name in KINDS:  # the others are the prompts of single stages
                lines.append(f"{name}: gold world: at most {rows:,} rows")
            continue
        source = getattr(recipe.data, name)
        if name == "demonstrations" and recipe.sft is None:
            continue
        where = "a share of the training prompts"
        if source is not None:
            where = f"{source.format}, {place_of(asdict(source))}"
        known = "rows unknown before it is read (not on this machine)"
        if rows is not None:
            known = f"{'' if found.exact else 'at most '}{rows:,} rows"
        lines.append(f"{name}: {where}: {known}")
    judge = recipe.judge
    lines.append(f"judge: {judge.kind}{f' {judge.model}' if judge.model else ''}")
    if judge.kind == "endpoint":
        lines.append(judging_cost(recipe, found.rows["eval_prompts"]))
    return lines


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "?"
    if value == 0:
        return "-"
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds == 0:
        return "-"
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return "under 1 s"


def _disk(recipe: Experiment, found: Estimate) -> str:
    """All that the run leaves, and the most that lies there while it runs."""
    disks = [stage.disk for stage in found.stages if stage.disk is not None]
    if found.sizes is None:
        return "disk: unknown, as the model is"
    kept = sum(disk.kept for disk in disks)
    largest = sorted((disk.checkpoints for disk in disks), reverse=True)
    more = sum(largest[: recipe.execution.workers])
    # a recipe may save no checkpoints
    besides = f", and up to {_bytes(more)} of checkpoints while a stage trains" if more else ""
    return f"disk: {_bytes(kept)} of models at the end{besides} (texts and logs are not counted)"
