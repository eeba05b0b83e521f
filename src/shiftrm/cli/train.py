"""`shiftrm train`: train a reward model on preference pairs, with MetaRM if groups are given."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shiftrm.cli import settings
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm train --model models/sft --pairs pairs.jsonl --output models/reward
  shiftrm train --model models/sft --pairs pairs.jsonl --groups groups.jsonl \\
      --output models/reward-round-2 preset=scale_free learning_rate=5e-6 num_train_epochs=1
  shiftrm train --config reward.yaml --learning-rate 1e-5 --eval-pairs chat=chat.csv
  accelerate launch -m shiftrm train --config reward.yaml

"""

FILES = """
FILE.yaml holds the same options and settings in one flat mapping; the command line wins:
  model: models/sft
  pairs: pairs.jsonl
  eval_pairs: {chat: chat.csv, summaries: owner/name::test}
  learning_rate: 5e-6

Checkpoints are written as save_strategy and save_steps say, into .NAME.work beside the output. A
command that was interrupted, killed or stopped by a full disk continues from the last one when it
is given again. With LoRA the output is the merged model, and the adapter is in its folder adapter.
"""

OPTIONS = ("config", "model", "pairs", "eval_pairs", "groups", "method", "output")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a reward model on preference pairs, and adapt it to unlabelled responses",
        description="Trains a reward model. With --groups, unlabelled responses of today's policy, "
        "it is a MetaRM step on every optimizer step; without, plain Bradley-Terry training.",
        epilog=EPILOG + settings.HELP + FILES + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    settings.add_arguments(parser)
    parser.add_argument("--groups", metavar="DATA", help="response groups of the policy")
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="a method of `shiftrm adapt`, or package.module:attribute; by default metarm with "
        "--groups, and Bradley-Terry alone without",
    )
    parser.set_defaults(run=run, again="to continue from the last checkpoint, if there is one")


def fold_flags(arguments: Sequence[str]) -> list[str]:
    """See `settings.fold_flags`."""
    return settings.fold_flags(arguments, OPTIONS)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.progress import only_on_terminals

    options, chosen = settings.merged(args, OPTIONS)
    output = settings.output(options, args.config)  # before the slow import
    settings.quieten_libraries()
    from shiftrm.pipeline.jobs import TrainReward

    only_on_terminals()
    job = TrainReward(
        options["model"],
        options["pairs"],
        settings.named(options.get("eval_pairs"), "eval_pairs"),
        options.get("groups"),
        options.get("method"),
        settings=chosen,
        told=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    summary = job.run(Path(output))
    if summary is not None:
        print(summary)
