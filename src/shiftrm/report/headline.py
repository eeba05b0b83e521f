"""The result in words: a title, a sentence for each comparison, and how far the policies moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shiftrm.report.analysis import (
    KL_TOLERANCE,
    GoldGap,
    gold_gap,
    gold_gaps,
    kl_spreads,
    relative_gap,
)
from shiftrm.report.results import Results
from shiftrm.report.tables import fixed_point
from shiftrm.report.warnings import kl_warnings
from shiftrm.report.win_tables import Contest, contest
from shiftrm.report.wording import listing

NOTHING_TO_COMPARE = (
    "Not measured: the records hold no gold result of a reward model kept fixed and of another "
    "arm in the same round."
)
NO_JUDGE = (
    "There was no judge (judge.kind is none), so which arm answers better than SFT was not measured"
)
NO_VERDICT = (
    "None of the judge's verdicts could be read, so which arm answers better than SFT was not "
    "measured"
)
STILL = 0.05  # nats per response; below, a policy counts as SFT


@dataclass(frozen=True)
class Headline:
    """Main result in one line, and a sentence for each comparison by gold and by the judge."""

    title: str
    by_gold: tuple[str, ...]
    by_judge: tuple[str, ...]


def headline(m: Results) -> Headline:
    """Say which arms did better than the fixed reward model in gold, or than SFT by the judge.

    The title is about gold where gold is the truth, and about the judge otherwise.
    """
    gaps = gold_gaps(m)
    contests = [found for arm in m.trained if (found := _against_sft(m, arm)) is not None]
    steered = [gap for gap in gaps if gap.method in m.with_rewards]
    if m.gold_is_true and steered:
        title = _gold_title(m, steered)
    elif contests:
        title = _win_title(m, contests)
    elif m.gold_is_true:
        title = NOTHING_TO_COMPARE
    else:
        tail = "; see below what the second reward model says" if gaps else ""
        title = f"{why_no_wins(m)}{tail}."
    by_gold = [_gap_sentence(m, gap) for gap in gaps] + _against_retraining(m)
    compared = [gap for gap in gaps if not m.arms[gap.method].is_gold]
    if len(m.seeds) > 1 and len(compared) > 1:
        by_gold.append(
            f"{len(compared)} arms are compared with the same baseline and the intervals are not "
            "corrected for that."
        )
    by_judge = [_contest_sentence(m, found) for found in contests] + _against_vanilla(m)
    return Headline(title, tuple(by_gold), tuple(by_judge))


# -- gold --------------------------------------------------------------------------------------


def _gold_title(m: Results, gaps: list[GoldGap]) -> str:
    """Say which arms ended higher or lower.

    Over several seeds a difference counts if its interval excludes zero; in one seed, if it is
    larger than the sampling error of the responses.
    """
    seeds = max(gap.difference.count for gap in gaps)
    several = seeds > 1
    clear = [g for g in gaps if (g.difference.excludes_zero if several else not g.within_noise)]
    higher = [gap for gap in clear if gap.difference.mean > 0]
    lower = [gap for gap in clear if gap.difference.mean < 0]
    near = [gap for gap in gaps if gap not in higher and gap not in lower]
    ended = "ended clearly" if several else "ended"
    than = "in gold than the reward model kept fixed"
    verdicts = [
        f"{_named_gaps(m, arms)} {ended} {word} {than}{_kl_clause(m, arms)}"
        for word, arms in (("higher", higher), ("lower", lower))
        if arms
    ]
    if not higher:
        verdicts.insert(0, f"no arm {ended} higher {than}{_kl_clause(m, gaps)}")
    if near and several and higher:
        verdicts.append(f"no clear answer for {_named_gaps(m, near)}")
    elif near and not several:
        level = "ended level with it, within the sampling noise"
        verdicts.append(f"{_named_gaps(m, near)} {level}")
    start = f"Over {seeds} seeds" if several else "In this one run (one seed)"
    return f"{start}, {'; '.join(verdicts)}."


def _named_gaps(m: Results, gaps: list[GoldGap]) -> str:
    """Return names with their differences; short names if there are many."""
    name = m.name if len(gaps) <= 2 else m.short
    return listing(
        [f"{name(g.method)} ({fixed_point(g.difference.mean, sign=True)})" for g in gaps]
    )


def _kl_clause(m: Results, gaps: list[GoldGap]) -> str:
    """Say for which arms KL is matched."""
    if all(gap.matched for gap in gaps):
        return " at matched KL"
    if any(gap.matched is None for gap in gaps):
        return " (KL not measured for all of them)"
    unmatched = [m.short(gap.method) for gap in gaps if gap.matched is False]
    return f" (but the KL was not matched: {listing(unmatched)})"


def _gap_sentence(m: Results, gap: GoldGap) -> str:
    judge = "" if m.gold_is_true else "By the second reward model (gold), "
    text = (
        f"{judge}{m.name(gap.method)}: gold {fixed_point(gap.gold)} against "
        f"{fixed_point(gap.reference_gold)} for {m.name(gap.reference)} after round {gap.round}, a "
        f"difference of {fixed_point(gap.difference.mean, sign=True)} ({_uncertainty(gap)})"
    )
    if gap.kl is None or gap.reference_kl is None:
        return f"{text}; KL not measured."
    still = max(gap.kl, gap.reference_kl) < STILL
    kls = f"KL {fixed_point(gap.kl)} against {fixed_point(gap.reference_kl)}"
    return f"{text}; {kls}{'' if gap.matched or still else ', which is not matched'}."


def _uncertainty(gap: GoldGap) -> str:
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
        + (", so within the noise of one run" if gap.within_noise else "")
    )


def _against_retraining(m: Results) -> list[str]:
    """Compare arms that learn more than the pairs, without labels, with training on the pairs."""
    sentences = []
    plain = m.retrained
    others = [a for a in m.with_rewards if m.arms[a].trains and not m.arms[a].buys_labels]
    for arm in others if plain else ():
        if arm == plain:
            continue
        gap = gold_gap(m, arm, plain or "")
        if gap is not None:
            sentences.append(
                f"{m.name(arm)} against plain retraining on the same pairs: "
                f"{fixed_point(gap.difference.mean, sign=True)} ({_uncertainty(gap)})"
                f"{'' if gap.matched is not False else '; KL not matched'}."
            )
    return sentences


# -- the judge ---------------------------------------------------------------------------------


def why_no_wins(m: Results) -> str:
    """Say why there are no win rates: no judge, or no readable verdict."""
    return NO_VERDICT if m.has("unjudged_vs_sft") else NO_JUDGE


def _last_judged(m: Results, arm: str) -> Contest | None:
    return contest(m, "evaluate", arm, m.rounds(arm, "evaluate", "win_vs_sft")[-1:])


def _against_sft(m: Results, arm: str) -> Contest | None:
    """Return the best round, judged on other prompts than chosen on, or else the last round."""
    return contest(m, "compare", arm, m.rounds(arm, "compare")) or _last_judged(m, arm)


def _win_title(m: Results, ends: Sequence[Contest]) -> str:
    def names(found: list[Contest]) -> str:
        return listing([f"{m.name(e.method)} ({e.shares} %)" for e in found])

    better = [e for e in ends if e.clear and e.net > 0]
    worse = [e for e in ends if e.clear and e.net < 0]
    unclear = [e for e in ends if not e.clear]
    parts = [f"clearly more wins than losses for {names(better) if better else 'no arm'}"]
    parts += [f"clearly fewer for {names(worse)}"] if worse else []
    parts += [f"no clear answer for {names(unclear)}"] if unclear else []
    seeds = max(e.seeds for e in ends)  # a seed may lack a judge
    start = f"Over {seeds} seeds" if seeds > 1 else "In one run (one seed)"
    return f"{start}, against SFT (win / tie / lose): {'; '.join(parts)}."


def _contest_sentence(m: Results, found: Contest) -> str:
    judged = "" if found.n is None else f", {found.n} judged prompts"
    compared = bool(m.rounds(found.method, "compare"))
    which = "round " + ", ".join(str(r) for r in found.rounds)
    if compared and len(m.rounds(found.method)) > 1:
        which = f"its best round ({which}), chosen on other prompts"
    if compared:
        judged += " (the second half, on which no round was chosen; by round, all are counted)"
    text = f"{m.name(found.method)} against SFT in {which}: {found.shares} %{judged}"
    last = _last_judged(m, found.method)
    if compared and last is not None and last.rounds != found.rounds:
        text += f"; in its last round ({last.rounds[0]}): {last.shares} %"
    return f"{text}. {_clarity(found)}"


def _clarity(found: Contest) -> str:
    if not found.clear:
        return "Wins and losses do not differ clearly."
    over = "the seeds" if found.seeds > 1 else "the prompts, not over seeds"
    return f"{'More' if found.net > 0 else 'Fewer'} wins than losses, clear over {over}."


def _against_vanilla(m: Results) -> list[str]:
    """Compare the best rounds of the other arms with the fixed reward model's."""
    texts = []
    for arm in m.trained if m.vanilla else ():
        found = contest(m, "compare", arm, m.rounds(arm, "compare"), m.vanilla or "")
        if arm != m.vanilla and found is not None:
            texts.append(
                f"{m.name(arm)} against {m.name(found.opponent)}, best rounds: {found.shares} %. "
                f"{_clarity(found)}"
            )
    return texts


