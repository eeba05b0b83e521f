"""The options of all commands: a dataclass per command -> flags, YAML keys, `key=value` and help.

tyro 1.0, jsonargparse 4.53 and pydantic 2.14 were tried. argparse stays below this layer, because:
tyro and jsonargparse build flags from the class itself, and importing TRL's classes takes 8 s (the
limit for `--help` is 1 s), so settings must be collected first and checked later. Neither takes
`key=value` words, and their errors fill 4 to 11 lines and suggest nothing for a mistyped YAML key.
pydantic only validates: three lines and a URL per error, and unknown keys pass by default.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from shiftrm.config import check_seed, convert, read_yaml
from shiftrm.errors import UserError, shortened, suggest

__all__ = [
    "About", "Parser", "add_commands", "build", "command_line", "inputs", "option", "optional",
    "read",
]  # fmt: skip

T = TypeVar("T")

FLAG = re.compile(r"--(\w[\w-]*)(?:=(.*))?", re.DOTALL)

SETTING = re.compile(r"[A-Za-z_][\w.-]*=")


@dataclass(frozen=True)
class About:
    """The texts of a command.

    Attributes:
        help: one line in the list of commands.
        description, epilog: shown above and below the options in the command's own help.
        again: what repeating the command does after an interruption.
    """

    help: str
    description: str
    epilog: str
    again: str = "to start anew; nothing was written"


def option(
    metavar: str = "",
    help: str = "",
    *,
    default: Any = MISSING,
    least: float | None = None,
    choices: tuple[str, ...] = (),
    reads: bool = False,
    **more: Any,
) -> Any:
    """Declare an option; without a default it is required.

    The type of the field says how the option is given: a `bool` is a switch, a `list` may be
    repeated, a `dict[str, str]` holds `[NAME=]DATA`. The field `settings` is special: a dict takes
    all other flags, `key=value` words and keys of the YAML file; a list takes `key=value` words.

    Args:
        least: the minimum.
        choices: the allowed values.
        reads: the command reads this path, so it may not write there.
        more: `positional=True`; `nargs="+"` for several values of one flag; `comma=True` for a
            list in one word; `group`: a title in the help; `shown`: the default in the help.
    """
    metadata = {"metavar": metavar or None, "help": help, "least": least, "choices": choices}
    metadata |= {"reads": reads} | more
    if isinstance(default, list | dict):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def optional(metavar: str, help: str = "", **more: Any) -> Any:
    """Declare an option that is None if not given; see `option`."""
    return option(metavar, help, default=None, **more)


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"shiftrm: error: {UserError(message)}; see `{self.prog} --help`\n")


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, ModuleType],
    *,
    title: str = "commands",
    metavar: str = "COMMAND",
) -> None:
    """Add commands: modules with `ABOUT`, and `Options` and `run` or, as a group, `COMMANDS`."""
    below = parser.add_subparsers(title=title, metavar=metavar, required=True)
    for name, module in commands.items():
        group = hasattr(module, "COMMANDS")
        command = below.add_parser(
            name,
            help=module.ABOUT.help,
            description=textwrap.fill(module.ABOUT.description, width=98),
            epilog=module.ABOUT.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=group or not _open(module.Options),
            add_help=group,
        )
        if group:
            add_commands(command, module.COMMANDS, title="evaluations", metavar="NAME")
        else:
            command.set_defaults(module=module, parser=command)
            command.add_argument("-h", "--help", action="store_true", help="show this help")
            _add_options(command, module.Options)


def _add_options(parser: argparse.ArgumentParser, options: type) -> None:
    groups: dict[str, Any] = {"": parser}
    for each in _in_order(options):
        title = each.metadata.get("group", "")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        given: dict[str, Any] = {"default": None, "help": _help(each)}
        if each.type is not bool:
            given["metavar"] = _metavar(each)
        if _is_positional(each):  # not parsed here: `read` distributes the words
            parser.add_argument(each.name, nargs=argparse.SUPPRESS, **given)
            continue
        if each.type is bool:
            given["action"] = "store_true"
        elif _origin(each) in (list, dict) and not each.metadata.get("comma"):
            given["nargs"] = each.metadata.get("nargs")
            given["action"] = "extend" if given["nargs"] else "append"
        groups[title].add_argument(_flag(each.name), **given)
        if "_" in each.name and _open(options):  # abbreviations are off: both spellings work
            parser.add_argument(f"--{each.name}", **{**given, "help": argparse.SUPPRESS})
    parser.usage = _usage(parser.prog, options)


def _usage(program: str, options: type) -> str:
    """Show positional and required arguments; the list below has all others."""
    words = [program]
    for each in filter(_is_required, _in_order(options)):
        flag = "" if _is_positional(each) else f"{_flag(each.name)} "
        words.append(f"{flag}{_metavar(each)}{' [...]' if each.metadata.get('nargs') else ''}")
    words.append("[options]")
    if _has_settings(options):
        words.append(f"[{_metavar(_in_order(options)[-1])} ...]")
    return " ".join(words)


def _in_order(options: type) -> list[Field[Any]]:
    """Return the fields as the help shows them: positional and required first, settings last."""
    return sorted(
        dataclasses.fields(options),
        key=lambda f: (
            *(f.name == "settings", not _is_positional(f), not _is_required(f), f.name == "output"),
        ),
    )


def _help(option: Field[Any]) -> str:
    """Return the help text with the default."""
    said = option.metadata
    shown = said.get("shown")
    if (
        shown is None
        and isinstance(option.default, str | float | int)
        and option.default is not False
    ):
        shown = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    text = said["help"] + (" (needed)" if _is_required(option) else "")
    parts = [text] if text else []
    return "; ".join([*parts, f"default: {shown}"] if shown else parts).replace("%", "%%")


def read(options: type, args: argparse.Namespace, words: list[str]) -> Any:
    """Return a command's options from its flags, its other words and its YAML file.

    Flags and words win over the file.

    Args:
        args: what argparse has read.
        words: what it does not know, in order.

    Raises:
        UserError: an unknown or missing option, or a bad value.
    """
    fields = {each.name: each for each in dataclasses.fields(options) if each.name != "settings"}
    given = {name: found for name in fields if (found := getattr(args, name)) is not None}
    plain, settings = _split(options, words, args.parser)
    for each in fields.values():
        if plain and _is_positional(each):
            several = _origin(each) is list
            given[each.name], plain = (plain, []) if several else (plain[0], plain[1:])
    extra: dict[str, Any] = {}
    if _open(options):
        if plain:
            raise UserError(f"{plain[0]!r} is not a setting; write key=value, as seed=1")
        own = {key: value for key, _, value in (word.partition("=") for word in settings)}
        for key in own:
            if key in fields:
                raise UserError(f"unknown setting {key!r}; it is the option {_flag(key)}")
        from_file, others = _read_file(given.get("config"), fields)
        given, extra["settings"] = from_file | given, others | own
    elif _has_settings(options):
        extra["settings"] = settings + plain  # the command refuses words without `=`
    elif plain:
        raise UserError(f"unexpected word {plain[0]!r}; see `{args.parser.prog} --help`")
    _require(fields, given, extra.get("settings", ()), args.parser)
    checked = {name: _checked(fields[name], value) for name, value in given.items()}
    return options(**checked, **extra)


def _split(
    options: type, words: list[str], parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """Split words into plain ones and settings; flags that are settings become `key=value`."""
    plain: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag = FLAG.fullmatch(word)
        if flag is not None and _open(options):
            text = flag[2]
            if text is None:
                values = []
                while rest and not rest[0].startswith("--") and not SETTING.match(rest[0]):
                    values.append(rest.pop(0))
                text = values[0] if len(values) == 1 else json.dumps(values) if values else "true"
            settings.append(f"{flag[1].replace('-', '_')}={text}")
        elif word.startswith("-") and word != "-":
            known = [_flag(each.name) for each in dataclasses.fields(options)]
            near = suggest(word.partition("=")[0], known)
            near = near if "did you mean" in near else f"; see `{parser.prog} --help`"
            raise UserError(f"unknown option {shortened(word)!r}{near}")
        elif SETTING.match(word) and _has_settings(options):
            settings.append(word)
        else:
            plain.append(word)
    return plain, settings


def _read_file(
    config: str | None, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options and settings of a YAML file; none without a file."""
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for word, value in {} if config is None else read_yaml(config).items():
        key = str(word).replace("-", "_")
        if key == "config":
            raise UserError(f"{config}: a configuration cannot name another one")
        if key not in fields:
            settings[key] = value
        elif value is not None:
            options[key] = value
    return options, settings


