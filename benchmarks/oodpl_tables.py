"""Records of runs over the gold world's domains -> Markdown tables, every seed with intervals."""

from collections.abc import Mapping, Sequence

from oodpl_figures import (
    LABELS,
    betas_of,
    mean_over_domains,
    methods_of,
    targets_of,
    values,
)
from shiftrm.records import Record
from shiftrm.report.measurements import Estimate, estimate

__all__ = ["all_tables"]

AGAINST = ("finetuned", "pooled_weighted", "pooled_ppo")
"""What the differences are taken to, seed by seed."""


def all_tables(records: Sequence[Record]) -> dict[str, str]:
    """Markdown by name: gold by domain, all measurements, differences, beta, reward models."""
    return {
        "gold": _gold(records),
        "measurements": _measurements(records),
        "differences": _differences(records),
        "beta": _beta(records),
        "meta": _meta(records),
    }


def _gold(records: Sequence[Record]) -> str:
    targets = targets_of(records)
    rows = []
    for method in methods_of(records):
        by_target = [values(records, f"evaluate/{t}", method, "gold_mean") for t in targets]
        cells = [*by_target, mean_over_domains(records, method, "gold_mean")]
        rows.append([LABELS[method], *map(_cell, cells)])
    return _table(["method", *targets, "mean"], rows)


def _measurements(records: Sequence[Record]) -> str:
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
    return _table(["method", *columns.values()], rows)


def _differences(records: Sequence[Record]) -> str:
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
    return _table(["method", "against", "difference in gold", "seeds"], rows)


def _beta(records: Sequence[Record]) -> str:
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
    return _table(header, rows)


def _meta(records: Sequence[Record]) -> str:
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
    return _table(header, rows)


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


def _signed(known: Estimate | None) -> str:
    if known is None:
        return "-"
    if known.half_width is None:
        return f"{known.mean:+.2f}"
    return f"{known.mean:+.2f} ({known.low:+.2f} to {known.high:+.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
