"""Sentences of a recipe's page, generated from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiftrm.core.intervals import LEVEL, sign_test
from shiftrm.report import narrative
from shiftrm.report.analysis import KL_TOLERANCE, gold_gap, relative_gap
from shiftrm.report.arms import SFT
from shiftrm.report.measurements import Measurements, estimate
from shiftrm.report.narrative import Headline
from shiftrm.report.recipe_arms import Arms
from shiftrm.report.recipe_warnings import warnings
from shiftrm.report.tables import fixed_point, shares
from shiftrm.report.wording import listing

NO_JUDGE = (
    "No judge was there (judge.kind is none), so which arm answers better than SFT was not measured"
)
NO_VERDICT = (
    "Not one verdict of the judge could be read, so which arm answers better than SFT was not "
    "measured"
)
STILL = 0.05  # nats per response; below, a policy counts as SFT


@dataclass(frozen=True)
class Contest:
    """One arm against another: mean shares over seeds, and whether the result is clear.

    Attributes:
        net: wins minus losses.
        clear: whether a sign test over the prompts is significant at 5 % and, for several seeds,
            the 95 % t-interval of `net` excludes zero.
        seeds: number of seeds.
        n: number of judged prompts of all seeds.
    """

    method: str
    opponent: str
    rounds: tuple[int, ...]
    win: float
    tie: float
    lose: float
    net: float
    clear: bool
    seeds: int
    n: int | None

    @property
    def numbers(self) -> str:
        """Format the shares as `64 / 31 / 5 %`."""
        return f"{' / '.join(f'{100 * share:.0f}' for share in (self.win, self.tie, self.lose))} %"


def contest(
    m: Measurements, stage: str, method: str, rounds: Sequence[int], opponent: str = SFT
) -> Contest | None:
    """Return the contest over the given rounds (one per seed); None if not judged."""
    found = shares(m, stage, method, rounds, opponent)
    if found is None:
        return None
    nets: dict[int, float] = {}
    size: int | None = 0
    for round_ in rounds:
        wins = m.final(stage, method, round_, f"win_vs_{opponent}")
        loses = m.final(stage, method, round_, f"lose_vs_{opponent}")
        nets |= {seed: wins[seed] - loses[seed] for seed in wins.keys() & loses.keys()}
        counted = m.sample_size(stage, method, round_, f"win_vs_{opponent}")
        if wins:
            size = None if size is None or counted is None else size + counted
    net = estimate(nets)
    win, tie, lose = (found[outcome].mean for outcome in ("win", "tie", "lose"))
    clear = size is not None and sign_test(round(win * size), round(lose * size)) < LEVEL
    if net is not None and net.half_width is not None:
        clear = net.excludes_zero and (clear or not size)
    played = tuple(r for r in rounds if m.final(stage, method, r, f"win_vs_{opponent}"))
    return Contest(
        method,
        opponent,
        played,
        win=win,
        tie=tie,
        lose=lose,
        net=win - lose,
        clear=clear,
        seeds=len(nets),
        n=size or None,
    )


def headline(m: Measurements, arms: Arms, config: Mapping[str, Any] | None = None) -> Headline:
    """Say which arms win against SFT and against the fixed reward model."""
    ends = [found for arm in arms.trained if (found := _against_sft(m, arm)) is not None]
    sentences = [_contest_sentence(m, arms, found) for found in ends]
    sentences += _against_vanilla(m, arms) + _gold(m, arms)
    title = _title(m, arms, ends)
    return Headline(title, tuple(sentences), tuple(warnings(m, arms, config)))


def why_no_wins(m: Measurements, arms: Arms) -> str:
    """Say why there are no win rates: no judge, or no readable verdict."""
    if any(m.rounds(arm, "evaluate", "unjudged_vs_sft") for arm in arms.trained):
        return NO_VERDICT
    return NO_JUDGE


def _against_sft(m: Measurements, arm: str) -> Contest | None:
    """Return the best round, judged on other prompts than chosen on, or else the last round."""
    compared = contest(m, "compare", arm, m.rounds(arm, "compare"))
    if compared is not None:
        return compared
    return contest(m, "evaluate", arm, m.rounds(arm, "evaluate", "win_vs_sft")[-1:])


def _title(m: Measurements, arms: Arms, ends: list[Contest]) -> str:
    if not ends:
        tail = "; see below what the second reward model says" if _gold(m, arms) else ""
        return f"{why_no_wins(m, arms)}{tail}."

    def names(found: list[Contest]) -> str:
        return listing([f"{arms.name(e.method)} ({e.numbers})" for e in found])

    better = [e for e in ends if e.clear and e.net > 0]
    worse = [e for e in ends if e.clear and e.net < 0]
    unclear = [e for e in ends if not e.clear]
    parts = [f"clearly more wins than losses for {names(better) if better else 'no arm'}"]
    parts += [f"clearly fewer for {names(worse)}"] if worse else []
    parts += [f"no clear answer for {names(unclear)}"] if unclear else []
    seeds = max(e.seeds for e in ends)  # a seed may lack a judge
    start = f"Over {seeds} seeds" if seeds > 1 else "In one run (one seed)"
    return f"{start}, against SFT (win / tie / lose): {'; '.join(parts)}."


def _contest_sentence(m: Measurements, arms: Arms, found: Contest) -> str:
    judged = "" if found.n is None else f", {found.n} judged prompts"
    compared = bool(m.rounds(found.method, "compare"))
    which = "round " + ", ".join(str(r) for r in found.rounds)
    if compared and len(m.rounds(found.method)) > 1:
        which = f"its best round ({which}), chosen on other prompts"
    if compared:
        judged += " (the second half, on which no round was chosen; by round, all are counted)"
    text = f"{arms.name(found.method)} against SFT in {which}: {found.numbers}{judged}"
    last = contest(
        m, "evaluate", found.method, m.rounds(found.method, "evaluate", "win_vs_sft")[-1:]
    )
    if compared and last is not None and last.rounds != found.rounds:
        text += f"; in its last round ({last.rounds[0]}): {last.numbers}"
    return f"{text}. {_clarity(found)}"


def _clarity(found: Contest) -> str:
    if not found.clear:
        return "Wins and losses do not differ clearly."
    over = "the seeds" if found.seeds > 1 else "the prompts, not over seeds"
    return f"{'More' if found.net > 0 else 'Fewer'} wins than losses, clear over {over}."


def _against_vanilla(m: Measurements, arms: Arms) -> list[str]:
    """Compare the best rounds of MetaRM and retrained arms with the fixed reward model."""
    vanilla = arms.vanilla
    if vanilla is None:
        return []
    texts = []
    for arm in arms.trained:
        found = contest(m, "compare", arm, m.rounds(arm, "compare"), vanilla)
        if arm != vanilla and found is not None:
            texts.append(
                f"{arms.name(arm)} against {arms.name(vanilla)}, best rounds: {found.numbers}. "
                f"{_clarity(found)}"
            )
    return texts


def _gold(m: Measurements, arms: Arms) -> list[str]:
    """Describe gold, the second reward model's score, if there is one."""
    vanilla = arms.vanilla
    if vanilla is None:
        return []
    texts = []
    for arm in arms.trained:
        gap = gold_gap(m, arm, vanilla) if arm != vanilla else None
        if gap is not None:
            still = max(gap.kl or 0.0, gap.reference_kl or 0.0) < STILL
            matched = "" if gap.matched or still else "; KL not matched"
            texts.append(
                f"By the second reward model (gold), {arms.name(arm)} against "
                f"{arms.name(vanilla)} after round {gap.round}: {fixed_point(gap.gold)} against "
                f"{fixed_point(gap.reference_gold)}, "
                f"{fixed_point(gap.difference.mean, sign=True)} "
                f"({narrative.uncertainty(gap)}){matched}."
            )
    return texts


