"""`shiftrm demo`: iterative RLHF on the built-in gold world, with a report."""

import argparse
from typing import Any

EPILOG = """examples:
  shiftrm demo
  shiftrm demo --output runs/seed-1 --seed 1
  shiftrm demo --rounds 4 --same-coefficient
  shiftrm demo --output runs/quick ppo.steps=10 methods=[fixed,metarm_scale_free]

An interrupted demo continues when the same command is given again. All settings and their values
stand in OUTPUT/config.yaml; any of them can be given as key=value.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="show a reward model going blind, and what helps, on the gold world",
        description="Trains a tiny policy and reward model in a small language whose true reward "
        "is known, runs rounds of reward-model adaptation and PPO for several methods at the same "
        "KL, and writes a page with what happened.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="default: 0")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="default: 3")
    parser.add_argument(
        "--same-coefficient",
        action="store_true",
        help="give all methods the same KL coefficient instead of the same KL",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes of one thread each; changes the time, not the numbers (default: cores)",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting, such as ppo.steps=10"
    )
    parser.set_defaults(run=run, again="to continue")


def run(args: argparse.Namespace) -> None:
    import os
    import time

    from shiftrm.cli.checks import at_least_one, output_folder
    from shiftrm.config import to_mapping
    from shiftrm.pipeline.demo_run import configure, run_demo

    named = {"seed": args.seed, "rounds": args.rounds}
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
    if args.same_coefficient:
        overrides.append("matched_kl=false")
    workers = args.workers if args.workers is not None else os.cpu_count() or 1
    at_least_one(workers, "--workers")
    config = configure([*overrides, *args.settings])
    output, started = output_folder(args.output), time.monotonic()
    run_demo(config, output, workers=workers)
    from shiftrm.report.runs import finish

    finish(output, to_mapping(config), started=started)
