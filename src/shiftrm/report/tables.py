"""Text tables of records, for the page and the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiftrm.metrics import metric as declared
from shiftrm.report.analysis import adaptations, influence
from shiftrm.report.arms import DPO, FIXED, SFT, arm_name, in_order, is_metarm
from shiftrm.report.measurements import Estimate, Measurements, estimate

NOT_MEASURED = "not measured"
OPPONENTS = (SFT, FIXED, DPO)

# Win/tie/lose against SFT by round in the paper (GPT-4 as judge; arXiv 2405.00438).
PAPER_ROUNDS = {
    "Harmless": ("44 / 44 / 12", "65 / 31 / 4", "69 / 28 / 3", "64 / 31 / 5"),
    "Helpful": ("39 / 52 / 9", "62 / 33 / 5", "73 / 23 / 4", "67 / 27 / 6"),
    "Summary": ("51 / 11 / 38", "55 / 15 / 30", "67 / 14 / 19", "78 / 5 / 17", "72 / 8 / 20"),
}
PAPER_BEST = {  # the paper's best round against vanilla PPO and DPO
    "Harmless": ("54 / 31 / 15", "49 / 16 / 35"),
    "Helpful": ("65 / 30 / 5", "58 / 35 / 7"),
    "Summary": ("62 / 7 / 31", "59 / 6 / 35"),
}


@dataclass(frozen=True)
class Table:
    """A table of text. The first `text_columns` columns hold words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1


def number(found: Estimate | None, digits: int = 2) -> str:
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


def shares(
    m: Measurements, stage: str, method: str, rounds: Sequence[int], opponent: str
) -> dict[str, Estimate] | None:
    """Return win, tie and lose, means over seeds; None if one is missing."""
    found = {}
    for outcome in ("win", "tie", "lose"):
        share = estimate(m.by_seed(stage, method, rounds, f"{outcome}_vs_{opponent}"))
        if share is None:
            return None
        found[outcome] = share
    return found


def triple(m: Measurements, stage: str, method: str, rounds: Sequence[int], opponent: str) -> str:
    """Format win, tie and lose in per cent as `64 / 31 / 5`, or "not measured"."""
    found = shares(m, stage, method, rounds, opponent)
    if found is None:
        return NOT_MEASURED
    return " / ".join(f"{100 * share.mean:.0f}" for share in found.values())


def measured(m: Measurements, method: str, round_: int, metric: str) -> str:
    """Format a number of stage "evaluate" with the digits that its metric declares."""
    return number(m.estimate("evaluate", method, round_, metric), declared(metric).digits)


def number_table(
    m: Measurements,
    title: str,
    keys: Sequence[tuple[str, int]],
    metrics: Sequence[str],
    *,
    name: Callable[[str], str],
    adapted: Callable[[str], bool],
    note: str,
) -> Table:
    """Return a table with a row per (arm, round) and a column per metric.

    Args:
        name: display name of an arm.
        adapted: whether an arm has a meta step, and so a meta influence.
    """

    def cell(arm: str, round_: int, metric: str) -> str:
        if metric == "meta_influence":
            return _influence_cell(m, arm, round_, adapted(arm))
        text = measured(m, arm, round_, metric)
        if text == NOT_MEASURED and arm == SFT and metric.endswith("_before"):
            return "—"  # SFT has no policy training; its numbers are recorded as "after"
        return text

    return Table(
        title,
        ("Arm", "Round", *(declared(metric).heading for metric in metrics)),
        tuple((name(a), str(r), *(cell(a, r, metric) for metric in metrics)) for a, r in keys),
        note,
        text_columns=2,
    )


