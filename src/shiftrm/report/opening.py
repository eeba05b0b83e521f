"""What a page opens with: one sentence and one picture that need no knowledge of the field."""

from __future__ import annotations

import math

from shiftrm.report.analysis import GoldGap, gold_gaps
from shiftrm.report.figures import by_round_figure
from shiftrm.report.headline import Headline
from shiftrm.report.pictures import Picture, image_of
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import fixed_point

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_GOLD = "gold_mean"


def opening_sentence(m: Results, head: Headline) -> str:
    """Say what the policies are worth in the end, by the true reward.

    Where the true reward is not known or no arm keeps its reward model, this is the headline.
    """
    gaps = _last_gaps(m)
    if not gaps:
        return head.title
    best = max(gaps, key=lambda gap: gap.difference.mean)
    seeds = best.difference.count
    rounds = f"{_word(best.round)} round{'' if best.round == 1 else 's'}"
    start = f"After {rounds}{_distance(gaps)}, "
    others = f"{_word(len(gaps))} other method{'' if len(gaps) == 1 else 's'}"
    ceiling = None if m.ceiling is None else m.mean(m.ceiling, best.round, _GOLD)
    fixed = _short(best.reference_gold)
    runs = "in this one run" if seeds == 1 else f"over {seeds} seeds"
    if not best.clear or best.difference.mean <= 0:
        least = min(gaps, key=lambda gap: gap.gold).gold
        text = (
            f"{start}no method earns the policy clearly more true reward than the reward model "
            f"kept fixed ({fixed}): {others} ended at {_span(least, best.gold)}"
        )
        trained = "" if ceiling is None else f"; the true reward itself gave {_short(ceiling)}"
        return f"{text}, {runs}{trained}."
    chosen = f"the best of {others}" if len(gaps) > 1 else "the other method"
    text = (
        f"{start}the policy earns a true reward of {fixed} with the reward model kept fixed, "
        f"{_short(best.gold)} with {chosen} ({m.name(best.method)})"
    )
    if ceiling is None or ceiling <= best.reference_gold:
        return f"{text}, {runs}."
    share = 100 * best.difference.mean / (ceiling - best.reference_gold)
    return (
        f"{text} and {_short(ceiling)} with the true reward itself: {runs} that method closed "
        f"{share:.0f} % of the gap."
    )


def _last_gaps(m: Results) -> list[GoldGap]:
    """Return the arms with reward models against the fixed one, after the last round of all."""
    if not m.gold_is_true:
        return []
    gaps = [gap for gap in gold_gaps(m) if gap.method in m.with_rewards]
    return [gap for gap in gaps if gap.round == max(other.round for other in gaps)]


def _distance(gaps: list[GoldGap]) -> str:
    """Say how far the policies are from SFT; nothing if that was not measured."""
    kls = [kl for gap in gaps for kl in (gap.kl, gap.reference_kl) if kl is not None]
    if len(kls) < 2 * len(gaps):
        return ""
    mean = sum(kls) / len(kls)
    if all(gap.matched for gap in gaps):
        return f", equally far from the start (KL {mean:.0f})"
    return f", not equally far from the start (KL {min(kls):.0f} to {max(kls):.0f})"


def _word(count: int) -> str:
    return _WORDS[count] if count < len(_WORDS) else str(count)


def _short(value: float) -> str:
    return fixed_point(value, 1)


def _span(low: float, high: float) -> str:
    ends = _short(low), _short(high)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def opening_picture(m: Results) -> Picture | None:
    """Return true reward by round of all arms with rounds; None where the sentence is not of it."""
    gaps = _last_gaps(m)
    if not gaps:
        return None
    arms = [*m.with_rewards, *([m.ceiling] if m.ceiling else [])]
    title = "True reward of the policy's answers after every round"
    figure = by_round_figure(
        m,
        _GOLD,
        arms,
        ("true reward (gold)", title),
        start=m.mean(SFT, 0, _GOLD),
        bars=lambda arm, round_: _bounds(m, arm, round_),
    )
    caption = "Higher is better. Round 0: the policy that all arms start from."
    if m.ceiling is not None:
        kl = m.mean(m.ceiling, gaps[0].round, "kl")
        at = "" if kl is None else f", at KL {kl:.0f}"
        caption += (
            f" {m.short(m.ceiling)}: the policy trained on the true reward itself{at}; it shows "
            "how much there is to gain."
        )
    several = len(m.seeds) > 1
    caption += (
        " Bars: 95 % intervals over the seeds."
        if several
        else " Bars: the sampling error of the answers; another seed differs by more."
    )
    return Picture(title, (image_of(figure, title, caption),), caption)


def _bounds(m: Results, arm: str, round_: int) -> tuple[float, float] | None:
    """Return the 95 % interval over the seeds, or of one seed over its answers."""
    found = m.estimate("evaluate", arm, round_, _GOLD)
    if found is None or found.half_width is not None:
        return None if found is None else (found.low, found.high)
    deviation, size = (
        m.mean(arm, round_, "gold_std"),
        m.sample_size("evaluate", arm, round_, _GOLD),
    )
    if not deviation or not size:
        return None
    error = 1.96 * deviation / math.sqrt(size)
    return found.mean - error, found.mean + error
