"""Sentences of the page, generated from the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shiftrm.records import Record
from shiftrm.report.analysis import (
    GoldGap,
    KlSpread,
    accuracy_noise,
    gold_gap,
    gold_gaps,
    kl_spreads,
)
from shiftrm.report.arms import FIXED, RETRAINED, SFT, arm_name, arm_short, is_metarm
from shiftrm.report.flags import flags
from shiftrm.report.measurements import Measurements
from shiftrm.report.tables import NOT_MEASURED, fixed_point, measured, text_table, triple
from shiftrm.report.wording import ONE_SEED, listing, rounds_text

NOTHING_TO_COMPARE = (
    "Not measured: the records hold no gold result of the reward model kept fixed and of another "
    "arm in the same round."
)


@dataclass(frozen=True)
class Headline:
    """Main result in one line, one sentence per arm, and caveats."""

    title: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


def headline(m: Measurements) -> Headline:
    """Say which arms ended with higher gold than the fixed reward model."""
    gaps = gold_gaps(m)
    warnings = list(kl_warnings(m))
    if not gaps:
        return Headline(NOTHING_TO_COMPARE, (), tuple(warnings))
    several = max(gap.difference.count for gap in gaps) > 1
    title = _title_several(gaps) if several else _title_one(gaps)
    if not several:
        warnings.insert(0, ONE_SEED)
    elif len(gaps) > 1:
        warnings.append(
            f"{len(gaps)} arms are compared with the same baseline and the intervals are not "
            "corrected for that."
        )
    sentences = [_gap_sentence(gap) for gap in gaps] + _against_retraining(m)
    return Headline(title, tuple(sentences), tuple(warnings))


def _named_gaps(gaps: list[GoldGap]) -> str:
    """Return names with their differences; short names if there are many."""
    name = arm_name if len(gaps) <= 2 else arm_short
    return listing(
        [f"{name(g.method)} ({fixed_point(g.difference.mean, sign=True)})" for g in gaps]
    )


def _title_several(gaps: list[GoldGap]) -> str:
    higher = [g for g in gaps if g.difference.excludes_zero and g.difference.mean > 0]
    lower = [g for g in gaps if g.difference.excludes_zero and g.difference.mean < 0]
    seeds = max(gap.difference.count for gap in gaps)
    verdicts = [
        f"{_named_gaps(arms)} ended clearly {word} in gold than the reward model kept fixed"
        f"{_kl_clause(arms)}"
        for word, arms in (("higher", higher), ("lower", lower))
        if arms
    ]
    if not higher:
        text = "no arm ended clearly higher in gold than the reward model kept fixed"
        verdicts.insert(0, f"{text}{_kl_clause(gaps)}")
    elif unclear := [g for g in gaps if not g.difference.excludes_zero]:
        verdicts.append(f"no clear answer for {_named_gaps(unclear)}")
    return f"Over {seeds} seeds, {'; '.join(verdicts)}."


def _title_one(gaps: list[GoldGap]) -> str:
    """Return the title for one seed: results of this run, and which are within sampling noise."""
    beyond = [gap for gap in gaps if not within_sampling_noise(gap)]
    higher = [gap for gap in beyond if gap.difference.mean > 0]
    lower = [gap for gap in beyond if gap.difference.mean < 0]
    near = [gap for gap in gaps if gap not in higher and gap not in lower]
    than = "in gold than the reward model kept fixed"
    verdicts = [
        f"{_named_gaps(arms)} ended {word} {than}{_kl_clause(arms)}"
        for word, arms in (("higher", higher), ("lower", lower))
        if arms
    ]
    if near:
        verdicts.append(f"{_named_gaps(near)} ended level with it, within the sampling noise")
    if not higher:
        verdicts.insert(0, f"no arm ended higher {than}{_kl_clause(gaps)}")
    return f"In this one run (one seed), {'; '.join(verdicts)}."


def within_sampling_noise(gap: GoldGap) -> bool:
    """Whether the difference is within the sampling error of the responses."""
    noise = gap.sampling_half_width or 0.0
    return abs(gap.difference.mean) <= noise


def _kl_clause(gaps: list[GoldGap]) -> str:
    """Say for which arms KL is matched."""
    if all(gap.matched for gap in gaps):
        return " at matched KL"
    if any(gap.matched is None for gap in gaps):
        return " (KL not measured for all of them)"
    unmatched = [arm_short(gap.method) for gap in gaps if gap.matched is False]
    return f" (but the KL was not matched: {listing(unmatched)})"


def _gap_sentence(gap: GoldGap) -> str:
    text = (
        f"{arm_name(gap.method)}: gold {fixed_point(gap.gold)} against "
        f"{fixed_point(gap.reference_gold)} after round {gap.round}, a difference of "
        f"{fixed_point(gap.difference.mean, sign=True)} ({uncertainty(gap)})"
    )
    if gap.kl is None or gap.reference_kl is None:
        return f"{text}; KL not measured."
    kls = f"KL {fixed_point(gap.kl)} against {fixed_point(gap.reference_kl)}"
    return f"{text}; {kls}{'' if gap.matched else ', which is not matched'}."


def uncertainty(gap: GoldGap) -> str:
    """Return the interval over the seeds; for one seed the sampling error, labelled so."""
    difference = gap.difference
    if difference.half_width is not None:
        verdict = "excludes zero" if difference.excludes_zero else "includes zero: no clear answer"
        return (
            f"95 % interval over {difference.count} seeds "
            f"{fixed_point(difference.low, sign=True)} to "
            f"{fixed_point(difference.high, sign=True)}, {verdict}"
        )
    if gap.sampling_half_width is None:
        return "one seed, no interval"
    return (
        f"one seed, no interval; sampling error alone ±{fixed_point(gap.sampling_half_width)}"
        + (", so within the noise of one run" if within_sampling_noise(gap) else "")
    )


def _against_retraining(m: Measurements) -> list[str]:
    """Compare MetaRM with the same training without the meta step."""
    sentences = []
    for arm in (arm for arm in m.policy_arms() if is_metarm(arm)):
        gap = gold_gap(m, arm, RETRAINED)
        if gap is not None:
            sentences.append(
                f"{arm_name(arm)} against plain retraining on the same pairs: "
                f"{fixed_point(gap.difference.mean, sign=True)} ({uncertainty(gap)})"
                f"{'' if gap.matched is not False else '; KL not matched'}."
            )
    return sentences


def kl_warnings(m: Measurements) -> list[str]:
    """Return one sentence if the KLs of a round's arms differ by more than 25 %."""
    apart = [spread for spread in kl_spreads(m) if not spread.matched]
    if not apart:
        return []
    worst = max(apart, key=lambda spread: spread.gap)
    return [
        f"The KL did not match in {rounds_text([spread.round for spread in apart])}: "
        f"{_kl_range(worst)}. A policy that moved further can gain or lose gold by that alone, so "
        "read gold beside KL there."
    ]


