"""Text tables of a recipe: the MetaRM paper's Tables 1 to 3, and all numbers."""

from __future__ import annotations

from collections.abc import Sequence

from shiftrm.metrics import metric as declared
from shiftrm.report.arms import SFT
from shiftrm.report.measurements import Estimate, Measurements, estimate
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.tables import (
    METRICS,
    NOT_MEASURED,
    Table,
    best_round_by_seed,
    fixed_point,
    number,
    number_table,
    triple,
)

# Lower = more diverse (arXiv 2405.00438, Table 3). The normalisation is not documented.
PAPER_DIVERSITY = {
    "Harmless": ("0.14", "0.07", "0.47", "0.39", "0.41"),
    "Helpful": ("0.09", "0.04", "0.29", "0.31", "0.25"),
    "Summary": ("0.07", "0.06", "0.36", "0.38", "0.33"),
}
DATA_SETS = {
    "demonstrations": "demonstrations (fine-tuning)",
    "pairs": "pairs (training the reward model)",
    "prompts": "prompts (groups and policy training)",
    "heldout": "held-out pairs",
    "eval_prompts": "test prompts",
}


# -- who wins --------------------------------------------------------------------------------------


def win_bounds(
    m: Measurements, stage: str, method: str, rounds: Sequence[int], opponent: str
) -> tuple[float, float] | None:
    """Return 95 % bounds of the share of wins: over seeds, or over prompts for one seed."""
    win = estimate(m.by_seed(stage, method, rounds, f"win_vs_{opponent}"))
    if win is not None and win.half_width is not None:
        return max(0.0, win.low), min(1.0, win.high)
    low, high = (
        estimate(m.by_seed(stage, method, rounds, f"win_{end}_vs_{opponent}"))
        for end in ("low", "high")
    )
    return (low.mean, high.mean) if win and low and high else None


def with_bounds(
    m: Measurements, stage: str, method: str, rounds: Sequence[int], opponent: str
) -> str:
    """Return `triple` with the interval of the wins if known: `64 / 31 / 5 [54, 73]`."""
    text = triple(m, stage, method, rounds, opponent)
    bounds = win_bounds(m, stage, method, rounds, opponent)
    if text == NOT_MEASURED or bounds is None:
        return text
    return f"{text} [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]"


def _interval_note(m: Measurements) -> str:
    if len(m.seeds) > 1:
        return "Means over the seeds; in brackets the 95 % t-interval of the wins over the seeds."
    return (
        "In brackets, where it was recorded: the 95 % interval of the wins over the prompts, which "
        "says nothing about another seed."
    )


def all_rounds(m: Measurements, arms: Arms) -> list[int]:
    """Return the rounds in which responses were measured."""
    return sorted({r for arm in arms.trained for r in m.rounds(arm)})


def win_table(m: Measurements, arms: Arms) -> Table:
    """Return win/tie/lose against SFT by round (the paper's Table 1)."""
    rounds = all_rounds(m, arms)
    rows = []
    if any(m.rounds(arm, "evaluate", "win_vs_sft") for arm in arms.trained):
        for arm in arms.trained:
            own = m.rounds(arm)
            cells = (with_bounds(m, "evaluate", arm, [r], SFT) if r in own else "—" for r in rounds)
            rows.append((arms.name(arm), *cells))
    return Table(
        "Win / tie / lose against SFT by round, in % (the paper's Table 1)",
        ("Arm", *(f"Round {r}" for r in rounds)),
        tuple(rows),
        f"The first response to each of the judged prompts. {_interval_note(m)}",
    )


def best_round_table(m: Measurements, arms: Arms) -> Table:
    """Return the best round of every arm against the best rounds of others (Table 2)."""
    opponents = [SFT, *arms.trained]
    rows = []
    for arm in arms.trained:
        rounds = m.rounds(arm, "compare")
        if not rounds:
            continue
        best = best_round_by_seed(m, arm, rounds, opponents)
        chosen = ", ".join(str(best[seed]) for seed in sorted(best)) or NOT_MEASURED
        cells = [
            "—" if opponent == arm else with_bounds(m, "compare", arm, rounds, opponent)
            for opponent in opponents
        ]
        rows.append((arms.name(arm), chosen, *cells))
    several = " Best rounds are listed seed by seed." if len(m.seeds) > 1 else ""
    return Table(
        "Best round of every arm against the others: win / tie / lose in % (Table 2)",
        ("Arm", "Best round", *(f"vs {arms.name(opponent)}" for opponent in opponents)),
        tuple(rows),
        "The best round, of an arm and of its opponent, is the one with the most wins less losses "
        "against SFT on the first half of the judged prompts; the rates are measured on the second "
        f"half, so that choosing does not flatter them.{several} {_interval_note(m)}",
    )


