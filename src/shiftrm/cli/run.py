"""`shiftrm run`: run a recipe of iterative RLHF, from data to report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shiftrm.cli.checks import check_folder, output_folder
from shiftrm.cli.options import About, option, optional
from shiftrm.config import to_mapping

if TYPE_CHECKING:
    from shiftrm.pipeline.experiment import Experiment

EPILOG = """examples:
  shiftrm run recipes/hh_helpful.yaml model=models/llama --dry-run
  shiftrm run recipes/hh_helpful.yaml model=models/llama --output runs/helpful
  shiftrm run recipes/hh_helpful.yaml model=meta-llama/Llama-2-7b-hf preset=by_effect \\
      execution.processes=8 judge.kind=endpoint judge.model=gpt-4o --output runs/helpful
  shiftrm run gold_domains --output runs/oodpl
  shiftrm run recipes/summary.yaml model=models/llama data.pairs.source=my/pairs.jsonl \\
      data.pairs.format=preference lora.lora_r=16

Every setting of the recipe can be given as key=value. `--dry-run` prints what would be done:
stages, rows, steps, memory and the commands themselves, which anyone can give by hand.

An interrupted run continues when the same command is given again; settings in `execution` may
differ then (processes, micro-batches, ...). Every setting with its meaning:
shiftrm.pipeline.experiment.
"""

ABOUT = About(
    help="run a recipe: rounds of adapting the reward model and optimising the policy",
    description="Runs a recipe: supervised fine-tuning, a reward model, then rounds of "
    "sampling, adapting, policy optimisation, measuring and judging; every stage is resumable.",
    epilog=EPILOG,
    again="to continue",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    recipe: str = option(
        "RECIPE", "a YAML file, or the name of a recipe of the package", positional=True
    )
    output: str | None = optional("DIR", "folder of the run", shown="runs/NAME of the recipe")
    dry_run: bool = option(help="print the plan; run nothing", default=False)
    settings: list[str] = option("key=value", "overrides the file's settings", default=[])


def run(options: Options) -> None:
    from shiftrm.pipeline.run import dry_run, read_recipe

    recipe = read_recipe(options.recipe, options.settings)
    inputs = [options.recipe, recipe.model, recipe.judge.model, recipe.evaluation.gold]
    if recipe.data is not None:
        sources = vars(recipe.data).values()
        inputs += [source.source for source in sources if hasattr(source, "source")]
    output = options.output or str(Path("runs") / recipe.name)
    if options.dry_run:
        check_folder(output, apart_from=inputs)
        dry_run(recipe)
    else:
        run_to_page(recipe, output_folder(output, apart_from=inputs))


def run_to_page(recipe: "Experiment", output: Path) -> None:
    """Run an experiment, write its page and print its summary."""
    import time

    from shiftrm.pipeline.run import run_recipe

    started = time.monotonic()
    run_recipe(recipe, output)
    from shiftrm.report.runs import finish

    finish(output, to_mapping(recipe), started=started)
