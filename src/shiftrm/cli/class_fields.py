"""Fields of configuration classes, read from their source: importing the classes takes seconds."""

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Option", "listed", "own_fields"]


class Option(NamedTuple):
    """A field of a dataclass: its default as source text ("" for a factory), and its help."""

    name: str
    default: str
    help: str


def own_fields(place: str) -> list[Option]:
    """Return the fields that the class `package.module:Class` declares itself."""
    module, _, name = place.partition(":")
    package, *parts = module.split(".")
    found = importlib.util.find_spec(package)  # of the package alone: imports nothing
    if found is None or found.origin is None:
        raise ModuleNotFoundError(module)
    path = Path(found.origin).parent.joinpath(*parts).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = dict(_constants(tree))
    [cls] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return [
        Option(line.target.id, *_default_and_help(line.value, texts))
        for line in cls.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for line in tree.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    yield target.id, str(line.value.value)


def _default_and_help(value: ast.expr | None, texts: dict[str, str]) -> tuple[str, str]:
    """Return default and help of `field(default=..., metadata={"help": ...})` or `_option(...)`."""
    if value is None:
        return "", ""
    if not isinstance(value, ast.Call):
        return ast.unparse(value), ""
    given = {word.arg: word.value for word in value.keywords}
    for name, argument in zip(("default", "help"), value.args, strict=False):
        given[name] = argument
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        keys = [k.value if isinstance(k, ast.Constant) else None for k in metadata.keys]
        if "help" in keys:
            given["help"] = metadata.values[keys.index("help")]
    default = ast.unparse(given["default"]) if "default" in given else ""
    text = given.get("help")
    if isinstance(text, ast.Name):
        return default, texts.get(text.id, "")
    return default, str(text.value) if isinstance(text, ast.Constant) else ""


def listed(options: list[Option]) -> str:
    """Format one paragraph per option: `name=default`, then its help."""
    return "\n".join(
        textwrap.fill(
            f"{option.name}={option.default}  {option.help}".rstrip(),
            width=98,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
        for option in options
    )
