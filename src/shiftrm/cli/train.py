"""`shiftrm train`: a reward model from preference pairs, with MetaRM where groups are given."""

import argparse
import json
import os
import re
import shlex
import sys
import warnings
from typing import Any

from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError, suggest

EPILOG = """examples:
  shiftrm train --model models/sft --pairs pairs.jsonl --output models/reward
  shiftrm train --model models/sft --pairs pairs.jsonl --groups groups.jsonl \\
      --output models/reward-round-2 preset=scale_free learning_rate=5e-6 num_train_epochs=1
  shiftrm train --config reward.yaml --learning-rate 1e-5 --eval-pairs chat=chat.csv
  accelerate launch -m shiftrm train --config reward.yaml

Settings: every option of trl.RewardConfig (and so of TrainingArguments), with --groups of
MetaRMConfig (preset, meta_step, meta_learning_rate, meta_batch_size, deploy), and of
trl.ModelConfig (dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...), as key=value, as
--key value (--learning-rate 5e-6, --bf16, --no-bf16) or in the file. Code that comes with a model
is run with --trust-remote-code only.

FILE.yaml holds the same options and settings in one flat mapping; the command line wins:
  model: models/sft
  pairs: pairs.jsonl
  eval_pairs: {chat: chat.csv, summaries: owner/name::test}
  learning_rate: 5e-6

Checkpoints are written as save_strategy and save_steps say, into .NAME.work beside the output. A
command that was interrupted, killed or stopped by a full disk continues from the last one when it
is given again. With LoRA the output is the merged model, and the adapter is in its folder adapter.
"""

OPTIONS = ("config", "model", "pairs", "eval_pairs", "groups", "output")

FLAG = re.compile(r"--(\w[\w-]*)(?:=(.*))?", re.DOTALL)

SETTING = re.compile(r"[A-Za-z_]\w*=")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a reward model on preference pairs, and adapt it to unlabelled responses",
        description="Trains a reward model. With --groups, unlabelled responses of today's policy, "
        "it is a MetaRM step on every optimizer step; without, plain Bradley-Terry training.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with the options and settings below")
    parser.add_argument("--model", metavar="DIR", help="checkpoint or hub name (needed)")
    parser.add_argument("--pairs", metavar="DATA", help="preference pairs (needed)")
    parser.add_argument(
        "--eval-pairs",
        metavar="[NAME=]DATA",
        action="append",
        help="held-out pairs; may be repeated, with a name for each",
    )
    parser.add_argument("--groups", metavar="DATA", help="response groups of the policy")
    parser.add_argument("--output", metavar="DIR", help="folder of the result (needed)")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting, as learning_rate=5e-6"
    )
    parser.set_defaults(run=run, again="to continue from the last checkpoint, if there is one")


def fold_flags(arguments: list[str]) -> list[str]:
    """Flags that are no options of the command, as the words `key=value` that they stand for.

    Which settings there are is known only once torch is loaded; so the flags are collected here
    and judged there.
    """
    options: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag = FLAG.fullmatch(word)
        name = flag[1].replace("-", "_") if flag else ""
        if flag is None:
            (options if word.startswith("-") else words).append(word)
        elif name in (*OPTIONS, "help"):
            option = f"--{name.replace('_', '-')}"
            options += [option] if flag[2] is None else [f"{option}={flag[2]}"]
            if name != "help" and flag[2] is None and rest:
                options.append(rest.pop(0))
        elif flag[2] is not None:
            words.append(f"{name}={flag[2]}")
        else:
            values = []
            while rest and not rest[0].startswith("--") and not SETTING.match(rest[0]):
                values.append(rest.pop(0))
            text = values[0] if len(values) == 1 else json.dumps(values) if values else "true"
            words.append(f"{name}={text}")
    return [*options, *words]  # argparse takes positional words from one place only


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.checks import output_folder
    from shiftrm.cli.progress import only_on_terminals

    options, settings = _merged(args)
    output = output_folder(options["output"])  # before the seconds that the next import takes
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL's and PEFT's own use of the old name, which nobody who reads this can change.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    from shiftrm.trainers.command import train

    only_on_terminals()
    summary = train(
        options["model"],
        pairs=options["pairs"],
        eval_pairs=_named(options.get("eval_pairs")),
        groups=options.get("groups"),
        output=Path(output),
        settings=settings,
        command=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    if summary is not None:
        print(summary)


def _merged(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and settings: those of the file, and over them those of the command line."""
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if args.config is not None:
        from shiftrm.config import read_yaml

        for word, value in read_yaml(args.config).items():
            key = str(word).replace("-", "_")
            (options if key in OPTIONS else settings)[key] = value
        if "config" in options:
            raise UserError(f"{args.config}: a configuration cannot name another one")
        for key in ("model", "pairs", "groups", "output"):
            if not isinstance(options.get(key, ""), str):
                raise UserError(f"{args.config}: {key} is {options[key]!r}; expected text")
    options |= {key: v for key in OPTIONS if (v := getattr(args, key)) is not None}
    for word in args.settings:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not a setting; write key=value, as learning_rate=5e-6")
        if key in OPTIONS:
            raise UserError(f"unknown setting {key!r}; it is the option --{key.replace('_', '-')}")
        settings[key] = text
    for key in ("model", "pairs", "output"):
        if options.get(key) is None:
            close = [k for k in settings if suggest(k, [key]).startswith("; did you mean")]
            hint = f"; {close[0]!r} is no option" if close else ""
            raise UserError(f"--{key} is missing; give it here or as {key} in --config{hint}")
    return options, settings


def _named(given: Any) -> dict[str, str]:
    """Held-out sources by name: of `DATA`, `NAME=DATA`, or what the file says."""
    if isinstance(given, dict):
        named = [(str(name), source) for name, source in given.items()]
    else:
        words = [given] if isinstance(given, str) else given or []
        named = [_name_and_source(word) for word in words]
    for name, source in named:
        if not isinstance(source, str):
            raise UserError(f"eval_pairs {name}: {source!r}; expected a file or a hub name")
        if not re.fullmatch(r"[\w-]*", name):
            raise UserError(f"eval_pairs: {name!r} is no name; use letters, digits, _ and -")
    names = [name for name, _ in named]
    if len(named) > 1 and ("" in names or len(set(names)) < len(names)):
        raise UserError("several --eval-pairs need a name each, as --eval-pairs chat=chat.jsonl")
    return dict(named)


def _name_and_source(word: Any) -> tuple[str, Any]:
    if not isinstance(word, str):
        return "", word
    name, equals, source = word.partition("=")
    return (name, source) if equals and not os.path.exists(word) else ("", word)
