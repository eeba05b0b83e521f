"""`shiftrm train`: a reward model from preference pairs, with MetaRM where groups are given."""

import argparse
from typing import Any

EPILOG = """examples:
  shiftrm train --model models/sft --pairs pairs.jsonl --output models/reward
  shiftrm train --model models/sft --pairs pairs.jsonl --groups groups.jsonl \\
      --output models/reward-round-2 preset=scale_free learning_rate=5e-6 num_train_epochs=1

pairs.jsonl: TRL preference rows {"prompt", "chosen", "rejected"}; groups.jsonl: what `shiftrm
sample` writes. Any option of trl.RewardConfig, and with --groups of MetaRMConfig (preset,
meta_step, meta_learning_rate, meta_batch_size, deploy), can be given as key=value.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a reward model on preference pairs, and adapt it to unlabelled responses",
        description="Trains a reward model. With --groups, unlabelled responses of today's policy, "
        "it is a MetaRM step on every optimizer step; without, plain Bradley-Terry training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint or hub name")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="preference pairs, JSONL")
    parser.add_argument("--eval-pairs", metavar="FILE", help="held-out pairs, JSONL")
    parser.add_argument("--groups", metavar="FILE", help="response groups of the policy, JSONL")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the result")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="any training option, as learning_rate=5e-6",
    )
    parser.set_defaults(run=run, again="to start anew; nothing was written")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.checks import output_folder
    from shiftrm.cli.progress import only_on_terminals

    output = output_folder(args.output)  # before the seconds that the next import takes
    from shiftrm.trainers.command import train

    only_on_terminals()
    summary = train(
        args.model,
        pairs=Path(args.pairs),
        eval_pairs=Path(args.eval_pairs) if args.eval_pairs else None,
        groups=Path(args.groups) if args.groups else None,
        output=output,
        settings=args.settings,
    )
    print(summary)