def _require(
    fields: Mapping[str, Any], given: Mapping[str, Any], settings: Any, parser: Any
) -> None:
    """Reject a command line without its required options."""
    missing = [name for name in fields if _is_required(fields[name]) and name not in given]
    if not missing:
        return
    if "config" in fields:
        name = missing[0]
        close = [key for key in settings if suggest(key, [name]).startswith("; did you mean")]
        hint = f"; {close[0]!r} is not an option" if close else ""
        raise UserError(f"{_flag(name)} is missing; give it here or as {name} in --config{hint}")
    names = [f.metadata["metavar"] if _is_positional(f := fields[n]) else _flag(n) for n in missing]
    verb = "is" if len(names) == 1 else "are"
    raise UserError(f"{', '.join(names)} {verb} missing; see `{parser.prog} --help`")


def _checked(option: Field[Any], given: Any) -> Any:
    """Return the value in its type, if it is one that the option takes."""
    said, flag = option.metadata, _flag(option.name)
    if _origin(option) is dict:
        return _named(given, option.name)
    if said.get("comma") and isinstance(given, str):
        given = [word.strip() for word in given.split(",") if word.strip()]
    value = convert(option.type, given, flag, text=True)
    if said["choices"] and value is not None and value not in said["choices"]:
        raise UserError(f"{flag} is {value!r}{suggest(value, list(said['choices']))}")
    if said["least"] is not None and value is not None and not value >= said["least"]:
        raise UserError(f"{flag} is {shortened(str(value))}; it must be at least {said['least']:g}")
    if isinstance(value, int) and option.name == "seed":
        check_seed(value, flag)
    elif isinstance(value, int) and abs(value) >= 2**31:
        raise UserError(f"{flag} is {shortened(str(value))}; it must be below 2^31")
    return value


