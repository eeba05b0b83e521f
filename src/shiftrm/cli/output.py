"""What commands print and write: tables, lines of text, numbers as JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftrm.files import atomic_write_text
from shiftrm.records import library_versions, source_commit

if TYPE_CHECKING:
    from shiftrm.report.tables import Table


def console() -> Any:
    """Return a console that prints text unchanged, 120 columns wide without a terminal."""
    from rich.console import Console

    found = Console(highlight=False, emoji=False, markup=False)
    if found.is_terminal:
        return found
    return Console(highlight=False, emoji=False, markup=False, width=120)


def print_tables(tables: "Iterable[Table]", lines: Iterable[str] = ()) -> Any:
    """Print tables and then lines. Return the console."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    for table in tables:
        shown = Table(title=table.title, title_justify="left", caption=table.note or None)
        shown.caption_justify = "left"
        for i, column in enumerate(table.columns):
            shown.add_column(Text(column), justify="left" if i < table.text_columns else "right")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        out.print(shown)
    for line in lines:
        out.print(Text(line))
    return out


def write_numbers(path: Path, content: dict[str, Any], **form: Any) -> None:
    """Write `content` as JSON, with the commit and the library versions.

    Args:
        form: arguments of `json.dumps`.
    """
    content = {**content, "commit": source_commit(), "versions": library_versions()}
    text = json.dumps(content, indent=2, **({"ensure_ascii": False} | form))
    atomic_write_text(path, text + "\n")
