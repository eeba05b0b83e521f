"""Warnings about the numbers of a recipe's run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shiftrm.report.flags import flags
from shiftrm.report.measurements import Measurements
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.tables import fixed_point
from shiftrm.report.wording import ONE_SEED, listing, rounds_text

__all__ = ["warnings"]

TRUNCATED = 0.1  # warn from this share of truncated responses
LONGER = 1.3  # warn from this mean length, relative to SFT
UNJUDGED = 0.02
CONSISTENT = 0.7

Worst = Callable[[Iterable[float]], float]


def warnings(m: Measurements, arms: Arms, config: Mapping[str, Any] | None = None) -> list[str]:
    """Return the warnings."""
    texts = [ONE_SEED] if len(m.seeds) < 2 else []
    judge = (config or {}).get("judge")
    kind = judge.get("kind") if isinstance(judge, Mapping) else None
    if kind in ("reward-model", "gold"):
        texts.append(
            f"The judge is {'a reward model' if kind == 'reward-model' else 'the gold reward'}, "
            "not a person and not a language model that reads: wins are wins by its number."
        )
    cut = _where(m, arms, "truncated_share", lambda value: value > TRUNCATED)
    if cut:
        texts.append(
            f"Many responses were cut off by the length limit (largest share): {cut}. They are "
            "judged and scored as they are."
        )
    texts += _length_warning(m, arms)
    texts += _unjudged_warning(m, arms)
    shaky = _where(m, arms, "judge_consistency_vs_sft", lambda value: value < CONSISTENT, worst=min)
    if shaky:
        texts.append(
            "The judge often contradicts itself when the order changes (share that agrees): "
            f"{shaky}."
        )
    return texts + flags(m)


def _where(
    m: Measurements, arms: Arms, metric: str, wrong: Callable[[float], bool], *, worst: Worst = max
) -> str:
    """Return arms and rounds with the worst value, `MetaRM, rounds 2 and 3 (0.31)`, or ""."""
    found = []
    for arm in arms.kinds:
        values = {}
        for round_ in m.rounds(arm, "evaluate", metric):
            value = m.estimate("evaluate", arm, round_, metric)
            if value is not None and wrong(value.mean):
                values[round_] = value.mean
        if values:
            number = fixed_point(worst(values.values()))
            found.append(f"{arms.name(arm)}, {rounds_text(list(values))} ({number})")
    return listing(found)


def _unjudged_warning(m: Measurements, arms: Arms) -> list[str]:
    found = []
    for arm in arms.trained:
        for round_ in m.rounds(arm, "evaluate", "unjudged_vs_sft"):
            counts = m.final("evaluate", arm, round_, "unjudged_vs_sft")
            asked = m.sample_size("evaluate", arm, round_, "unjudged_vs_sft")
            missing = sum(counts.values())
            if asked and missing / asked > UNJUDGED:
                found.append(f"{arms.name(arm)}, round {round_} ({missing:.0f} of {asked})")
    if not found:
        return []
    return [f"Prompts without a verdict of the judge, which do not count: {listing(found)}."]


def _length_warning(m: Measurements, arms: Arms) -> list[str]:
    start = m.sft("length_mean")
    if start is None or start.mean <= 0:
        return []
    found = []
    for arm in arms.trained:
        rounds = m.rounds(arm, "evaluate", "length_mean")
        end = m.estimate("evaluate", arm, rounds[-1], "length_mean") if rounds else None
        if end is not None and not 1 / LONGER < end.mean / start.mean < LONGER:
            found.append(f"{arms.name(arm)} ({fixed_point(end.mean / start.mean)} times SFT's)")
    if not found:
        return []
    text = f"The length of the answers changed in {listing(found)}: judges like long answers"
    judged = any(m.rounds(arm, "evaluate", "win_vs_sft") for arm in arms.trained)
    return [f"{text}{', so read the rate at equal lengths' if judged else ''}."]
