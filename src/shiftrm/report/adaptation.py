"""A reward model before and after an adaptation: page, JSON and Markdown for the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftrm.measure.diagnosis.findings import Findings
from shiftrm.methods.adapt import verdict_words
from shiftrm.report.diagnosis import write_numbers, write_page
from shiftrm.report.diagnosis_features import pays_tables
from shiftrm.report.diagnosis_sight import sight_tables
from shiftrm.report.diagnosis_tables import comparison_table, numbers_tables
from shiftrm.trainers.model_card import markdown_table

__all__ = ["NUMBERS", "PAGE", "card_tables", "write_before_after"]

PAGE, NUMBERS = "before_after.html", "before_after.json"
"""Name in the output folder, next to the weights."""

ON_THE_CARD = (
    "Verdict",
    "Rows",
    "Prompts / responses",
    "Accuracy on labels (coin: 0.5)",
    "Mean |difference|",
    "Variance of differences",
    "Reward and length, within prompts",
)
"""Maximum rows of a table in the model card; the page has all rows."""


def write_before_after(found: Findings, folder: Path, more: Mapping[str, Any]) -> str:
    """Write the page, and the numbers with `more` as JSON. Return the model card's tables."""
    write_page(found, folder / PAGE)
    write_numbers(found, folder / NUMBERS, more=more)
    return card_tables(found)


def card_tables(found: Findings) -> str:
    """Return the verdict, the changes and the main numbers of each file as Markdown."""
    change = comparison_table(found.comparisons)
    parts = [
        verdict_words(found),
        f"{markdown_table(change.columns, change.rows)}\n\n{change.note}",
    ]
    for table in numbers_tables(found.diagnoses, found.verdicts):
        rows = [row for row in table.rows if row[0] in ON_THE_CARD]
        parts.append(f"On {table.title}:")
        parts.append(markdown_table(table.columns, rows))
    for table in sight_tables(found.diagnoses):
        parts += [f"{table.title}:", markdown_table(table.columns, table.rows), table.note]
    prices = pays_tables(found, most=6)
    for table in prices:
        parts += [f"{table.title}:", markdown_table(table.columns, table.rows)]
    parts += [table.note for table in prices[-1:]]  # the same for all
    return "\n\n".join(parts)
