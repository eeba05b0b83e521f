"""One layer for options: words in any order, files, types, defaults, and errors in one line."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from shiftrm.cli.options import (
    About,
    Parser,
    add_commands,
    inputs,
    option,
    optional,
    read,
)
from shiftrm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A command that takes any setting."""

    kind: str = option("KIND", "which", positional=True)
    model: str = option("DIR", "a model", reads=True)
    size: int | None = optional("N", "a size", least=2)
    share: float = option("X", default=0.5, least=0)
    eval_pairs: dict[str, str] = option("[NAME=]DATA", default={}, reads=True)
    held_out: list[str] | None = optional("NAME,NAME", comma=True)
    config: str | None = optional("FILE")
    settings: dict[str, Any] = option("key=value", default={})


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A command with words of its own."""

    source: str = option("SOURCE", positional=True, reads=True)
    files: list[str] = option("FILE", nargs="+", default=[], reads=True)
    scope: str = option(choices=("both", "within"), default="both")
    seed: int = option("N", default=0)
    yes: bool = option(help="100 % sure", default=False)
    settings: list[str] = option("name=value", default=[])


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A command with flags alone."""

    batch_size: int = option("N", default=64, least=1)


ABOUT = About("short", "long", "examples:")
COMMANDS: Any = {
    name: SimpleNamespace(ABOUT=ABOUT, Options=options)
    for name, options in {"trained": Trained, "plain": Plain, "closed": Closed}.items()
}


def parse(line):
    parser = Parser(prog="test")
    add_commands(parser, COMMANDS)
    words = line if isinstance(line, list) else line.split()
    args, others = parser.parse_known_args(words)
    return read(args.module.Options, args, others)


NEEDED = "trained ppo --model m "


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("--learning-rate 1e-5", {"learning_rate": "1e-5"}),
        ("--learning_rate=1e-5 x=1", {"learning_rate": "1e-5", "x": "1"}),
        ("--bf16 x=1 --no-tf32 --size 2", {"bf16": "true", "x": "1", "no_tf32": "true"}),
        ("x=1 --size 2 y=2", {"x": "1", "y": "2"}),
        ("--weight-decay -1", {"weight_decay": "-1"}),
        ("--lora-target-modules q v", {"lora_target_modules": '["q", "v"]'}),
        ("--x= y==", {"x": "", "y": "="}),
        ("x=1 --x 2 x=3", {"x": "3"}),
    ],
)
def test_flags_and_words_are_settings_in_any_order(line, settings):
    found = parse(NEEDED + line)
    assert found.settings == settings
    assert (found.kind, found.model) == ("ppo", "m")
    assert parse(f"trained {line.replace('y=2', '')} y=2 ppo --model=m").kind == "ppo"


def test_own_options_in_both_spellings_and_between_settings(tmp_path):
    found = parse(NEEDED + "a=1 --eval_pairs chat=c --eval-pairs=b=c=d --size=3 --held-out x,,y")
    assert found.eval_pairs == {"chat": "c", "b": "c=d"}
    assert (found.size, found.share, found.held_out) == (3, 0.5, ["x", "y"])
    assert inputs(found) == ["m", "c", "c=d"]


def test_the_file_and_over_it_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    content = {
        "kind": "dpo",
        "model": "a",
        "eval-pairs": {"chat": "chat.csv"},
        "share": "1e-1",
        "size": None,
        "held_out": ["b"],
        "seed": 7,
        "bf16": False,
    }
    path.write_text(yaml.safe_dump(content))
    found = parse(f"trained --config {path} --model m seed=8")
    assert (found.kind, found.model, found.share, found.size) == ("dpo", "m", 0.1, None)
    assert found.eval_pairs == {"chat": "chat.csv"}
    assert found.settings == {"seed": "8", "bf16": False}


def test_words_of_a_commands_own_keep_their_order():
    found = parse("plain b=1 source --files x y --yes a.b=2 b=3 other")
    assert (found.source, found.files, found.yes) == ("source", ["x", "y"], True)
    assert found.settings == ["b=1", "a.b=2", "b=3", "other"], "the command judges the last one"
    assert parse("plain --sco within s").scope == "within", "abbreviated"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trained ppo", "--model is missing; give it here or as model in --config"),
        ("trained ppo modle=m", "--model is missing; .*; 'modle' is not an option"),
        ("trained --model m", "--kind is missing"),
        (NEEDED + "steps", "'steps' is not a setting; write key=value"),
        (NEEDED + "model=x", "unknown setting 'model'; it is the option --model"),
        (NEEDED + "-x", "unknown option '-x'; see `test trained --help`"),
        (NEEDED + "--size 1", "--size is 1; it must be at least 2"),
        (NEEDED + "--size 2.0", "--size is '2.0'; expected a whole number"),
        (NEEDED + "--share nan", "--share is nan; it must be at least 0"),
        (NEEDED + f"--size {2**31}", r"--size is 2147483648; it must be below 2\^31"),
        (NEEDED + f"--size {'9' * 400}", r"--size is 9{77}\.\.\.; it must be below"),
        (NEEDED + "--eval-pairs a --eval-pairs b", "several --eval-pairs need a name each"),
        (NEEDED + "--eval-pairs a/b=x", "'a/b' is not a name"),
        ("plain", "SOURCE is missing; see `test plain --help`"),
        ("plain s --scope bth", "--scope is 'bth'; did you mean 'both'?"),
        ("plain s --seed -1", "--seed is -1; it must be at least 0 and below"),
        ("plain s --seeed=1", "unknown option '--seeed=1'; did you mean '--seed'?"),
        ("closed x=1", "unexpected word 'x=1'; see `test closed --help`"),
        ("closed --batch-size 0", "--batch-size is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_line(line, message):
    with pytest.raises(UserError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind: 3", "--kind is 3; expected text"),
        ("size: true", "--size is True; expected a whole number"),
        ("size: 2.0", "--size is 2.0; expected a whole number"),
        ("eval_pairs: {a: 3}", "eval_pairs a: 3; expected a file or a hub name"),
        ("eval_pairs: 3", "eval_pairs: 3; expected a file or a hub name"),
        ("held_out: 3", "--held-out is 3; expected a list"),
        ("config: d.yaml", "c.yaml: a configuration cannot name another one"),
        ("- a", "c.yaml: expected settings as `key: value`"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        parse(
            f"trained --model m --config {tmp_path / 'c.yaml'}" + " ppo" * ("kind" not in content)
        )


def test_a_missing_value_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("closed --batch-size")
    assert stop.value.code == 2
    expected = "argument --batch-size: expected one argument; see `test closed --help`"
    assert capsys.readouterr().err == f"shiftrm: error: {expected}\n"


def test_help_says_what_is_needed_and_the_defaults():
    parser = Parser(prog="test")
    add_commands(parser, COMMANDS)
    words = " ".join(parser.parse_known_args(["trained"])[0].parser.format_help().split())
    assert words.startswith("usage: test trained KIND --model DIR [options] [key=value ...]")
    assert "--model DIR a model (needed)" in words
    assert "--share X default: 0.5" in words
    assert "--eval_pairs" not in words
    words = " ".join(parser.parse_known_args(["plain"])[0].parser.format_help().split())
    assert "--scope {both,within} default: both --seed N default: 0 --yes 100 % sure" in words
