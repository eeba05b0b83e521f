"""Typed configuration: one dataclass field per setting; an unknown key is an error."""

import contextlib
import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from shiftrm.errors import UserError, shortened, suggest

T = TypeVar("T")

HOME = re.compile(r"\A((?:[\w.-]+=)*)(~[\w.-]*)(?=/)")
"""`~/...` and `NAME=~/...`; a shell expands only the first."""

DEEPEST, MOST, LONGEST = 50, 1_000_000, 18
"""Levels, values and digits of numbers in YAML; 18 digits fit 64 bits."""


def from_mapping(cls: type[T], mapping: dict[str, Any], *, where: str = "") -> T:
    """Build a (nested) dataclass from plain data.

    Raises:
        UserError: an unknown key (the message suggests the nearest), or a value of another type.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        path = f"{where}{key}"
        if key not in known:
            raise UserError(f"unknown setting {path!r}{suggest(key, list(known))}")
        values[key] = convert(hints[key], value, path)
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """Return the configuration as plain data with every field; `from_mapping` reads it back."""
    return _plain(dataclasses.asdict(config))


def apply_overrides(
    mapping: dict[str, Any], overrides: list[str], *, create: bool = False
) -> dict[str, Any]:
    """Apply `a.b=value` words (values are YAML) to plain data, in order. Return a new mapping.

    Args:
        create: make missing sections; `from_mapping` rejects unknown ones later.
    """
    result = _plain(mapping)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not a setting; write key=value, such as rounds=2")
        value = parse_yaml(text, repr(shortened(word)), word=True)
        node = result
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            if create and node.get(parent) is None:
                node[parent] = {}
            if not isinstance(node.get(parent), dict):
                known = [k for k, v in node.items() if isinstance(v, dict)]
                path = ".".join(parents[: depth + 1])
                raise UserError(f"unknown setting {path!r}{suggest(parent, known)}")
            node = node[parent]
        node[last] = value
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; `~/` in its strings stands for the home folder."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings as `key: value`")
    return at_home(content)


def at_home(value: Any) -> Any:
    """Expand `~/` at the beginning of strings (or after `name=`) in plain data."""
    if isinstance(value, str):
        return HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return value


MERGE = "tag:yaml.org,2002:merge"


class _GivenTwice(Exception):
    def __init__(self, key: str, first: int, second: int) -> None:
        self.key, self.first, self.second = key, first, second


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML's own loader silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _GivenTwice(shortened(key.value), lines[name], line)
            lines[name] = line
        return node


def parse_yaml(text: str, where: str, *, word: bool = False) -> Any:
    """Parse YAML text into plain data.

    Args:
        word: the text is one value of a command line, so the message omits lines and columns.

    Raises:
        UserError: not valid YAML, a key that is given twice in one mapping, a value that cannot be
            (the 40th of a month), or data beyond measure: nested more than `DEEPEST`, of more than
            `MOST` values (which a few aliases can stand for), or with numbers of more than
            `LONGEST` digits.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except _GivenTwice as error:
        lines = "" if word else f", in lines {error.first} and {error.second}"
        raise UserError(f"{where}: {error.key!r} is given twice{lines}; keep one") from None
    except (yaml.YAMLError, ValueError) as error:
        said = "the value is not valid YAML" if word else f"not valid YAML: {error}"
        raise UserError(f"{where}: {said}") from None
    except RecursionError:
        raise UserError(f"{where}: the YAML is nested too deep; write it flatter") from None
    waiting, seen = [(value, 0)], 0
    while waiting:
        found, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST:
            raise UserError(f"{where}: the YAML is nested too deep or too large; write it flatter")
        if isinstance(found, int) and abs(found) >= 10**LONGEST:
            raise UserError(f"{where}: a number of more than {LONGEST} digits; give a smaller one")
        if isinstance(found, dict):
            waiting += [(item, depth + 1) for item in (*found, *found.values())]
        elif isinstance(found, list | tuple | set):
            waiting += [(item, depth + 1) for item in found]
    return value


def check_seed(value: int, name: str) -> None:
    """Reject a seed that one of the libraries would not accept.

    Raises:
        UserError: below 0 or not below 2^32.
    """
    if not 0 <= value < 2**32:
        raise UserError(f"{name} is {shortened(str(value))}; it must be at least 0 and below 2^32")


def differences(old: Any, new: Any, *, where: str = "") -> list[str]:
    """Return the settings that differ, as `a.b: 1 -> 2`, in the order of the new configuration."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*new, *(k for k in old if k not in new)]:
            found += differences(old.get(key), new.get(key), where=f"{where}.{key}".lstrip("."))
        return found
    return [] if old == new else [f"{where}: {old} -> {new}"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""Types as error messages name them."""


def convert(hint: Any, value: Any, path: str, *, text: bool = False) -> Any:
    """Return a value in the type of its field.

    Args:
        hint: a dataclass, `int`, `float`, `str`, `bool`, `Any`, or a tuple, list, mapping or union
            of these.
        path: what error messages call the value.
        text: the value may be a word of the command line, so text may hold a number.

    Raises:
        UserError: the value is of another type.
    """
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), _mapping(value, path), where=f"{path}.")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = typing.get_args(hint)
        words = [w for k in kinds if typing.get_origin(k) is Literal for w in typing.get_args(k)]
        if value in words or (value is None and type(None) in kinds):
            return value
        try:
            kind = next(k for k in kinds if k is not type(None))
            return convert(kind, value, path, text=text)
        except UserError as error:
            raise UserError(" or ".join([str(error), *words])) from None
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} is {value!r}; expected a list, as {path}=[a, b]")
        return origin(convert(typing.get_args(hint)[0], v, path) for v in value)
    if origin is dict:
        below = typing.get_args(hint)[1]
        items = _mapping(value, path).items()
        return {str(k): convert(below, v, f"{path}.{k}") for k, v in items}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (hint is float or (hint is int and text)):
        with contextlib.suppress(ValueError):  # YAML reads 5e-4 as text
            value = hint(value)
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    ):
        expected = EXPECTED.get(hint, hint.__name__)
        raise UserError(f"{path} is {shortened(repr(value))}; expected {expected}")
    if hint is int and path.rpartition(".")[2] == "seed":
        check_seed(value, path)
    return value


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} is {value!r}; expected settings below it, as {path}.x=1")
    return value
