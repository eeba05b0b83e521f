"""The summary printed at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shiftrm.metrics import metric as declared
from shiftrm.records import Record
from shiftrm.report.blindness import blindness
from shiftrm.report.headline import headline, kl_sentences
from shiftrm.report.opening import opening_sentence
from shiftrm.report.results import SFT, Results
from shiftrm.report.setup_tables import DATA_SETS, dropped_rows
from shiftrm.report.tables import applies, fixed_point, text_table
from shiftrm.report.warnings import flags, warnings
from shiftrm.report.win_tables import contest

HALVES = (
    "win/tie/lose: against SFT, over all judged prompts of the round. The sentences below count "
    "the second half of the prompts: the first half chooses each arm's best round."
)

_COLUMNS = {
    "kl": "KL",
    "gold_mean": "gold",
    "accuracy_policy_before": "acc. before",
    "accuracy_policy_after": "after",
    "relative_difference_variance_before": "rel. var. before",
    "relative_difference_variance_after": "after",
    "accuracy_heldout": "held-out",
    "length_mean": "words",
    "self_bleu": "self-BLEU",
}
"""Short names of metrics for the terminal."""


def summary(records: Iterable[Record], config: Mapping[str, Any] | None = None) -> str:
    """Return a table and a few sentences as plain text without control characters.

    Names of arms are not escaped, so print it with `markup=False`.
    """
    m = Results(records, config)
    head = headline(m)
    # Where gold is true the title has the numbers already.
    sentences = () if m.gold_is_true else (*head.by_judge, *head.by_gold)
    kl = kl_sentences(m)
    lines = _table(m)
    if sentences and any(m.rounds(arm, "compare") for arm in m.trained):
        lines += ["", HALVES]
    lines += ["", *dict.fromkeys([opening_sentence(m, head), head.title])]
    lines += [*(f"- {text}" for text in sentences)]
    lines += [" ".join(blindness(m)), " ".join(kl), *_data_sentence(m)]
    lines += [f"Warning: {text}" for text in (*warnings(m), *flags(m)) if text not in kl]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _data_sentence(m: Results) -> list[str]:
    parts = []
    for name in DATA_SETS:
        kept = m.estimate("data", SFT, 0, name)
        if kept is not None:
            dropped = dropped_rows(m, name).values()
            left = sum(sum(by_seed.values()) / len(by_seed) for by_seed in dropped if by_seed)
            parts.append(f"{kept.mean:,.0f} {name} ({left:,.0f} left out)")
    return [f"Data: {', '.join(parts)}."] if parts else []


def _table(m: Results) -> list[str]:
    metrics = [x for x in _COLUMNS if any(m.final("evaluate", *key, x) for key in m.keys)]
    wins = ["win/tie/lose"] if m.judged else []
    rows = [["arm", "round", *wins, *(_COLUMNS[metric] for metric in metrics)]]
    for arm, round_ in m.keys:
        cells = []
        if m.judged:
            found = contest(m, "evaluate", arm, [round_])
            cells.append(found.shares.replace(" ", "") if found else "-")
        for metric in metrics:
            value = m.mean(arm, round_, metric) if applies(m, arm, metric) else None
            cells.append("-" if value is None else fixed_point(value, declared(metric).digits))
        rows.append([m.short(arm)[:24], str(round_), *cells])
    return text_table(rows)