def _named(given: Any, option: str) -> dict[str, str]:
    """Return sources by name, from `DATA`, `NAME=DATA`, or a list or mapping of a file.

    The name of a single source may be empty.
    """
    if isinstance(given, dict):
        found = [(str(name), source) for name, source in given.items()]
    else:
        words = given if isinstance(given, list) else [given]
        found = [_name_and_source(word) for word in words]
    for name, source in found:
        if not isinstance(source, str):
            raise UserError(
                f"{f'{option} {name}'.strip()}: {source!r}; expected a file or a hub name"
            )
        if not re.fullmatch(r"[\w-]*", name):
            raise UserError(f"{option}: {name!r} is not a name; use letters, digits, _ and -")
    names = [name for name, _ in found]
    if len(found) > 1 and ("" in names or len(set(names)) < len(names)):
        flag = _flag(option)
        raise UserError(f"several {flag} need a name each, as {flag} chat=chat.jsonl")
    return dict(found)


def _name_and_source(word: Any) -> tuple[str, Any]:
    if not isinstance(word, str):
        return "", word
    name, equals, source = word.partition("=")
    return (name, source) if equals and not os.path.exists(word) else ("", word)


def inputs(options: Any) -> list[str]:
    """Return every path or name that the command reads."""
    found: list[str] = []
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if each.metadata["reads"] and value is not None:
            several = value.values() if isinstance(value, dict) else value
            found += [value] if isinstance(value, str) else several
    return found


def build(cls: type[T], options: Any, **more: Any) -> T:
    """Return a dataclass whose fields come from the options of the same names and from `more`.

    None stands for "not given": the class's own default holds.
    """
    names = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {name: getattr(options, name, None) for name in names} | more
    return cls(**{name: value for name, value in values.items() if value is not None})


def command_line() -> str:
    """Return the command as the user gave it, for the records of a run."""
    return shlex.join(["shiftrm", *sys.argv[1:]])


def _metavar(option: Field[Any]) -> str:
    return option.metadata["metavar"] or f"{{{','.join(option.metadata['choices'])}}}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _origin(option: Field[Any]) -> Any:
    """The type without `| None` and its arguments."""
    kinds = [k for k in typing.get_args(option.type) if k is not type(None)]
    union = type(None) in typing.get_args(option.type)
    kind = kinds[0] if union else option.type
    return typing.get_origin(kind) or kind


def _is_positional(option: Field[Any]) -> bool:
    return bool(option.metadata.get("positional")) or option.name == "settings"


def _is_required(option: Field[Any]) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _has_settings(options: type) -> bool:
    return any(each.name == "settings" for each in dataclasses.fields(options))


def _open(options: type) -> bool:
    """Whether any flag may be a setting."""
    return any(e.name == "settings" and _origin(e) is dict for e in dataclasses.fields(options))
