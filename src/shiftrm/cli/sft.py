"""`shiftrm sft`: fine-tune a policy on demonstrations."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shiftrm.cli import settings
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm sft --model models/base --demonstrations demonstrations.jsonl --output models/sft
  shiftrm sft --model models/base --demonstrations chats.jsonl --output models/sft \\
      chat_template_path=template.jinja learning_rate=1e-5 num_train_epochs=2 max_length=2048
  accelerate launch -m shiftrm sft --config sft.yaml --use-peft --lora-r 16

A demonstration is {"prompt", "completion"}, text or chat messages each, or {"messages"}: a whole
conversation. The loss is on completions, or on every answer of the assistant. Demonstrations longer
than max_length tokens are dropped and counted; nothing is truncated. Chats need a template: the
tokenizer's own, or chat_template_path=FILE.jinja (or the folder of a model that has one).

"""

OPTIONS = ("config", "model", "demonstrations", "output")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sft",
        help="fine-tune a policy on demonstrations",
        description="Supervised fine-tuning of a causal language model, by TRL's SFTTrainer.",
        epilog=EPILOG + settings.POLICY_HELP.format(configs="trl.SFTConfig") + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint or hub name (needed)")
    parser.add_argument("--demonstrations", metavar="DATA", help="what to learn (needed)")
    settings.add_common(parser)
    parser.set_defaults(run=run, again="to continue from the last checkpoint, if there is one")


def fold_flags(arguments: Sequence[str]) -> list[str]:
    """See `settings.fold_flags`."""
    return settings.fold_flags(arguments, OPTIONS)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.progress import only_on_terminals

    options, chosen = settings.merged(args, OPTIONS, needed=("model", "demonstrations", "output"))
    output = settings.output(options, args.config)  # before the slow import
    settings.quieten_libraries()
    from shiftrm.pipeline.jobs import Sft

    only_on_terminals()
    job = Sft(
        options["model"],
        options["demonstrations"],
        settings=chosen,
        told=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    summary = job.run(Path(output))
    if summary is not None:
        print(summary)