# -- KL ----------------------------------------------------------------------------------------


def kl_sentences(m: Results) -> list[str]:
    """Describe each arm's final KL, and whether the KLs are comparable."""
    found = {arm: last[1].mean for arm in m.trained if (last := m.last(arm, "kl")) is not None}
    if not found:
        return ["How far the policies moved from SFT (KL) was not measured."]
    said = listing([f"{m.short(arm)} {fixed_point(kl)}" for arm, kl in found.items()])
    texts = [f"KL to SFT after the last round: {said}."]
    if max(found.values()) < STILL:
        return [*texts, "Hardly any policy moved, so these rounds cannot show much."]
    spreads, apart = kl_spreads(m), kl_warnings(m)
    if spreads and not apart:
        worst = max(spreads, key=lambda spread: spread.gap)
        texts.append(
            "The KL of the arms with reward models matched within 25 % in every round (at most "
            f"{100 * worst.gap:.0f} % apart, in round {worst.round})."
        )
    texts += apart
    others = [kl for arm, kl in found.items() if not m.arms[arm].is_gold]
    if not apart and len(others) > 1 and relative_gap(others) > KL_TOLERANCE:
        texts.append(
            f"The last KLs of all arms are not matched (more than {100 * KL_TOLERANCE:.0f} % "
            "apart): a policy that moved further may win or lose by that alone."
        )
    return texts