def _kl_range(spread: KlSpread) -> str:
    size = "" if math.isinf(spread.gap) else f", {100 * spread.gap:.0f} % apart"
    return (
        f"in round {spread.round} it ran from {fixed_point(spread.lowest_kl)} "
        f"({arm_name(spread.lowest)}) to {fixed_point(spread.highest_kl)} "
        f"({arm_name(spread.highest)}){size}"
    )


def kl_verdict(m: Measurements) -> str:
    """Say in one sentence whether the KLs matched."""
    spreads = kl_spreads(m)
    if not spreads:
        return "Whether the KL matched was not measured."
    warnings = kl_warnings(m)
    if warnings:
        return warnings[0]
    worst = max(spreads, key=lambda spread: spread.gap)
    size = f"at most {100 * worst.gap:.0f} % apart, in round {worst.round}"
    return f"The KL matched within 25 % in every round ({size})."


def blindness(m: Measurements, arm: str = FIXED) -> list[str]:
    """Say whether the fixed reward model went blind between its first and last round."""
    sentences = []
    rounds = m.rounds(arm)
    change = _first_last(m, arm, rounds, "accuracy_policy")
    spread = _first_last(m, arm, rounds, "relative_difference_variance")
    if change is None and spread is None:
        return ["Whether the reward model kept fixed went blind was not measured."]
    fell = spread_fell = None
    if change is not None:
        first, last, noise, last_round = change
        fell = first - last > noise
        word = "fell" if fell else ("rose" if last - first > noise else "hardly moved,")
        sentences.append(
            f"The accuracy of the reward model kept fixed on pairs of the policy's own responses "
            f"{word} from {fixed_point(first, 3)} before the first round to "
            f"{fixed_point(last, 3)} after round {last_round} (0.5 is a coin)."
        )
    if spread is not None:
        first, last, _, last_round = spread
        spread_fell = last < 0.5 * first
        sentences.append(
            "The variance of its reward differences, relative to SFT samples, went from "
            f"{fixed_point(first)} to {fixed_point(last)}"
            + (f" ({100 * last / first:.0f} % of what it was)." if first > 0 else ".")
        )
    sentences.append(_blindness_verdict(fell, spread_fell))
    return sentences


