"""`shiftrm evaluate`: one module per evaluation."""

from shiftrm.cli.evaluate import (
    answers,
    best_of_n,
    diversity,
    rewardbench,
    sheet,
    win_rate,
)
from shiftrm.cli.options import About

EPILOG = """examples:
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge reward-model --model models/other-reward
  shiftrm evaluate diversity sft.jsonl ppo.jsonl
  shiftrm evaluate rewardbench --model models/reward --data allenai/reward-bench-2
"""

ABOUT = About(
    help="judge, compare and measure responses and reward models",
    description="Measures responses or a reward model; `shiftrm evaluate NAME --help` says "
    "what each evaluation reads and writes.",
    epilog=EPILOG,
)

COMMANDS = {
    "win-rate": win_rate,
    "sheet": sheet,
    "answers": answers,
    "diversity": diversity,
    "best-of-n": best_of_n,
    "rewardbench": rewardbench,
}
