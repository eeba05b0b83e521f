"""Tables of over-optimisation in a recipe: gold along policy training and best-of-n."""

from __future__ import annotations

from shiftrm.metrics import metric as declared
from shiftrm.report.measurements import Measurements, estimate
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.tables import Table, fixed_point, measured, number

__all__ = ["best_of_n_table", "over_optimisation_table"]

_ALONG = (
    "overopt_peak_gold", "overopt_peak_kl", "overopt_final_gold", "overopt_final_kl",
    "overopt_drop",
)  # fmt: skip
_AT = "overopt_gold_at_kl_"


def over_optimisation_table(m: Measurements, arms: Arms) -> Table:
    """Return the table of gold along policy training: at the peak, the end and fixed KL."""
    keys = [(arm, r) for arm in arms.kinds for r in m.rounds(arm, "evaluate", "overopt_peak_gold")]
    named = {name for key in keys for name in m.metrics("evaluate", *key) if _AT in name}
    at = sorted(named, key=lambda name: float(name.removeprefix(_AT)))
    headings = [declared(metric).heading for metric in _ALONG]
    headings += [f"{declared(name).heading} {name.removeprefix(_AT)}" for name in at]
    rows = tuple(
        (arms.name(arm), str(r), *(measured(m, arm, r, metric) for metric in (*_ALONG, *at)))
        for arm, r in keys
    )
    return Table(
        "Gold along policy training",
        ("Arm", "Round", *headings),
        rows,
        "Gold is the mean of a second reward model, which trains nothing (evaluation.gold), on the "
        "responses of each step, smoothed over a twentieth of the steps. A drop after the peak, "
        "while the proxy rises, is over-optimisation. Rounds begin where the last one ended.",
        text_columns=2,
    )


def best_of_n_table(m: Measurements) -> Table:
    """Return the table of best-of-n on SFT's responses, chosen by the first reward model."""
    curves = {
        name: m.curve("best_of_n", "sft", 0, f"bon_{name}") for name in ("kl", "proxy", "gold")
    }
    steps = sorted({n for points in curves["gold"].values() for n, _ in points})

    def cell(name: str, n: int) -> str:
        by_seed = {seed: dict(points).get(n) for seed, points in curves[name].items()}
        return number(estimate({s: value for s, value in by_seed.items() if value is not None}))

    return Table(
        "Best of n responses of SFT",
        ("n", *(declared(f"bon_{name}").heading for name in curves)),
        tuple((str(n), *(cell(name, n) for name in curves)) for n in steps),
        "The unbiased estimator over all subsets of the responses; KL = log n - (n - 1) / n"
        + _drop(m),
        text_columns=0,
    )


def _drop(m: Measurements) -> str:
    found = m.estimate("best_of_n", "sft", 0, "bon_drop")
    return "." if found is None else f". Gold falls {fixed_point(found.mean)} from its peak."