def _first_last(
    m: Measurements, arm: str, rounds: list[int], metric: str
) -> tuple[float, float, float, int] | None:
    """Return (before the first round, after the last, noise of an accuracy, last round)."""
    befores = [r for r in rounds if m.final("evaluate", arm, r, f"{metric}_before")]
    afters = [r for r in rounds if m.final("evaluate", arm, r, f"{metric}_after")]
    if not befores or not afters:
        return None
    first = m.estimate("evaluate", arm, befores[0], f"{metric}_before")
    last = m.estimate("evaluate", arm, afters[-1], f"{metric}_after")
    assert first is not None
    assert last is not None
    noise = math.inf
    if metric == "accuracy_policy":
        noise = accuracy_noise(
            first.mean,
            last.mean,
            m.sample_size("evaluate", arm, befores[0], f"{metric}_before"),
            m.sample_size("evaluate", arm, afters[-1], f"{metric}_after"),
        )
    return first.mean, last.mean, noise, afters[-1]


def _blindness_verdict(fell: bool | None, spread_fell: bool | None) -> str:
    if fell and spread_fell:
        return "So it did go blind: it tells the policy's responses apart less, and less rightly."
    if fell:
        return "So it ranks the policy's responses worse than it ranked those of SFT."
    if spread_fell and fell is False:
        return (
            "So its rewards drew together, but it ranks the responses about as well as before: "
            "quieter rather than blind."
        )
    if spread_fell:
        return "So its rewards drew together; whether it ranks worse was not measured."
    if fell is False:
        return "So in these numbers it did not go blind."
    return "Its rewards did not draw together by half; whether it ranks worse was not measured."


def terminal_summary(records: Iterable[Record]) -> str:
    """Return a compact table and a few sentences as plain text.

    Names of arms are not escaped, so print it with `markup=False`.
    """
    m = Measurements(records)
    lines = [*_terminal_table(m), ""]
    head = headline(m)
    lines.append(head.title)
    lines += [head.warnings[0]] if head.warnings and len(m.seeds) < 2 else []
    lines.append(kl_verdict(m))
    lines.append(" ".join(blindness(m)[-1:]))
    lines += flags(m)[:2]
    return "\n".join(lines)


def _terminal_table(m: Measurements) -> list[str]:
    header = ("arm", "round", "gold", "KL", "win/tie/lose", "acc. before", "after", "rel. var.")
    rows: list[tuple[str, ...]] = [header]
    metrics = (
        "gold_mean",
        "kl",
        "accuracy_policy_before",
        "accuracy_policy_after",
        "relative_difference_variance_after",
    )
    for arm in m.methods():
        rounds = m.rounds(arm)
        if not rounds:
            continue
        cells = [measured(m, arm, rounds[-1], name) for name in metrics]
        cells.insert(2, triple(m, "evaluate", arm, rounds[-1:], SFT).replace(" / ", "/"))
        shown = ("-" if cell == NOT_MEASURED else cell.partition(" ")[0] for cell in cells)
        rows.append((arm_short(arm)[:24], str(rounds[-1]), *shown))
    return text_table(rows)
