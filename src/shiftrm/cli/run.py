"""`shiftrm run`: run a recipe of iterative RLHF, from data to report."""

import argparse
from typing import Any

EPILOG = """examples:
  shiftrm run recipes/hh_helpful.yaml model=models/llama --dry-run
  shiftrm run recipes/hh_helpful.yaml model=models/llama --output runs/helpful
  shiftrm run recipes/hh_helpful.yaml model=meta-llama/Llama-2-7b-hf preset=scale_free \\
      execution.processes=8 judge.kind=endpoint judge.model=gpt-4o --output runs/helpful
  shiftrm run recipes/summary.yaml model=models/llama data.pairs.source=my/pairs.jsonl \\
      data.pairs.format=preference lora.lora_r=16

Every setting of the recipe can be given as key=value. `--dry-run` prints what would be done:
stages, rows, steps, memory and the commands themselves, which anyone can give by hand.

An interrupted run continues when the same command is given again; what stands in `execution` may
differ then (processes, micro-batches, ...). Every setting with its meaning:
shiftrm.pipeline.experiment.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a recipe: rounds of adapting the reward model and optimising the policy",
        description="Runs a recipe: supervised fine-tuning, a reward model, then rounds of "
        "sampling, adapting, policy optimisation, measuring and judging; every stage is resumable.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe's file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the file's settings")
    parser.add_argument("--output", metavar="DIR", help="default: runs/NAME of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; run nothing")
    parser.set_defaults(run=run, again="to continue")


def options_first(words: list[str]) -> list[str]:
    """Move options first, since argparse needs consecutive positional arguments."""
    options: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        (options if word.startswith("-") else others).append(word)
        if word == "--output" and rest:
            options.append(rest.pop(0))
    return [*options, *others]


def run(args: argparse.Namespace) -> None:
    import time
    from pathlib import Path

    from shiftrm.cli.checks import output_folder
    from shiftrm.cli.settings import quieten_libraries

    quieten_libraries()
    from shiftrm.config import to_mapping
    from shiftrm.pipeline.run import dry_run, read_recipe, run_recipe

    recipe = read_recipe(args.recipe, args.settings)
    if args.dry_run:
        dry_run(recipe)
        return
    inputs = [args.recipe, recipe.model, recipe.judge.model, recipe.evaluation.gold]
    inputs += [source.source for source in vars(recipe.data).values() if hasattr(source, "source")]
    output = output_folder(args.output or str(Path("runs") / recipe.name), apart_from=inputs)
    started = time.monotonic()
    run_recipe(recipe, output)
    from shiftrm.report.runs import finish

    finish(output, to_mapping(recipe), started=started)
