"""The rooms of the package: imports run down only."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shiftrm"
ROOMS = (
    "base", "core", "models", "data", "world", "measure", "trainers", "policies", "methods",
    "oodpl", "serve", "monitor", "pipeline", "report", "cli",
)  # fmt: skip
"""From the bottom to the top; "base" is the modules beside the rooms."""

PATHS = sorted(
    p.relative_to(SOURCE).as_posix()
    for p in SOURCE.rglob("*.py")
    if p.parent != SOURCE or not p.name.startswith("_")
)


def room(module: str) -> str:
    """The room of a module such as "shiftrm.models.rendering"."""
    part = module.split(".")[1] if "." in module else "base"
    return part if part in ROOMS else "base"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("shiftrm.")}


@pytest.mark.parametrize("path", PATHS)
def test_imports_run_down(path):
    here = ROOMS.index(room("shiftrm." + path.removesuffix(".py").replace("/", ".")))
    above = {room(name) for name in imported(SOURCE / path)} & set(ROOMS[here + 1 :])
    assert not above


def test_every_folder_is_a_room():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS) - {"base"}


def test_an_accelerator_that_is_not_there_is_not_used():
    """A CUDA build of torch names its accelerator even on a machine without a GPU."""
    texts = {path: (SOURCE / path).read_text(encoding="utf-8") for path in PATHS}
    unchecked = [path for path, text in texts.items() if "current_accelerator()" in text]
    assert not unchecked
