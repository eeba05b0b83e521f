"""The page, the terminal summary and the tables of a run over the gold world's domains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.files import atomic_write_text
from shiftrm.records import Record
from shiftrm.report import setup_tables
from shiftrm.report.domain_figures import all_figures
from shiftrm.report.domain_records import (
    LABELS,
    betas_of,
    mean_over_domains,
    methods_of,
    targets_of,
    values,
)
from shiftrm.report.measurements import SeedEstimate, estimate
from shiftrm.report.page import page_template
from shiftrm.report.pictures import image_of
from shiftrm.report.results import Results
from shiftrm.report.tables import NOT_MEASURED, Table, text_table

__all__ = ["all_tables", "domain_summary", "is_domain_run", "write_domain_report"]

AGAINST = ("finetuned", "pooled_weighted", "pooled_ppo")
"""The methods that differences are taken to, seed by seed."""


def is_domain_run(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration is that of a run over domains."""
    return bool((config or {}).get("domains"))


def write_domain_report(
    records: Sequence[Record],
    path: str | Path,
    *,
    config: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of one run, or of several seeds merged, atomically."""
    figures = all_figures(records, float(config["domains"]["beta"]))
    html = page_template("domains.html.j2").render(
        name=str(config.get("name", "domains")),
        headline=_headline(records),
        notes=list(notes),
        tables=[table for table in all_tables(records).values() if table.rows],
        pictures=[image_of(drawn, words, "") for words, drawn in figures.values()],
        config=setup_tables.config_table(config),
        versions=setup_tables.versions_table(Results(records)),
        not_measured=NOT_MEASURED,
    )
    return atomic_write_text(path, html)


def domain_summary(records: Sequence[Record]) -> str:
    """Return a table and a sentence as plain text."""
    table = all_tables(records)["measurements"]
    return "\n".join([*text_table([table.columns, *table.rows]), "", _headline(records)])


def _headline(records: Sequence[Record]) -> str:
    shown = ("reference", "finetuned", "pooled_weighted", "oodpl_weighted")
    found = [
        (method, estimate(mean_over_domains(records, method, "gold_mean"))) for method in shown
    ]
    said = [f"{LABELS[method]} {gold.mean:.2f}" for method, gold in found if gold is not None]
    if not said:
        return "Gold in the domains without labels was not measured."
    return f"Gold in the domains without labels: {'; '.join(said)}."


def all_tables(records: Sequence[Record]) -> dict[str, Table]:
    """Return the tables by name."""
    return {
        "gold": _gold(records),
        "measurements": _measurements(records),
        "differences": _differences(records),
        "beta": _beta(records),
        "meta": _meta(records),
    }


def _gold(records: Sequence[Record]) -> Table:
    targets = targets_of(records)
    rows = []
    for method in methods_of(records):
        by_target = [values(records, f"evaluate/{t}", method, "gold_mean") for t in targets]
        cells = [*by_target, mean_over_domains(records, method, "gold_mean")]
        rows.append([LABELS[method], *map(_cell, cells)])
    return _table("Gold by domain", ["method", *targets, "mean"], rows)


def _measurements(records: Sequence[Record]) -> Table:
    columns = {
        "gold_mean": "gold",
        "kl": "KL",
        "accuracy_mean": "A_PL (token mean)",
        "accuracy_sum": "A_PL (sum, the paper's)",
        "length_mean": "tokens",
        "truncated_share": "cut off",
    }
    rows = [
        [LABELS[method], *(_cell(mean_over_domains(records, method, name)) for name in columns)]
        for method in methods_of(records)
    ]
    return _table("Means over the domains", ["method", *columns.values()], rows)


def _differences(records: Sequence[Record]) -> Table:
    rows = []
    methods = methods_of(records)
    for method in methods:
        if not method.startswith("oodpl"):
            continue
        ours = mean_over_domains(records, method, "gold_mean")
        for other in AGAINST:
            theirs = mean_over_domains(records, other, "gold_mean")
            found = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
            if found:
                single = ", ".join(f"{found[seed]:+.2f}" for seed in sorted(found))
                rows.append([LABELS[method], LABELS[other], _signed(estimate(found)), single])
    header = ["method", "against", "difference in gold", "seeds"]
    return _table("Differences in gold, seed by seed", header, rows, text_columns=2)


def _beta(records: Sequence[Record]) -> Table:
    columns = {"gold_mean": "gold", "kl": "KL", "accuracy_mean": "A_PL", "proxy": "proxy"}
    rows = [
        [
            f"{beta:g}",
            *(_cell(mean_over_domains(records, f"oodpl_beta_{beta:g}", name)) for name in columns),
            _cell(_last(records, f"beta_{beta:g}", "hypergradient_norm")),
            _cell(_last(records, f"beta_{beta:g}", "effective_sample_share")),
        ]
        for beta in betas_of(records)
    ]
    header = ["beta", *columns.values(), "last gradient norm", "effective samples"]
    return _table("The effect of beta", header, rows)


def _meta(records: Sequence[Record]) -> Table:
    rows = []
    for beta in betas_of(records):
        method = f"beta_{beta:g}"
        rows.append(
            [
                f"{beta:g}",
                _cell(_first(records, method, "loss")),
                _cell(_last(records, method, "loss")),
                _cell(_first(records, method, "eval_reference_accuracy")),
                _cell(_last(records, method, "eval_accuracy")),
            ]
        )
    header = ["beta", "first loss", "last loss", "A_PL of the reference", "A_PL, adapted"]
    return _table("Meta-training", header, rows)


def _first(records: Sequence[Record], method: str, metric: str) -> dict[int, float]:
    return _at(records, method, metric, first=True)


def _last(records: Sequence[Record], method: str, metric: str) -> dict[int, float]:
    return _at(records, method, metric, first=False)


def _at(records: Sequence[Record], method: str, metric: str, *, first: bool) -> dict[int, float]:
    steps = [
        r.step
        for r in records
        if (r.stage, r.method, r.metric) == ("meta", method, metric) and r.step is not None
    ]
    if not steps:
        return {}
    return values(records, "meta", method, metric, min(steps) if first else max(steps))


def _cell(found: Mapping[int, float]) -> str:
    known = estimate(found)
    if known is None:
        return "-"
    if known.half_width is None:
        return f"{known.mean:.3f}"
    return f"{known.mean:.3f} ± {known.half_width:.3f}"


def _signed(known: SeedEstimate | None) -> str:
    if known is None:
        return "-"
    if known.half_width is None:
        return f"{known.mean:+.2f}"
    return f"{known.mean:+.2f} ({known.low:+.2f} to {known.high:+.2f})"


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1
) -> Table:
    return Table(title, tuple(header), tuple(map(tuple, rows)), text_columns=text_columns)
