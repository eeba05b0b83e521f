"""The before and after of an adaptation, as a paragraph and as Markdown for the model card."""

from shiftrm.measure.diagnosis.findings import Findings
from shiftrm.report.diagnosis_tables import comparison_table, numbers_tables
from shiftrm.report.tables import Table
from shiftrm.trainers.model_card import markdown_table

__all__ = ["card_tables", "verdict_words"]

ON_THE_CARD = (
    "Verdict",
    "Rows",
    "Prompts / responses",
    "Accuracy on labels (coin: 0.5)",
    "Mean |difference|",
    "Variance of differences",
    "Reward and length, within prompts",
)
"""Rows of the table; the page holds all of them."""


def verdict_words(found: Findings) -> str:
    """`Before and after: louder, not sharper.`, and then what shows it, a line each."""
    assert found.change is not None
    change = found.change
    return "\n".join(
        [f"Before and after: {change.word}.", change.sentence, *change.warnings, *change.advice]
    )


def card_tables(found: Findings) -> str:
    """The verdict, what changed, and the main numbers of each file."""
    parts = [verdict_words(found), _markdown(comparison_table(found.comparisons))]
    for table in numbers_tables(found.diagnoses, found.verdicts):
        rows = [row for row in table.rows if row[0] in ON_THE_CARD]
        parts.append(f"On {table.title}:")
        parts.append(markdown_table(table.columns, rows))
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    return f"{markdown_table(table.columns, table.rows)}\n\n{table.note}"
