"""Captions (one sentence from the picture's numbers) and alt texts of the pictures."""

from __future__ import annotations

import statistics

from shiftrm.report.analysis import kl_below_zero, kl_spreads, normalised_differences
from shiftrm.report.arms import DPO, FIXED, RETRAINED, SFT, arm_name, arm_short, is_metarm
from shiftrm.report.measurements import Measurements
from shiftrm.report.tables import fixed_point
from shiftrm.report.wording import listing

MISSING = "Not measured: the records hold no numbers for this picture."


def variance_caption(m: Measurements) -> str:
    """Return the caption: variance at start and end of `fixed`, medians of both distributions."""
    rounds = m.rounds(FIXED, "ppo", "difference_variance")
    parts = []
    if rounds:
        start = _curve_mean(m, rounds[0], first=True)
        end = _curve_mean(m, rounds[-1], first=False)
        verb = "falls" if end < start else "rises"
        change = f", to {100 * end / start:.0f} % of its start" if start > 0 else ""
        parts.append(
            f"the variance of the reward differences {verb} from {fixed_point(start, 3)} (mean of "
            f"the first tenth of the steps of round {rounds[0]}) to {fixed_point(end, 3)} (last "
            f"tenth of round {rounds[-1]}){change}"
        )
    last = m.last_round(FIXED, "difference_values_after")
    if last is not None:
        medians = [
            _median(m, FIXED, last, f"difference_values_{when}") for when in ("sft", "after")
        ]
        if None not in medians:
            sft, after = (value for value in medians if value is not None)
            parts.append(
                f"the median difference is {fixed_point(sft)} on SFT samples and "
                f"{fixed_point(after)} on the policy's after round {last}"
            )
    return _sentence("Under the reward model kept fixed ", parts)


