"""Options and settings of training commands, from flags, `key=value` words and a file."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.progress import quieten_libraries

__all__ = ["quieten_libraries"]

FLAG = re.compile(r"--(\w[\w-]*)(?:=(.*))?", re.DOTALL)

SETTING = re.compile(r"[A-Za-z_]\w*=")

POLICY_HELP = """Settings: every option of {configs}, and of
trl.ModelConfig (dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...), as key=value, as
--key value (--learning-rate 5e-6, --bf16, --no-bf16) or in the file. With use_peft=true the output
is the merged model, and the adapter is in its folder adapter. training_log.jsonl in the output has
a line for every logged step; report_to=tensorboard or wandb logs there, too.

FILE.yaml holds the same options and settings in one flat mapping; the command line wins.

Checkpoints are written into .NAME.work beside the output. A command that was interrupted, killed or
stopped by a full disk or for want of memory continues from the last one when it is given again.
"""
"""Help text of the commands that train policies."""

HELP = """Settings: every option of trl.RewardConfig (and so of TrainingArguments), with groups of
MetaRMConfig (preset, meta_step, meta_learning_rate, meta_batch_size, deploy), and of
trl.ModelConfig (dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...), as key=value, as
--key value (--learning-rate 5e-6, --bf16, --no-bf16) or in the file. Code that comes with a model
is run with --trust-remote-code only.
"""
"""Help text of all these commands."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that takes settings."""
    parser.add_argument("--config", metavar="FILE", help="YAML with the options and settings below")
    parser.add_argument("--output", metavar="DIR", help="folder of the result (needed)")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting, as learning_rate=5e-6"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that train reward models."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint or hub name (needed)")
    parser.add_argument("--pairs", metavar="DATA", help="preference pairs (needed)")
    parser.add_argument(
        "--eval-pairs",
        metavar="[NAME=]DATA",
        action="append",
        help="held-out pairs; may be repeated, with a name for each",
    )
    add_common(parser)


def fold_flags(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Replace flags that are not options of the command by `key=value` words.

    The settings are known only once torch is loaded, so the flags are not checked here.

    Args:
        arguments: the arguments after the command.
        known: names of the command's own options, as in a file.
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
        elif name in (*known, "help"):
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
    return [*options, *words]  # argparse needs consecutive positional arguments


def merged(
    args: argparse.Namespace,
    known: Sequence[str],
    *,
    numbers: Sequence[str] = (),
    needed: Sequence[str] = ("model", "pairs", "output"),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options and settings; the command line overrides the file.

    Args:
        known: names of the command's options.
        numbers: options that may be numbers in the file; all others are text.
        needed: required options.

    Raises:
        UserError: the file or a required option is missing, or a word is not a setting.
    """
    options, settings = from_file(args.config, known)
    if args.config is not None:
        if "config" in options:
            raise UserError(f"{args.config}: a configuration cannot name another one")
        several = (*numbers, *(key for key in known if key.startswith("eval_")))
        for key in known:
            if key not in several and not isinstance(options.get(key, ""), str):
                raise UserError(f"{args.config}: {key} is {options[key]!r}; expected text")
    add_words(args, known, options, settings, example="learning_rate=5e-6")
    for key in needed:
        if options.get(key) is None:
            flag = f"--{key.replace('_', '-')}"
            close = [k for k in settings if suggest(k, [key]).startswith("; did you mean")]
            hint = f"; {close[0]!r} is no option" if close else ""
            raise UserError(f"{flag} is missing; give it here or as {key} in --config{hint}")
    return options, settings


def from_file(config: str | None, known: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options (`known`) and settings of a YAML file; none without a file."""
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if config is not None:
        from shiftrm.config import read_yaml

        for word, value in read_yaml(config).items():
            key = str(word).replace("-", "_")
            (options if key in known else settings)[key] = value
    return options, settings


def add_words(
    args: argparse.Namespace,
    known: Sequence[str],
    options: dict[str, Any],
    settings: dict[str, Any],
    *,
    example: str,
) -> None:
    """Override options and settings in place by the command line's options and words."""
    options |= {key: value for key in known if (value := getattr(args, key)) is not None}
    for word in args.settings:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not a setting; write key=value, as {example}")
        if key in known:
            raise UserError(f"unknown setting {key!r}; it is the option --{key.replace('_', '-')}")
        settings[key] = text


def output(options: Mapping[str, Any], config: str | None) -> Path:
    """Return the output folder, which must not overlap with any path in the options.

    Raises:
        UserError: as `checks.output_folder`.
    """
    from shiftrm.cli.checks import WORK, output_folder

    inputs: list[Any] = [config]
    for value in (value for key, value in options.items() if key not in ("output", "method")):
        several = list(value.values()) if isinstance(value, dict) else value
        for source in several if isinstance(several, list) else [several]:
            inputs += [source, _name_and_source(source)[1]]
    return output_folder(str(options["output"]), apart_from=inputs, beside=[WORK])


def named(given: Any, option: str) -> dict[str, str]:
    """Return held-out sources by name, from `DATA`, `NAME=DATA` or the file."""
    if isinstance(given, dict):
        named = [(str(name), source) for name, source in given.items()]
    else:
        words = [given] if isinstance(given, str) else given or []
        named = [_name_and_source(word) for word in words]
    for name, source in named:
        if not isinstance(source, str):
            raise UserError(f"{option} {name}: {source!r}; expected a file or a hub name")
        if not re.fullmatch(r"[\w-]*", name):
            raise UserError(f"{option}: {name!r} is no name; use letters, digits, _ and -")
    names = [name for name, _ in named]
    if len(named) > 1 and ("" in names or len(set(names)) < len(names)):
        flag = f"--{option.replace('_', '-')}"
        raise UserError(f"several {flag} need a name each, as {flag} chat=chat.jsonl")
    return dict(named)


def _name_and_source(word: Any) -> tuple[str, Any]:
    if not isinstance(word, str):
        return "", word
    name, equals, source = word.partition("=")
    return (name, source) if equals and not os.path.exists(word) else ("", word)
