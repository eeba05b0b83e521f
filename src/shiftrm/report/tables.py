"""Tables of text: their cells, and the tables of all numbers, over-optimisation and diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shiftrm.metrics import metric as declared
from shiftrm.report.analysis import influence
from shiftrm.report.measurements import SeedEstimate, estimate
from shiftrm.report.results import SFT, Results

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A table of text. The first `text_columns` columns hold words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1


# -- cells -------------------------------------------------------------------------------------


def number(found: SeedEstimate | None, digits: int = 2) -> str:
    """Format `4.31`, for several seeds `4.31 ± 0.22` (95 % t-interval), or "not measured"."""
    if found is None:
        return NOT_MEASURED
    text = fixed_point(found.mean, digits)
    if found.half_width is None:
        return text
    return f"{text} ± {fixed_point(found.half_width, digits)}"


def fixed_point(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Format with `digits` decimals, without "-0.00"; scientific if too large to read."""
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    rounded = round(value, digits) + 0.0  # turns -0.0 into 0.0
    return f"{rounded:+.{digits}f}" if sign else f"{rounded:.{digits}f}"


def arrow(old: float | None, new: float | None, digits: int = 2) -> str:
    """Format `0.50 → 0.25`, or "not measured" if both are missing."""
    if old is None and new is None:
        return NOT_MEASURED
    said = (NOT_MEASURED if end is None else fixed_point(end, digits) for end in (old, new))
    return " → ".join(said)


_OF_REWARD_MODELS = ("proxy_", "accuracy_", "rank_", "sight_", "relative_difference_variance_")


def applies(m: Results, arm: str, metric: str) -> bool:
    """Whether a metric says something of an arm: gold has no reward model to measure."""
    return not (m.arms[arm].is_gold and metric.startswith(_OF_REWARD_MODELS))


def cell(m: Results, arm: str, round_: int, metric: str) -> str:
    """Format a number of an evaluation with the digits that its metric declares.

    "—" where a number does not apply: SFT has no policy training, so its numbers are recorded as
    "after", only arms with meta steps have an influence, and gold has no reward model.
    """
    if metric == "meta_influence":
        return _influence_cell(m, arm, round_)
    if not applies(m, arm, metric):
        return "—"
    text = number(m.estimate("evaluate", arm, round_, metric), declared(metric).digits)
    return "—" if (text, arm, metric[-7:]) == (NOT_MEASURED, SFT, "_before") else text


def _influence_cell(m: Results, arm: str, round_: int) -> str:
    found = influence(m, arm, round_)
    if found is None:
        return NOT_MEASURED if m.arms[arm].adapts else "—"
    digits = declared("meta_influence").digits
    return f"{found.mean:.1e}" if abs(found.mean) < 1e-3 else number(found, digits)


def seed_note(m: Results) -> str:
    return " ± is the 95 % t-interval over the seeds." if len(m.seeds) > 1 else ""


def number_table(
    m: Results,
    title: str,
    keys: Sequence[tuple[str, int]],
    metrics: Sequence[str],
    note: str,
    *,
    heading: Callable[[str], str] = lambda metric: declared(metric).heading,
) -> Table:
    """Return a table with a row for each (arm, round) and a column for each metric."""
    return Table(
        title,
        ("Arm", "Round", *map(heading, metrics)),
        tuple((m.name(a), str(r), *(cell(m, a, r, metric) for metric in metrics)) for a, r in keys),
        note,
        text_columns=2,
    )


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


# -- all numbers -------------------------------------------------------------------------------

METRICS = (
    "gold_mean", "kl", "proxy_mean_standardised", "accuracy_heldout", "accuracy_policy_before",
    "accuracy_policy_after", "relative_difference_variance_before",
    "relative_difference_variance_after", "meta_influence", "length_mean", "truncated_share",
)  # fmt: skip
_BY_GOLD = ("gold_mean", "accuracy_policy_before", "accuracy_policy_after")


def metrics_table(m: Results) -> Table:
    """Return the main numbers of every arm and round."""
    gold = m.has("gold_mean")
    return number_table(
        m,
        "All final numbers",
        m.keys,
        [x for x in METRICS if gold or x not in _BY_GOLD],
        "“Before” is the round's reward model on responses of the policy the round began with, "
        "“after” on those of the policy trained on it; the variance is relative to the same reward "
        "model's on SFT responses. SFT (round 0) and DPO have no reward model of their own: theirs "
        "is the first one. “—”: does not apply (no policy training, no meta step, no reward model)."
        f"{seed_note(m)}",
    )


