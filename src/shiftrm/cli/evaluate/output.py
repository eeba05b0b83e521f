"""Printing tables and writing numbers of evaluations."""

from pathlib import Path
from typing import Any


def console() -> Any:
    """Return a console that prints text unchanged, 120 columns wide without a terminal."""
    from rich.console import Console

    found = Console(highlight=False, emoji=False, markup=False)
    if found.is_terminal:
        return found
    return Console(highlight=False, emoji=False, markup=False, width=120)


def write_numbers(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, with the commit and the library versions."""
    import json

    from shiftrm.files import atomic_write_text
    from shiftrm.records import library_versions, source_commit

    content = {**content, "commit": source_commit(), "versions": library_versions()}
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
