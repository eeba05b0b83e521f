"""Win rates: of an arm against SFT and against other arms, as cells, contests and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shiftrm.core.intervals import LEVEL, sign_test
from shiftrm.metrics import metric as declared
from shiftrm.report.measurements import SeedEstimate, estimate
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import NOT_MEASURED, Table, number


@dataclass(frozen=True)
class Contest:
    """One arm against another: mean shares over seeds, and whether the result is clear.

    Attributes:
        rounds: the rounds that were judged, one for each seed.
        bounds: the 95 % interval of `win`, over seeds, or over prompts for one seed.
        clear: whether a sign test over the prompts is significant at 5 % and, for several seeds,
            the 95 % t-interval of wins minus losses excludes zero.
        seeds: number of seeds.
        n: number of judged prompts of all seeds.
    """

    method: str
    opponent: str
    rounds: tuple[int, ...]
    win: float
    tie: float
    lose: float
    bounds: tuple[float, float] | None
    clear: bool
    seeds: int
    n: int | None

    @property
    def net(self) -> float:
        """Wins minus losses."""
        return self.win - self.lose

    @property
    def shares(self) -> str:
        """Format the shares in per cent as `64 / 31 / 5`."""
        return " / ".join(f"{100 * share:.0f}" for share in (self.win, self.tie, self.lose))

    @property
    def with_bounds(self) -> str:
        """Format the shares with the interval of the wins if known: `64 / 31 / 5 [54, 73]`."""
        if self.bounds is None:
            return self.shares
        low, high = self.bounds
        return f"{self.shares} [{100 * low:.0f}, {100 * high:.0f}]"


def contest(
    m: Results, stage: str, method: str, rounds: Sequence[int], opponent: str = SFT
) -> Contest | None:
    """Return the contest over the given rounds (one per seed); None if not judged."""
    wins, ties, losses = (
        m.by_seed(stage, method, rounds, f"{outcome}_vs_{opponent}")
        for outcome in ("win", "tie", "lose")
    )
    win, tie, lose = estimate(wins), estimate(ties), estimate(losses)
    if win is None or tie is None or lose is None:
        return None
    played = tuple(r for r in rounds if m.final(stage, method, r, f"win_vs_{opponent}"))
    sizes = [m.sample_size(stage, method, r, f"win_vs_{opponent}") for r in played]
    size = None if None in sizes else sum(size or 0 for size in sizes)
    net = estimate({seed: wins[seed] - losses[seed] for seed in wins.keys() & losses.keys()})
    decided = (round(win.mean * (size or 0)), round(lose.mean * (size or 0)))
    clear = bool(size) and sign_test(*decided) < LEVEL
    if net is not None and net.half_width is not None:
        clear = net.excludes_zero and (clear or not size)
    return Contest(
        method,
        opponent,
        played,
        win=win.mean,
        tie=tie.mean,
        lose=lose.mean,
        bounds=_bounds(m, stage, method, rounds, opponent, win),
        clear=clear,
        seeds=net.count if net else 0,
        n=size or None,
    )


def _bounds(
    m: Results, stage: str, method: str, rounds: Sequence[int], opponent: str, win: SeedEstimate
) -> tuple[float, float] | None:
    if win.half_width is not None:
        return max(0.0, win.low), min(1.0, win.high)
    low, high = (
        estimate(m.by_seed(stage, method, rounds, f"win_{end}_vs_{opponent}"))
        for end in ("low", "high")
    )
    return (low.mean, high.mean) if low and high else None


def _cell(m: Results, stage: str, method: str, rounds: Sequence[int], opponent: str = SFT) -> str:
    found = contest(m, stage, method, rounds, opponent)
    return found.with_bounds if found else NOT_MEASURED


def _note(m: Results) -> str:
    if len(m.seeds) > 1:
        return "Means over the seeds; in brackets the 95 % t-interval of the wins over the seeds."
    return (
        "In brackets, where it was recorded: the 95 % interval of the wins over the prompts, which "
        "says nothing about another seed."
    )


def win_table(m: Results) -> Table:
    """Return win/tie/lose against SFT by round (the paper's Table 1)."""
    rounds = m.all_rounds
    rows = []
    for arm in m.trained if m.judged else ():
        own = m.rounds(arm)
        cells = (_cell(m, "evaluate", arm, [r]) if r in own else "—" for r in rounds)
        rows.append((m.name(arm), *cells))
    by_gold = " by gold reward" if m.judge == "gold" else ""
    return Table(
        "Win / tie / lose against SFT by round, in % (the paper's Table 1)",
        ("Arm", *(f"Round {r}" for r in rounds)),
        tuple(rows),
        f"The first response to each of the judged prompts{by_gold}. {_note(m)}",
    )


def best_round_table(m: Results) -> Table:
    """Return the best round of every arm against the best rounds of others (Table 2)."""
    opponents = [SFT, *m.trained]
    rows = []
    for arm in m.trained:
        rounds = m.rounds(arm, "compare")
        if not rounds:
            continue
        best = {
            seed: str(r)
            for r in rounds
            for opponent in opponents
            for seed in m.final("compare", arm, r, f"win_vs_{opponent}")
        }
        chosen = ", ".join(best[seed] for seed in sorted(best)) or NOT_MEASURED
        cells = ("—" if o == arm else _cell(m, "compare", arm, rounds, o) for o in opponents)
        rows.append((m.name(arm), chosen, *cells))
    several = " Best rounds are listed seed by seed." if len(m.seeds) > 1 else ""
    best_by = (
        "the highest mean gold" if m.chosen_by_gold else "the most wins less losses against SFT"
    )
    return Table(
        "Best round of every arm against the others: win / tie / lose in % (Table 2)",
        ("Arm", "Best round", "vs SFT", *(f"vs {m.short(arm)}" for arm in m.trained)),
        tuple(rows),
        f"The best round, of an arm and of its opponent, is the one with {best_by} on the first "
        "half of the judged prompts; the rates are measured on the second half, so that choosing "
        f"does not flatter them. DPO's KL is not steered.{several} {_note(m)}",
    )


_JUDGING = (
    "rate", "length_controlled", "length_ours", "length_theirs", "judge_consistency",
    "judge_first_share", "unjudged",
)  # fmt: skip


def judging_table(m: Results) -> Table:
    """Return the table behind the win rates: counts, lengths, consistency of the judge."""
    asked = ("win_vs_sft", "unjudged_vs_sft")
    keys = [key for key in m.keys if any(m.final("evaluate", *key, metric) for metric in asked)]
    names = [name for name in _JUDGING if any(_judged(m, key, name) for key in keys)]
    columns = [declared(f"{name}_vs_sft") for name in names]
    rows = []
    for arm, round_ in keys:
        size = m.sample_size("evaluate", arm, round_, "win_vs_sft")
        cells = (
            number(_judged(m, (arm, round_), name), column.digits)
            for name, column in zip(names, columns, strict=True)
        )
        counted = NOT_MEASURED if size is None else str(size)
        rows.append((m.name(arm), str(round_), counted, *cells))
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


def _judged(m: Results, key: tuple[str, int], name: str) -> SeedEstimate | None:
    recorded = m.estimate("evaluate", *key, f"{name}_vs_sft")
    if recorded is not None or name != "rate":
        return recorded
    wins, ties = (m.final("evaluate", *key, f"{outcome}_vs_sft") for outcome in ("win", "tie"))
    return estimate({seed: wins[seed] + 0.5 * ties[seed] for seed in wins.keys() & ties.keys()})