def kl_table(m: Results) -> Table:
    """Return KL and gold of every arm and round."""
    rounds = m.all_rounds
    rows = []
    for arm in m.trained if m.has("gold_mean") else ():
        own = m.rounds(arm)
        cells = (
            cell(m, arm, r, metric) if r in own else "—"
            for r in rounds
            for metric in ("gold_mean", "kl")
        )
        rows.append((m.name(arm), *cells))
    return Table(
        "Gold and the KL it was reached at",
        ("Arm", *(f"{what}, round {r}" for r in rounds for what in ("Gold", "KL"))),
        tuple(rows),
        "Compare gold numbers of one round only where the KLs beside them agree; DPO's KL is "
        "not steered.",
    )


def other_table(m: Results) -> Table:
    """Return the numbers of each arm's last round that nothing has asked for so far.

    Build it after all other blocks. A metric that a user declares and records appears here.
    """
    last = {arm: m.rounds(arm)[-1] for arm in m.arms if m.rounds(arm)}
    rows = []
    for metric in m.unread():
        one = declared(metric)
        cells = [m.estimate("evaluate", arm, r, metric) for arm, r in last.items()]
        if any(cells):
            label = f"{one.label} ({one.unit})" if one.unit else one.label
            label += f": {metric}" if "*" in one.id else ""
            rows.append((label, *("—" if x is None else number(x, one.digits) for x in cells)))
    return Table(
        "Other measurements",
        ("Measurement", *(f"{m.name(arm)}, round {r}" for arm, r in last.items())),
        tuple(rows),
        f"All other recorded numbers, after each arm's last round.{seed_note(m)}",
    )


# -- over-optimisation and diversity -----------------------------------------------------------

_ALONG = (
    "overopt_peak_gold", "overopt_peak_kl", "overopt_final_gold", "overopt_final_kl",
    "overopt_drop",
)  # fmt: skip
_AT = "overopt_gold_at_kl_"


def over_optimisation_table(m: Results) -> Table:
    """Return the table of gold along policy training: at the peak, the end and fixed KL."""
    keys = [(arm, r) for arm in m.arms for r in m.rounds(arm, "evaluate", "overopt_peak_gold")]
    at = [metric for metric in m.metrics("evaluate") if metric.startswith(_AT)]

    def heading(metric: str) -> str:
        kl = metric.removeprefix(_AT) if metric in at else ""
        return f"{declared(metric).heading} {kl}".strip()

    source = (
        "the mean reward of the gold world"
        if m.gold_is_true
        else "the mean of a second reward model, which trains nothing (evaluation.gold),"
    )
    return number_table(
        m,
        "Gold along policy training",
        keys,
        [*_ALONG, *sorted(at, key=lambda metric: float(metric.removeprefix(_AT)))],
        f"Gold is {source} on the responses of each step, smoothed over a twentieth of the steps. "
        "A drop after the peak, while the proxy rises, is over-optimisation. Each round begins "
        "where the one before ended.",
        heading=heading,
    )


def best_of_n_table(m: Results) -> Table:
    """Return the table of best-of-n on SFT's responses, chosen by the first reward model."""
    names = ("bon_kl", "bon_proxy", "bon_gold")
    curves = {name: m.curve("best_of_n", SFT, 0, name) for name in names}
    steps = sorted({n for points in curves["bon_gold"].values() for n, _ in points})

    def at(name: str, n: float) -> str:
        by_seed = {seed: dict(points).get(n) for seed, points in curves[name].items()}
        return number(estimate({s: value for s, value in by_seed.items() if value is not None}))

    drop = m.estimate("best_of_n", SFT, 0, "bon_drop")
    end = "." if drop is None else f". Gold falls {fixed_point(drop.mean)} from its peak."
    return Table(
        "Best of n responses of SFT",
        ("n", *(declared(name).heading for name in names)),
        tuple((f"{n:.0f}", *(at(name, n) for name in names)) for n in steps),
        f"The unbiased estimator over all subsets of the responses; KL = log n - (n - 1) / n{end}",
        text_columns=0,
    )


_DIVERSITY = (
    "similarity", "self_bleu", "embedding_similarity", "distinct_1", "distinct_2", "distinct_3",
    "compression_ratio", "distinct_share",
)  # fmt: skip


def diversity_table(m: Results) -> Table:
    """Return the similarity of responses by arm and round (the paper's Table 3)."""
    keys = [key for key in m.keys if m.final("evaluate", *key, "self_bleu")]
    metrics = [x for x in _DIVERSITY if any(m.final("evaluate", *key, x) for key in keys)]
    missing = " No embedder was given (evaluation.embedder), so the paper's sum was not measured."
    return number_table(
        m,
        "Diversity of the responses (Table 3)",
        keys,
        metrics,
        "Self-BLEU, embedding similarity, their sum and the compression ratio: lower = more "
        "diverse. Distinct n-grams and different responses: higher = more diverse. All depend on "
        "how many responses there are and how long they are."
        f"{'' if 'similarity' in metrics else missing}{seed_note(m)}",
    )