def _curve_mean(m: Measurements, round_: int, *, first: bool) -> float:
    """Return the mean over the first or last tenth of a round's steps and over the seeds."""
    means = []
    for points in m.curve("ppo", FIXED, round_, "difference_variance").values():
        values = [value for _, value in points]
        count = max(1, len(values) // 10)
        means.append(statistics.fmean(values[:count] if first else values[-count:]))
    return statistics.fmean(means)


def _median(m: Measurements, method: str, round_: int, metric: str) -> float | None:
    pooled = [v for values in m.values("evaluate", method, round_, metric).values() for v in values]
    return statistics.median(pooled) if pooled else None


def _sentence(start: str, parts: list[str]) -> str:
    return f"{start}{'; '.join(parts)}." if parts else MISSING


def accuracy_curve_caption(m: Measurements) -> str:
    """Return the caption: final held-out accuracy of each training."""
    parts = []
    vanilla = m.estimate("reward_model", SFT, 0, "eval_accuracy_final") or m.sft("accuracy_heldout")
    if vanilla is not None:
        parts.append(f"vanilla training ends at {fixed_point(vanilla.mean, 3)}")
    for arm in [arm for arm in m.policy_arms() if is_metarm(arm)]:
        rounds = m.rounds(arm, "reward_model", "eval_accuracy")
        ends = [
            m.estimate("reward_model", arm, r, "eval_accuracy_final")
            or m.estimate("evaluate", arm, r, "accuracy_heldout")
            for r in rounds
        ]
        if rounds and all(end is not None for end in ends):
            numbers = ", ".join(fixed_point(end.mean, 3) for end in ends if end is not None)
            parts.append(f"{arm_name(arm)} deploys {numbers} (rounds in order)")
    if not parts:
        return MISSING
    return (
        f"{_sentence('On the original held-out pairs ', parts)} Lines: while training; diamonds: "
        "the parameters that were deployed."
    )


def normalised_caption(m: Measurements) -> str:
    """Return the caption: medians of the differences, and how they were normalised."""
    parts = []
    for arm in m.policy_arms():
        last = m.last_round(arm, "difference_values_before")
        if last is None or not (arm == RETRAINED or is_metarm(arm)):
            continue
        values = normalised_differences(m, arm, last)
        if values:
            median = fixed_point(statistics.median(values))
            parts.append(f"{median} for {arm_name(arm)} (round {last})")
    if not parts:
        return MISSING
    return (
        f"Median of the normalised differences before PPO: {'; '.join(parts)}. Each |r_i - r_j| on "
        "the policy's samples is divided by the largest difference the same reward model gives on "
        "SFT and policy samples together; that maximum is one extreme value, so a longer tail "
        "alone can move a whole curve to the left."
    )


def kl_caption(m: Measurements) -> str:
    """Return the caption: the arm with the highest gold after the last round, and its KL."""
    spreads = kl_spreads(m)
    rounds = m.all_rounds()
    found = {}
    for arm in m.policy_arms():
        gold = m.estimate("evaluate", arm, rounds[-1], "gold_mean") if rounds else None
        if gold is not None:
            found[arm] = gold.mean
    if not found:
        return MISSING
    order = sorted(found, key=lambda arm: -found[arm])
    best, worst = order[0], order[-1]
    text = f"After round {rounds[-1]} gold is highest for {arm_name(best)}"
    text += f" ({fixed_point(found[best])})"
    if worst != best:
        text += f" and lowest for {arm_name(worst)} ({fixed_point(found[worst])})"
    if spreads and spreads[-1].round == rounds[-1]:
        low, high = spreads[-1].lowest_kl, spreads[-1].highest_kl
        kls = fixed_point(low), fixed_point(high)
        text += f", at KL {kls[0]}" if kls[0] == kls[1] else f", at KLs from {' to '.join(kls)}"
    falling = _gold_falls(m)
    if falling:
        text += f"; gold ends below its best round for {listing(falling)}"
    text += (
        ". Large markers: ends of rounds, numbered; dots: averages of a few PPO steps. Each "
        "arm's proxy is its own reward model's, so compare its course, not its height."
    )
    return f"{text} {kl_below_zero(m)}".strip()


def _gold_falls(m: Measurements) -> list[str]:
    """Return the arms whose last round is not their best in gold (means over the seeds)."""
    falling = []
    for arm in m.policy_arms():
        found = [
            m.estimate("evaluate", arm, r, "gold_mean")
            for r in m.rounds(arm, "evaluate", "gold_mean")
        ]
        golds = [gold.mean for gold in found if gold is not None]
        if golds and golds[-1] < max(golds):
            falling.append(arm_short(arm))
    return falling


def policy_accuracy_caption(m: Measurements) -> str:
    """Return the caption: accuracy of the best and worst arm after the last PPO."""
    found = {}
    for arm in m.policy_arms():
        rounds = m.rounds(arm, "evaluate", "accuracy_policy_after")
        value = m.estimate("evaluate", arm, rounds[-1], "accuracy_policy_after") if rounds else None
        if value is not None:
            found[arm] = (value.mean, rounds[-1])
    if not found:
        return MISSING
    texts = {arm: fixed_point(value, 3) for arm, (value, _) in found.items()}
    best = max(found, key=lambda arm: found[arm][0])
    worst = min(found, key=lambda arm: found[arm][0])
    if texts[best] == texts[worst]:
        span = f"it is {texts[best]} for {'every arm' if len(found) > 1 else arm_name(best)}"
    else:
        span = (
            f"it runs from {texts[best]} for {arm_name(best)} down to {texts[worst]} for "
            f"{arm_name(worst)}"
        )
    return (
        f"After PPO, in the last round, {span}; the dotted line is a coin. What an adaptation gave "
        "is the step from a round's point in the second picture to the next round's in the first."
    )


def win_caption(m: Measurements) -> str:
    """Return the caption: the round in which each arm won most often against SFT."""
    best: dict[str, int] = {}
    for arm in m.policy_arms():
        wins = {}
        for round_ in m.rounds(arm, "evaluate", "win_vs_sft"):
            share = m.estimate("evaluate", arm, round_, "win_vs_sft")
            if share is not None:
                wins[round_] = share.mean
        if len(wins) > 1:
            best[arm] = max(wins, key=lambda r: wins[r])
    if len(best) > 1 and len(set(best.values())) == 1:
        return f"Every arm wins most often in round {next(iter(best.values()))}."
    parts = [f"{arm_short(arm)} in round {round_}" for arm, round_ in best.items()]
    return f"Wins most often: {'; '.join(parts)}." if parts else ""


def alt(what: str, caption: str) -> str:
    """Return the alternative text: the kind of picture, then its caption."""
    return f"{what}. {caption}"


def arms_compared(m: Measurements) -> str:
    """Describe which arms the records hold."""
    names = [arm_name(arm) for arm in m.methods() if arm not in (SFT, DPO)]
    rounds, seeds = m.all_rounds(), len(m.seeds)
    if not names:
        return "The records hold no arm of the loop."
    count = f"{len(rounds)} round{'' if len(rounds) == 1 else 's'}"
    extra = ", beside DPO" if DPO in m.methods() else ""
    return (
        f"{len(names)} arm{'' if len(names) == 1 else 's'}{extra}, {count}, "
        f"{seeds} seed{'' if seeds == 1 else 's'}."
    )