def _influence_cell(m: Measurements, method: str, round_: int, adapted: bool) -> str:
    found = influence(m, method, round_)
    if found is None:
        return NOT_MEASURED if adapted else "—"
    digits = declared("meta_influence").digits
    return f"{found.mean:.1e}" if abs(found.mean) < 1e-3 else number(found, digits)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def win_table(m: Measurements) -> Table:
    """Return win/tie/lose against SFT by round, one row per arm (the paper's Table 1)."""
    rounds = m.all_rounds()
    rows = [
        (arm_name(arm), *(triple(m, "evaluate", arm, [r], SFT) for r in rounds))
        for arm in m.policy_arms()
    ]
    if DPO in m.methods():
        dpo = triple(m, "evaluate", DPO, [1], SFT)
        rows.append((f"{arm_name(DPO)} (has no rounds)", dpo, *("" for _ in rounds[1:])))
    return Table(
        "Win / tie / lose against SFT by round, in %",
        ("Arm", *(f"Round {r}" for r in rounds)),
        tuple(rows),
        "By gold reward, on the same prompts." + _seed_note(m, "Means over the seeds."),
    )


def paper_table(other: str = "another world and another judge") -> Table:
    """Return the paper's results for MetaRM.

    Args:
        other: why they are not comparable.
    """
    width = max(len(rounds) for rounds in PAPER_ROUNDS.values())
    rows = [
        (f"MetaRM, {task}", *rounds, *("" for _ in range(width - len(rounds))), *PAPER_BEST[task])
        for task, rounds in PAPER_ROUNDS.items()
    ]
    return Table(
        "For comparison: the paper's MetaRM, win / tie / lose in %",
        (
            "Task",
            *(f"Round {r}" for r in range(1, width + 1)),
            "Best round vs PPO",
            "Best round vs DPO",
        ),
        tuple(rows),
        f"Llama-2-7B judged by GPT-4 (arXiv 2405.00438): {other}, so compare the course over the "
        "rounds, not the numbers.",
    )


def best_round_table(m: Measurements) -> Table:
    """Return every arm's best round against SFT, vanilla PPO and DPO (the paper's Table 2)."""
    rows = []
    for method in in_order(method for method in m.methods() if method != SFT):
        rounds = m.rounds(method, "compare")
        if method == DPO and not rounds:
            continue
        by_seed = best_round_by_seed(m, method, rounds, (*OPPONENTS, *m.methods()))
        best = ", ".join(str(r) for r in by_seed.values()) if by_seed else NOT_MEASURED
        cells = ["—" if o == method else triple(m, "compare", method, rounds, o) for o in OPPONENTS]
        rows.append((arm_name(method), "—" if method == DPO else best, *cells))
    return Table(
        "Best round against SFT, vanilla PPO and DPO: win / tie / lose in %",
        ("Arm", "Best round", *(f"vs {_opponent_name(o)}" for o in OPPONENTS)),
        tuple(rows),
        "How the best round was chosen, of an arm and of its opponent: by mean gold on one half of "
        "the evaluation prompts; the rates are measured on the other half, so that choosing does "
        "not flatter them. DPO's KL is not steered: see it in the table of KLs."
        + _seed_note(m, "Best rounds are listed seed by seed, rates are means over the seeds."),
    )


def _opponent_name(opponent: str) -> str:
    return "vanilla PPO" if opponent == FIXED else arm_name(opponent)


def best_round_by_seed(
    m: Measurements, method: str, rounds: Sequence[int], opponents: Sequence[str]
) -> dict[int, int]:
    """Return the round of each seed that has "compare" records."""
    found: dict[int, int] = {}
    for round_ in rounds:
        for opponent in opponents:
            for seed in m.final("compare", method, round_, f"win_vs_{opponent}"):
                found[seed] = round_
    return dict(sorted(found.items()))


METRICS = (
    "gold_mean", "kl", "proxy_mean_standardised", "accuracy_heldout", "accuracy_policy_before",
    "accuracy_policy_after", "relative_difference_variance_before",
    "relative_difference_variance_after", "meta_influence", "length_mean", "truncated_share",
)  # fmt: skip
"""Columns of "All final numbers"."""


SIGHT = ("accuracy_policy", "relative_difference_variance")
"""Metrics of a reward model on a policy's responses, each `_before` and `_after` a round."""


