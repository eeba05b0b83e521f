"""`shiftrm meta-train`: train a reward model on many domains, for a domain without labels."""

import argparse
import os
import re
import shlex
import sys
from typing import Any

from shiftrm.cli.settings import add_words, from_file
from shiftrm.cli.settings import output as result_folder
from shiftrm.errors import UserError

EPILOG = """examples:
  shiftrm meta-train --model models/sft --domains domains --output models/reward max_steps=1000
  shiftrm meta-train --config recipes/shp.yaml --domains shp --model models/sft --output models/rm
  accelerate launch -m shiftrm meta-train --config recipes/shp.yaml domains_per_step=4 ...

A domain is a folder: DIR/NAME/finetune.jsonl (prompt, response) and pairs.jsonl (prompt, chosen,
rejected), eval_pairs.jsonl to be watched; DIR/splits.json or the options say what is held out.

Settings: every field of OODPLConfig, and so of transformers.TrainingArguments, as key=value:
max_steps (K), learning_rate, inner_steps (D), inner_learning_rate, beta, normalize_weights,
curvature (exact, finite_difference, none), last_steps, support_batch_size, query_batch_size,
domains_per_step, mixture, micro_batch_size, reduction, max_length, eval_strategy, eval_steps, ...

FILE.yaml holds the same options and settings in one flat mapping; the command line wins. A command
that was interrupted continues from the last checkpoint when it is given again.
"""

OPTIONS = ("model", "policy", "domains", "output", "held_out", "validation")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "meta-train",
        help="meta-train a reward model over many domains (OODPL)",
        description="Meta-trains a reward model: it is changed so that a policy fine-tuned on a "
        "domain's data, weighted by its rewards, prefers what people of the domain prefer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with the options and settings below")
    parser.add_argument("--model", metavar="DIR", help="reward model or policy to start from")
    parser.add_argument("--policy", metavar="DIR", help="reference policy (default: --model)")
    parser.add_argument("--domains", metavar="DIR", help="folder with a folder a domain")
    parser.add_argument("--output", metavar="DIR", help="folder of the result")
    parser.add_argument("--held-out", metavar="NAME,NAME", help="default: those of splits.json")
    parser.add_argument("--validation", metavar="NAME,NAME", help="watched, not trained on")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting")
    parser.set_defaults(run=run, again="to continue from the last checkpoint, if there is one")


SETTING = re.compile(r"[A-Za-z_][\w.-]*=")


def settings_last(words: list[str]) -> list[str]:
    """Move `key=value` words last, since argparse needs consecutive positional arguments."""
    options: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if SETTING.match(word):
            settings.append(word)
            continue
        options.append(word)
        takes_value = word.startswith("--") and "=" not in word and word != "--help"
        if takes_value and rest and not SETTING.match(rest[0]):
            options.append(rest.pop(0))
    return [*options, *settings]


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.progress import only_on_terminals

    options, settings = from_file(args.config, OPTIONS)
    add_words(args, OPTIONS, options, settings, example="beta=0.5")
    for key in ("model", "domains", "output"):
        if options.get(key) is None:
            raise UserError(f"--{key} is missing; give it here or as {key} in --config")
    output = result_folder(options, args.config)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from shiftrm.oodpl.training_command import meta_train

    only_on_terminals()
    summary = meta_train(
        options["model"],
        policy=options.get("policy") or options["model"],
        domains=options["domains"],
        output=Path(output),
        held_out=names(options.get("held_out")),
        validation=names(options.get("validation")),
        settings=settings,
        command=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    if summary is not None:
        print(summary)


def names(given: Any) -> list[str] | None:
    """Return names of domains, from `a,b` or a list in a file."""
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else list(given)
    return [str(word).strip() for word in words if str(word).strip()]
