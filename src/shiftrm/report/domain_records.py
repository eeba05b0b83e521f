"""Numbers of a run over the gold world's domains, read from records."""

from collections.abc import Iterable, Sequence

from shiftrm.metrics import metric as declared
from shiftrm.records import Record

__all__ = [
    "LABELS", "betas_of", "mean_over_domains", "methods_of", "targets_of", "values",
]  # fmt: skip

LABELS = {
    "reference": "reference",
    "finetuned": "plain fine-tuning",
    "pooled_weighted": "pooled BT, weighted",
    "oodpl_weighted": "OODPL, weighted",
    "oracle_weighted": "oracle, weighted",
    "dpo": "DPO on sources",
    "pooled_ppo": "pooled BT, PPO",
    "oodpl_ppo": "OODPL, PPO",
    "oracle_ppo": "oracle, PPO",
    "pooled_rloo": "pooled BT, RLOO",
    "oodpl_rloo": "OODPL, RLOO",
    "oracle_rloo": "oracle, RLOO",
}
"""The methods that a recipe can name, in the order of tables and pictures."""


def values(
    records: Iterable[Record], stage: str, method: str, metric: str, step: int | None = None
) -> dict[int, float]:
    """Return one number per seed.

    Raises:
        UndeclaredMetric: `shiftrm.metrics` does not declare the name.
    """
    declared(metric)
    return {
        r.seed: float(r.value)  # type: ignore[arg-type]
        for r in records
        if (r.stage, r.method, r.metric, r.step) == (stage, method, metric, step)
    }


def targets_of(records: Sequence[Record]) -> list[str]:
    """Return the domains that policies were made for."""
    names = (r.stage.partition("/") for r in records)
    return list(dict.fromkeys(name for kind, _, name in names if kind == "evaluate"))


def methods_of(records: Sequence[Record]) -> list[str]:
    """Return the compared methods, without those that only vary beta."""
    found = {r.method for r in records if r.stage.startswith("evaluate/")}
    return [method for method in LABELS if method in found]


def betas_of(records: Sequence[Record]) -> list[float]:
    """Return the betas that reward models were meta-trained for."""
    found = {r.method for r in records if r.stage == "meta" and r.method.startswith("beta_")}
    return sorted(float(method.removeprefix("beta_")) for method in found)


def mean_over_domains(records: Sequence[Record], method: str, metric: str) -> dict[int, float]:
    """Return a final number, averaged over the targets, one per seed."""
    tables = [values(records, f"evaluate/{t}", method, metric) for t in targets_of(records)]
    seeds = set.intersection(*(set(table) for table in tables)) if tables else set()
    return {seed: sum(table[seed] for table in tables) / len(tables) for seed in sorted(seeds)}
