"""The tables of docs/real-model.md, from the rows of results alone; every seed is a line."""

from collections.abc import Sequence
from pathlib import Path

from gold_world.report import replace_block
from shiftrm.core.intervals import Measured
from shiftrm.files import Row
from shiftrm.trainers.model_card import markdown_table

from .plan import arm_of
from .results import CEILING, SHORTEST

LABELS = {CEILING: "Lexical gold (ceiling)", SHORTEST: "Shortest response"}

COLUMNS = {
    "accuracy": "accuracy",
    "rank": "rank correlation",
    "best_gold": "gold of best of 16",
    "best_gold_minus_fixed": "… minus fixed",
    "best_gold_minus_retrained": "… minus retrained",
    "accuracy_base": "accuracy, first policy",
}
SIGHT = "sight_"

PPO_COLUMNS = {
    "ppo_gold": "gold after PPO",
    "ppo_kl": "KL",
    "ppo_gold_minus_fixed": "gold minus fixed",
    "ppo_gold_minus_retrained": "gold minus retrained",
}
PPO_TEXT = "PPO from the first policy against each reward, on answers to the test prompts:"


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Put the tables into the page's block `results`.

    Raises:
        UserError: the page has no such block.
    """
    replace_block(path, "results", tables(rows))


def tables(rows: Sequence[Row]) -> str:
    """Return all tables as Markdown."""
    ppo = any(row["measure"] in PPO_COLUMNS for row in rows)
    return "\n\n".join(
        (
            "On the moved policy's responses to the test prompts:",
            _by_arm(rows, COLUMNS),
            "Sight tests (share of pairs in which the better version has the higher reward):",
            _by_arm(rows, _sight_columns(rows)),
            *((PPO_TEXT, _by_arm(rows, PPO_COLUMNS)) if ppo else ()),
            "How far the policy moved, and the lexical gold:",
            _about(rows),
        )
    )


def _by_arm(rows: Sequence[Row], columns: dict[str, str]) -> str:
    found = {(row["seed"], row["arm"], row["measure"]): row for row in rows}
    lines = []
    for seed, arm in dict.fromkeys((row["seed"], row["arm"]) for row in rows):
        cells = [_cell(found.get((seed, arm, measure))) for measure in columns]
        if any(cell != "-" for cell in cells):
            count = found.get((seed, arm, "labels"))
            lines.append([str(seed), _label(arm, count), *cells])
    return markdown_table(["seed", "reward", *columns.values()], lines)


def _about(rows: Sequence[Row]) -> str:
    arms = ("base", "demonstrations", "moved", "lexical_gold")
    lines = [
        [
            str(row["seed"]),
            row["arm"].replace("_", " "),
            row["measure"].replace("_", " "),
            _cell(row),
        ]
        for row in rows
        if row["arm"] in arms
    ]
    return markdown_table(["seed", "of", "measure", "value"], lines)


def _sight_columns(rows: Sequence[Row]) -> dict[str, str]:
    kinds = dict.fromkeys(r["measure"] for r in rows if r["measure"].startswith(SIGHT))
    return {kind: kind.removeprefix(SIGHT).replace("_", " ") for kind in kinds}


def _label(arm: str, labels: Row | None) -> str:
    """Return the arm's name; `labels` is the row that says how many new labels it has."""
    if arm in LABELS:
        return LABELS[arm]
    count = "" if labels is None else f"{labels['value']:.0f}"
    return arm_of(arm).label.replace("{labels}", count).replace(" a round", "")


def _cell(row: Row | None) -> str:
    """Return a number with its interval; one without has four digits that count."""
    if row is None:
        return "-"
    if row["low"] is None:
        return f"{row['value']:.4g}"
    return str(Measured(row["value"], row["low"], row["high"]))
