"""`shiftrm demo`: iterative RLHF on the built-in gold world, with a report."""

from dataclasses import dataclass

from shiftrm.cli.checks import output_folder
from shiftrm.cli.options import About, option, optional
from shiftrm.cli.run import run_to_page

EPILOG = """examples:
  shiftrm demo
  shiftrm demo --output runs/seed-1 --seed 1
  shiftrm demo --rounds 4 --same-coefficient
  shiftrm demo --output runs/quick policy.settings.steps=10 methods=[fixed,contrast]

The demo is the recipe gold_demo (`shiftrm run gold_demo --dry-run` prints its plan). An interrupted
demo continues when the same command is given again. OUTPUT/config.yaml lists all settings with
their values; any of them can be given as key=value.
"""

ABOUT = About(
    help="show a reward model going blind, and what helps, on the gold world",
    description="Trains a tiny policy and reward model in a small language whose true reward "
    "is known, runs rounds of reward-model adaptation and PPO for several methods at the same "
    "KL, and writes a page with what happened.",
    epilog=EPILOG,
    again="to continue",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    output: str = option("DIR", "folder of the run", default="runs/demo")
    seed: int | None = optional("N", shown="0")
    rounds: int | None = optional("N", shown="3")
    same_coefficient: bool = option(
        help="give all methods the same KL coefficient instead of the same KL", default=False
    )
    workers: int | None = optional(
        "N",
        "processes of one thread each; changes the time, not the numbers",
        shown="the number of cores",
        least=1,
    )
    settings: list[str] = option("key=value", "any setting, such as rounds=1", default=[])


def run(options: Options) -> None:
    import os

    from shiftrm.pipeline.run import read_recipe

    named = {"seed": options.seed, "rounds": options.rounds}
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
    if options.same_coefficient:
        overrides.append("policy.settings.kl_target=null")
    overrides.append(f"execution.workers={options.workers or os.cpu_count() or 1}")
    recipe = read_recipe("gold_demo", [*overrides, *options.settings])
    run_to_page(recipe, output_folder(options.output))