def blindness(m: Measurements, arms: Arms) -> list[str]:
    """Say whether the reward model went blind, from its differences relative to SFT."""
    vanilla = arms.vanilla
    texts = ["No arm keeps its reward model, so whether one goes blind was not measured."]
    if vanilla is not None:
        texts = [f"The reward model kept fixed is that of {arms.name(vanilla)}."]
        texts += narrative.blindness(m, vanilla)
        if not any(m.final("evaluate", vanilla, r, "gold_mean") for r in m.rounds(vanilla)):
            texts.append(
                "No second reward model was given (evaluation.gold), so nothing here says whether "
                "any arm's reward model ranks the policy's responses rightly."
            )
        else:
            texts.append("Rightly ranked means here: as the second reward model ranks.")
    metric = "relative_difference_variance_after"
    for arm in arms.with_reward_model:
        rounds = m.rounds(arm, "evaluate", metric)
        after = m.estimate("evaluate", arm, rounds[-1], metric) if rounds else None
        if arm != vanilla and after is not None:
            texts.append(
                f"Under {arms.name(arm)} that relative variance is {fixed_point(after.mean)} after "
                f"round {rounds[-1]}."
            )
    return texts


def kl_sentence(m: Measurements, arms: Arms) -> str:
    """Describe each arm's final KL, and whether the KLs are comparable."""
    found = {}
    for arm in arms.trained:
        rounds = m.rounds(arm, "evaluate", "kl")
        kl = m.estimate("evaluate", arm, rounds[-1], "kl") if rounds else None
        if kl is not None:
            found[arm] = kl.mean
    if not found:
        return "How far the policies moved from SFT (KL) was not measured."
    said = listing([f"{arms.name(arm)} {fixed_point(kl)}" for arm, kl in found.items()])
    text = f"KL to SFT after the last round: {said}."
    if max(found.values()) < STILL:
        return f"{text} Hardly any policy moved, so these rounds cannot show much."
    if len(found) > 1 and relative_gap(list(found.values())) > KL_TOLERANCE:
        text += (
            f" These are not matched (more than {100 * KL_TOLERANCE:.0f} % apart): a policy that "
            "moved further may win or lose by that alone."
        )
    return text
