"""`shiftrm evaluate`: one module per evaluation, with `register(subparsers)` and `run(args)`."""

import argparse
from types import ModuleType
from typing import Any

from shiftrm.cli.evaluate import (
    answers,
    best_of_n,
    diversity,
    rewardbench,
    sheet,
    win_rate,
)

EPILOG = """examples:
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge reward-model --model models/other-reward
  shiftrm evaluate diversity sft.jsonl ppo.jsonl
  shiftrm evaluate rewardbench --model models/reward --data allenai/reward-bench-2
"""

EVALUATIONS: tuple[ModuleType, ...] = (win_rate, sheet, answers, diversity, best_of_n, rewardbench)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="judge, compare and measure responses and reward models",
        description="Measures responses or a reward model; `shiftrm evaluate NAME --help` says "
        "what each evaluation reads and writes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    below = parser.add_subparsers(title="evaluations", metavar="NAME", required=True)
    for evaluation in EVALUATIONS:
        evaluation.register(below)