_JUDGING = (
    "rate", "length_controlled", "length_ours", "length_theirs", "judge_consistency",
    "judge_first_share", "unjudged",
)  # fmt: skip


def judging_table(m: Measurements, arms: Arms) -> Table:
    """Return the table behind the win rates: counts, lengths, consistency of the judge."""
    asked = ("win_vs_sft", "unjudged_vs_sft")
    keys = [
        (arm, r)
        for arm in arms.trained
        for r in m.rounds(arm)
        if any(m.final("evaluate", arm, r, metric) for metric in asked)
    ]
    columns = [
        declared(f"{name}_vs_sft")
        for name in _JUDGING
        if any(_judged(m, key, name) is not None for key in keys)
    ]
    rows = []
    for arm, round_ in keys:
        size = m.sample_size("evaluate", arm, round_, "win_vs_sft")
        cells = (
            number(_judged(m, (arm, round_), c.id.removesuffix("_vs_*")), c.digits) for c in columns
        )
        counted = NOT_MEASURED if size is None else str(size)
        rows.append((arms.name(arm), str(round_), counted, *cells))
    return Table(
        "Behind the win rates",
        ("Arm", "Round", "Judged prompts", *(column.heading for column in columns)),
        tuple(rows),
        "Judges tend to like long answers: read the rate at equal lengths beside the raw one. A "
        "prompt counts as a tie where the judge contradicts itself when the order changes. A judge "
        "blind to places names the first response in half of its answers (0.5). Prompts without a "
        "verdict (answers that could not be read, refusals) are counted and left out.",
        text_columns=2,
    )


def _judged(m: Measurements, key: tuple[str, int], name: str) -> Estimate | None:
    recorded = m.estimate("evaluate", *key, f"{name}_vs_sft")
    if recorded is not None or name != "rate":
        return recorded
    found = {}
    ties = m.final("evaluate", *key, "tie_vs_sft")
    for seed, win in m.final("evaluate", *key, "win_vs_sft").items():
        if seed in ties:
            found[seed] = win + 0.5 * ties[seed]
    return estimate(found)


def blindness_table(m: Measurements, arms: Arms) -> Table:
    """Return the spread of every arm's reward differences, before and after policy training."""
    metric = "relative_difference_variance"
    rounds = all_rounds(m, arms)
    rows = []
    for arm in arms.with_reward_model:
        cells = []
        for round_ in rounds:
            ends = [
                m.estimate("evaluate", arm, round_, f"{metric}_{w}") for w in ("before", "after")
            ]
            said = [NOT_MEASURED if end is None else fixed_point(end.mean) for end in ends]
            if round_ not in m.rounds(arm):
                cells.append("—")
            else:
                cells.append(NOT_MEASURED if ends == [None, None] else " → ".join(said))
        rows.append((arms.name(arm), *cells))
    return Table(
        "Variance of reward differences, relative to SFT responses: before → after the round",
        ("Arm", *(f"Round {r}" for r in rounds)),
        tuple(rows),
        "1 is the spread on SFT responses under the same reward model. A retrained reward model "
        "is another one in every round. Larger differences are not by themselves better judgement.",
    )


# -- diversity -------------------------------------------------------------------------------------

_DIVERSITY = (
    "similarity", "self_bleu", "embedding_similarity", "distinct_1", "distinct_2", "distinct_3",
    "compression_ratio", "distinct_share",
)  # fmt: skip


