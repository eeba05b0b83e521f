"""The summary printed at the end of a recipe's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shiftrm.metrics import metric as declared
from shiftrm.records import Record
from shiftrm.report.arms import SFT
from shiftrm.report.measurements import Measurements
from shiftrm.report.recipe_arms import Arms, arms_of
from shiftrm.report.recipe_tables import DATA_SETS
from shiftrm.report.recipe_words import blindness, contest, headline, kl_sentence
from shiftrm.report.tables import fixed_point, text_table

__all__ = ["summary"]


def summary(records: Sequence[Record], config: Mapping[str, Any] | None = None) -> str:
    """Return a table and a few sentences as plain text without control characters."""
    m = Measurements(records)
    arms = arms_of(m, records, config)
    head = headline(m, arms, config)
    lines = [*_terminal_table(m, arms), "", head.title]
    lines += [f"- {sentence}" for sentence in head.sentences]
    lines += [" ".join(blindness(m, arms)), kl_sentence(m, arms)]
    data = _data_sentence(m, records)
    lines += [data] if data else []
    lines += [f"Mind: {text}" for text in head.warnings]
    return "\n".join(_plain(line) for line in lines)


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)


def _data_sentence(m: Measurements, records: Sequence[Record]) -> str:
    metrics = {r.metric for r in records if r.stage == "data"}
    parts = []
    for name in DATA_SETS:
        kept = m.estimate("data", SFT, 0, name)
        if kept is None:
            continue
        dropped = [
            m.estimate("data", SFT, 0, x) for x in metrics if x.startswith(f"{name}_dropped_")
        ]
        left = sum(found.mean for found in dropped if found is not None)
        parts.append(f"{kept.mean:,.0f} {name} ({left:,.0f} left out)")
    return f"Data: {', '.join(parts)}." if parts else ""


HALVES = (
    "win/tie/lose: against SFT, over all judged prompts of the round. The sentences below count "
    "the second half of the prompts: the first half chooses each arm's best round."
)

_COLUMNS = {
    "kl": "KL",
    "relative_difference_variance_before": "rel. var. before",
    "relative_difference_variance_after": "after",
    "accuracy_heldout": "held-out",
    "length_mean": "words",
    "self_bleu": "self-BLEU",
    "gold_mean": "gold",
}
"""Short names of metrics for the terminal."""


def _terminal_table(m: Measurements, arms: Arms) -> list[str]:
    keys = [(arm, round_) for arm in arms.kinds for round_ in m.rounds(arm)]
    metrics = [x for x in _COLUMNS if any(m.final("evaluate", *key, x) for key in keys)]
    judged = any(m.final("evaluate", *key, "win_vs_sft") for key in keys)
    rows = [
        [
            "arm",
            "round",
            *(["win/tie/lose"] if judged else []),
            *(_COLUMNS[metric] for metric in metrics),
        ]
    ]
    for arm, round_ in keys:
        found = contest(m, "evaluate", arm, [round_])
        cells = [(found.numbers.replace(" ", "")[:-1] if found else "-")] if judged else []
        for metric in metrics:
            value = m.estimate("evaluate", arm, round_, metric)
            digits = declared(metric).digits
            cells.append("-" if value is None else fixed_point(value.mean, digits))
        rows.append([arms.short(arm)[:24], str(round_), *cells])
    lines = text_table(rows)
    if any(m.rounds(arm, "compare") for arm in arms.trained):
        lines += ["", HALVES]
    return lines