def metrics_table(m: Measurements) -> Table:
    """Return all final numbers of every arm and round."""
    return number_table(
        m,
        "All final numbers",
        [(arm, round_) for arm in m.methods() for round_ in m.rounds(arm)],
        METRICS,
        name=arm_name,
        adapted=is_metarm,
        note="Before and after: the round's PPO. SFT (round 0) and DPO have no reward model of "
        "their own: theirs is the vanilla one. “—”: does not apply (no PPO, no meta step)."
        + _seed_note(m, "± is the 95 % t-interval over the seeds."),
    )


def kl_table(m: Measurements) -> Table:
    """Return KL and gold of every arm and round."""
    rounds = m.all_rounds()
    methods = [*m.policy_arms(), *(method for method in (DPO,) if method in m.methods())]
    rows = []
    for method in methods:
        cells: list[str] = []
        for round_ in rounds:
            known = round_ in m.rounds(method)
            blank = "" if method == DPO else NOT_MEASURED
            for metric in ("gold_mean", "kl"):
                found = m.estimate("evaluate", method, round_, metric)
                cells.append(number(found) if known else blank)
        rows.append((arm_name(method), *cells))
    columns = [f"{what}, round {r}" for r in rounds for what in ("Gold", "KL")]
    return Table(
        "Gold and the KL it was reached at",
        ("Arm", *columns),
        tuple(rows),
        "Compare gold numbers of one round only where the KLs beside them agree; DPO's KL is "
        "not steered.",
    )


def blindness_table(m: Measurements) -> Table:
    """Return the metrics of the fixed reward model before and after every round."""
    metrics = [f"{what}_{when}" for what in SIGHT for when in ("before", "after")]
    return Table(
        f"{arm_name(FIXED)}: what the reward model still sees",
        ("Round", *(f"{declared(metric).heading} PPO" for metric in metrics)),
        tuple((str(r), *(measured(m, FIXED, r, x) for x in metrics)) for r in m.rounds(FIXED)),
        "Relative variance: of reward differences. Accuracy 0.5 is a coin. Relative variance 1 is "
        "the spread on SFT samples.",
    )


def adaptation_table(m: Measurements) -> Table:
    """Return the changes by each adaptation on the same policy, with a reading."""

    def arrow(old: float | None, new: float | None, digits: int) -> str:
        if old is None or new is None:
            return NOT_MEASURED
        return f"{fixed_point(old, digits)} → {fixed_point(new, digits)}"

    rows = tuple(
        (
            arm_name(a.method),
            str(a.round),
            a.reading,
            arrow(a.accuracy_old, a.accuracy_new, 3),
            arrow(a.relative_variance_old, a.relative_variance_new, 2),
            arrow(a.variance_old, a.variance_new, 3),
        )
        for a in adaptations(m)
    )
    return Table(
        "What each adaptation changed (old → adapted reward model, same policy)",
        ("Arm", "Round", "Reading", "Accuracy", "Relative variance", "Raw variance"),
        rows,
        "Old: the reward model of the round before (round 1: the vanilla one). A change of "
        "accuracy counts beyond two standard errors and 0.02, more spread beyond a quarter.",
        text_columns=3,
    )


def config_table(config: Mapping[str, Any]) -> Table:
    """Return a nested configuration as a table of dotted keys."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows.append((prefix, text))

    walk("", config)
    return Table("Configuration", ("Setting", "Value"), tuple(rows), text_columns=2)


def versions_table(m: Measurements) -> Table:
    """Return the versions of code and libraries."""
    rows = tuple(
        (commit or "unknown", versions or "unknown", ", ".join(str(s) for s in sorted(seeds)))
        for (commit, versions), seeds in sorted(m.provenance.items())
    )
    return Table("Versions", ("Commit", "Versions", "Seeds"), rows, text_columns=3)


def world_table(m: Measurements) -> Table:
    """Return the metrics of stage "world"."""
    rows = tuple((metric, f"{found.mean:.6g}") for metric, found in m.world().items())
    return Table("The world", ("Quantity", "Value"), rows)


def _seed_note(m: Measurements, text: str) -> str:
    return f" {text}" if len(m.seeds) > 1 else ""