def diversity_table(m: Measurements, arms: Arms) -> Table:
    """Return the similarity of responses by arm and round (Table 3)."""
    keys = [(arm, r) for arm in arms.kinds for r in m.rounds(arm)]
    keys = [k for k in keys if m.final("evaluate", *k, "self_bleu")]
    metrics = [x for x in _DIVERSITY if any(m.final("evaluate", *key, x) for key in keys)]
    missing = (
        " No embedder was given (evaluation.embedder), so the paper's sum was not measured."
        if keys and "similarity" not in metrics
        else ""
    )
    return number_table(
        m,
        "Diversity of the responses (Table 3)",
        keys,
        metrics,
        name=arms.name,
        adapted=arms.is_adapted,
        note="Self-BLEU, embedding similarity, their sum and the compression ratio: lower = more "
        "diverse. Distinct n-grams and different responses: higher = more diverse. All depend on "
        f"how many responses there are and how long they are.{missing}{_seed_note(m)}",
    )


def paper_diversity_table() -> Table:
    """Return the paper's Table 3."""
    return Table(
        "For comparison: diversity in the paper",
        ("Task", "Raw data", "SFT", "PPO", "DPO", "MetaRM"),
        tuple((task, *values) for task, values in PAPER_DIVERSITY.items()),
        "Self-BLEU and embedding similarity, both normalised (how is not said) and summed; lower = "
        "more diverse. Compare the order of the columns, not the numbers.",
    )


# -- all numbers -----------------------------------------------------------------------------------

_BY_GOLD = ("gold_mean", "accuracy_policy_before", "accuracy_policy_after")


def metrics_table(m: Measurements, arms: Arms) -> Table:
    """Return all final numbers of every arm and round."""
    keys = [(arm, r) for arm in arms.kinds for r in m.rounds(arm)]
    gold = any(m.final("evaluate", *key, "gold_mean") for key in keys)
    return number_table(
        m,
        "All final numbers",
        keys,
        [x for x in METRICS if gold or x not in _BY_GOLD],
        name=arms.name,
        adapted=arms.is_adapted,
        note="“Before” is the round's reward model on responses of the policy the round began "
        "with, “after” on those of the policy trained on it; the variance is relative to the same "
        "reward model's on SFT responses. SFT and DPO have no reward model of their own: theirs is "
        f"the first one. “—”: does not apply.{_seed_note(m)}",
    )


def arms_table(m: Measurements, arms: Arms) -> Table:
    """Return the table of arms with their descriptions."""
    rows = []
    for arm in arms.trained:
        optimiser = arms.optimisers.get(arm)
        rounds = m.rounds(arm) or m.rounds(arm, "ppo") or m.rounds(arm, "reward_model")
        rows.append(
            (
                arms.name(arm),
                "none" if arms.kinds[arm] == "dpo" else arms.words(arm),
                optimiser.upper() if optimiser else NOT_MEASURED.replace("measured", "said"),
                str(len(rounds)),
            )
        )
    return Table("The arms", ("Arm", "Reward model", "Policy trained by", "Rounds"), tuple(rows),
                 text_columns=3)  # fmt: skip


def data_table(m: Measurements, found: Sequence[str]) -> Table:
    """Return the table of rows read and left out, with reasons.

    Args:
        found: the metrics of stage "data".
    """
    rows = []
    for name, title in DATA_SETS.items():
        kept = m.final("data", SFT, 0, name)
        if not kept:
            continue
        start = f"{name}_dropped_"
        reasons = {
            metric.removeprefix(start): m.final("data", SFT, 0, metric)
            for metric in found
            if metric.startswith(start)
        }
        counts = sorted(reasons.items(), key=lambda entry: -max(entry[1].values(), default=0))
        said = ", ".join(f"{reason.replace('_', ' ')} {_count(c)}" for reason, c in counts)
        totals = {seed: sum(c.get(seed, 0.0) for _, c in counts) for seed in kept}
        rows.append((title, said or "—", _count(kept), _count(totals)))
    return Table(
        "Data",
        ("Data set", "Left out because", "Rows kept", "Rows left out"),
        tuple(rows),
        "Every row that was left out is named in data/dropped.jsonl. No test prompt and no prompt "
        "of a held-out pair is in a set that trains.",
        text_columns=2,
    )


def _count(by_seed: dict[int, float]) -> str:
    """Format a count as `12,300`, or `12,300 to 12,310` if the seeds differ."""
    low, high = (f"{int(end(by_seed.values(), default=0)):,}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _seed_note(m: Measurements) -> str:
    return " ± is the 95 % t-interval over the seeds." if len(m.seeds) > 1 else ""
