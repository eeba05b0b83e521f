"""Sight tests of every round's reward model: the table and the sentences about it."""

from __future__ import annotations

from dataclasses import replace

from shiftrm.data.negatives import NEGATIVES
from shiftrm.measure.diagnosis.thresholds import SIGHT_LOW
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import NOT_MEASURED, Table, fixed_point, number

_RANK = "rank_policy"
_GOLD = "gold_sight_"

FEWEST_SEEDS = 3
"""An interval over two seeds is twelve times the half of their distance."""


def sight_table(m: Results) -> Table:
    """Return the share preferred in each sight test, by arm and round; no rows if not measured."""
    kinds = _kinds(m)
    metrics = [f"sight_{kind}" for kind in kinds]
    if m.has(f"{_RANK}_after"):
        metrics.append(_RANK)
    rows = [
        (m.name(arm), str(r), *(_cell(m, arm, r, metric) for metric in metrics))
        for arm, r in (m.keys if kinds else ())
        if not m.arms[arm].is_gold
        and any(m.mean(arm, r, f"{metric}_after") is not None for metric in metrics)
    ]
    gold = [_of_gold(m, kind) for kind in kinds]
    if any(gold):
        last = ("—",) * (len(metrics) - len(kinds))
        name = "Gold" if m.gold_is_true else "The second reward model"
        rows.append((name, "all", *(text or NOT_MEASURED for text in gold), *last))
    headings = [_label(kind) for kind in kinds]
    if _RANK in metrics:
        headings.append("Rank correlation with gold")
    return Table(
        "How often the response is preferred to …: before → after the round",
        ("Arm", "Round", *headings),
        tuple(rows),
        "Before and after the round's policy training, on responses of the policy at that time; "
        "shares of pairs, equal rewards counting one half, 0.5 is a coin. The response to another "
        "prompt has about the same length. ±: half of a 95 % interval, over prompts for one "
        "seed, over seeds for three or more. Gold: the lowest and highest share over all rounds.",
        text_columns=2,
    )


def sight_sentences(m: Results) -> list[str]:
    """Say what the tests ask, and what each arm's reward model looks at least in the end."""
    texts = [
        "A sight test asks how often a reward model prefers a response of the policy to one that "
        "is presumably worse. It needs no labels. A high share does not show that a model orders "
        "two good responses well; a low one shows what a policy can get away with."
    ]
    lowest = []
    for arm in m.with_rewards:
        found = [(m.last(arm, f"sight_{kind}_after"), kind) for kind in _kinds(m)]
        shares = [(last[1].mean, kind) for last, kind in found if last is not None]
        if shares and min(shares)[0] < SIGHT_LOW:
            share, kind = min(shares)
            lowest.append(f"{m.name(arm)}: {fixed_point(share)} against {_label(kind).lower()}")
    if lowest:
        texts.append(f"Lowest after the last round: {'; '.join(lowest)}.")
    return texts


def _kinds(m: Results) -> list[str]:
    recorded = {
        metric.removeprefix("sight_").removesuffix("_after")
        for metric in m.metrics("evaluate")
        if metric.startswith("sight_") and metric.endswith("_after")
    }
    known = [kind for kind in NEGATIVES.names() if kind in recorded]
    return [*known, *sorted(recorded - set(known))]


def _label(kind: str) -> str:
    if kind not in NEGATIVES.names():  # a user's own, which is not registered here
        return kind
    label = NEGATIVES.get(kind).label
    return label[0].upper() + label[1:]


def _cell(m: Results, arm: str, round_: int, metric: str) -> str:
    before, after = (_share(m, arm, round_, f"{metric}_{when}") for when in ("before", "after"))
    if arm == SFT or before == NOT_MEASURED:  # SFT has no policy training
        return after
    return f"{before} → {after}"


def _share(m: Results, arm: str, round_: int, metric: str) -> str:
    """Return a number with half its interval: over seeds, or over the prompts of a single seed."""
    found = m.estimate("evaluate", arm, round_, metric)
    if found is None:
        return NOT_MEASURED
    of_test = metric.startswith("sight_")
    over_prompts = m.mean(arm, round_, f"half_width_{metric}") if of_test else None
    over_seeds = found.half_width if found.count >= FEWEST_SEEDS else None
    half = over_prompts if found.count == 1 else over_seeds
    return number(replace(found, half_width=half))


def _of_gold(m: Results, kind: str) -> str:
    found = [m.mean(arm, r, f"{_GOLD}{kind}") for arm, r in m.keys]
    shares = [share for share in found if share is not None]
    if not shares:
        return ""
    low, high = fixed_point(min(shares)), fixed_point(max(shares))
    return low if low == high else f"{low} to {high}"
