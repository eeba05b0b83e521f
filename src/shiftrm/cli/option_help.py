"""Help of configuration classes, read from their source, since importing them is slow."""

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Option", "options_in", "source_of", "told"]


class Option(NamedTuple):
    """A field of a dataclass: its default as source text ("" for a factory), and its help."""

    name: str
    default: str
    help: str


def source_of(package: str, file: str) -> Path:
    """Return the path of a file in a package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(package)
    return Path(found.origin).parent / file


def options_in(path: Path, name: str) -> list[Option]:
    """Return the fields that a class in a source file declares itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = dict(_constants(tree))
    [found] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return [
        Option(line.target.id, *_told(line.value, texts))
        for line in found.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for line in tree.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    yield target.id, str(line.value.value)


def _told(value: ast.expr | None, texts: dict[str, str]) -> tuple[str, str]:
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
    said = given.get("help")
    if isinstance(said, ast.Name):
        return default, texts.get(said.id, "")
    return default, str(said.value) if isinstance(said, ast.Constant) else ""


def told(options: list[Option]) -> str:
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
