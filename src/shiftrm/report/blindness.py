"""Did the reward model go blind? The sentences and tables that answer it."""

from __future__ import annotations

import math

from shiftrm.metrics import metric as declared
from shiftrm.report.analysis import accuracy_noise, adaptations
from shiftrm.report.results import Results
from shiftrm.report.tables import Table, arrow, cell, fixed_point

_SEEN = (
    "accuracy_policy_before", "accuracy_policy_after", "relative_difference_variance_before",
    "relative_difference_variance_after",
)  # fmt: skip


def blindness(m: Results) -> list[str]:
    """Say whether the kept reward model went blind between its first and last round."""
    arm = m.vanilla
    if arm is None:
        return ["No arm keeps its reward model, so whether one goes blind was not measured."]
    change = _first_last(m, arm, "accuracy_policy")
    spread = _first_last(m, arm, "relative_difference_variance")
    if change is None and spread is None:
        return ["Whether the reward model kept fixed went blind was not measured."]
    kept = m.name(arm)
    texts = [] if "kept fixed" in kept else [f"The reward model kept fixed is that of {kept}."]
    fell = spread_fell = None
    if change is not None:
        first, last, noise, last_round = change
        fell = first - last > noise
        word = "fell" if fell else ("rose" if last - first > noise else "hardly moved,")
        texts.append(
            f"The accuracy of the reward model kept fixed on pairs of the policy's own responses "
            f"{word} from {fixed_point(first, 3)} before the first round to "
            f"{fixed_point(last, 3)} after round {last_round} (0.5 is chance)."
        )
    if spread is not None:
        first, last, _, _ = spread
        spread_fell = last < 0.5 * first
        texts.append(
            "The variance of its reward differences, relative to SFT samples, went from "
            f"{fixed_point(first)} to {fixed_point(last)}"
            + (f" ({100 * last / first:.0f} % of what it was)." if first > 0 else ".")
        )
    texts.append(_verdict(fell, spread_fell))
    if not m.has("gold_mean"):
        texts.append(
            "No second reward model was given (evaluation.gold), so nothing here says whether "
            "any arm's reward model ranks the policy's responses correctly."
        )
    elif not m.gold_is_true:
        texts.append("Correctly means here: as the second reward model ranks them.")
    return texts


def _first_last(m: Results, arm: str, metric: str) -> tuple[float, float, float, int] | None:
    """Return (before the first round, after the last, noise of an accuracy, last round)."""
    befores, afters = m.course(arm, f"{metric}_before"), m.course(arm, f"{metric}_after")
    if not befores or not afters:
        return None
    (first_round, first), (last_round, last) = befores[0], afters[-1]
    noise = math.inf
    if metric == "accuracy_policy":
        noise = accuracy_noise(
            first.mean,
            last.mean,
            m.sample_size("evaluate", arm, first_round, f"{metric}_before"),
            m.sample_size("evaluate", arm, last_round, f"{metric}_after"),
        )
    return first.mean, last.mean, noise, last_round


def _verdict(fell: bool | None, spread_fell: bool | None) -> str:
    if fell and spread_fell:
        return "So it did go blind: it tells the policy's responses apart less, and less correctly."
    if fell:
        return "So it ranks the policy's responses worse than it ranked those of SFT."
    if spread_fell and fell is False:
        return (
            "So its rewards moved closer together, but it ranks the responses about as well as "
            "before: quieter rather than blind."
        )
    if spread_fell:
        return "So its rewards moved closer together; whether it ranks worse was not measured."
    if fell is False:
        return "So in these numbers it did not go blind."
    return "Its spread did not fall by half; whether it ranks worse was not measured."


def others_spread(m: Results) -> list[str]:
    """Say how far apart the other arms' reward models put the responses at the end."""
    texts = []
    for arm in m.with_rewards:
        last = m.last(arm, "relative_difference_variance_after")
        if arm != m.vanilla and last is not None:
            texts.append(
                f"Under {m.name(arm)} that relative variance is {fixed_point(last[1].mean)} after "
                f"round {last[0]}."
            )
    return texts


def blindness_tables(m: Results) -> list[Table]:
    """Return the tables of the section."""
    found = [_vanilla_table(m), _spread_table(m), _adaptation_table(m)]
    return [table for table in found if table is not None]


def _vanilla_table(m: Results) -> Table | None:
    """Return what the kept reward model sees in every round; None without gold."""
    arm = m.vanilla
    if arm is None or not m.rounds(arm, "evaluate", _SEEN[0]):
        return None
    return Table(
        f"{m.name(arm)}: what the reward model still sees",
        ("Round", *(declared(metric).heading for metric in _SEEN)),
        tuple((str(r), *(cell(m, arm, r, x) for x in _SEEN)) for r in m.rounds(arm)),
        "Before and after the round's policy training. Relative variance: of reward differences; "
        "1 is the spread on SFT samples. Accuracy 0.5 is chance.",
    )


def _spread_table(m: Results) -> Table:
    """Return the spread of every arm's reward differences, before and after policy training."""
    metric = "relative_difference_variance"
    rounds = m.all_rounds
    rows = []
    for arm in m.with_rewards:
        own = m.rounds(arm)
        cells = (
            arrow(m.mean(arm, r, f"{metric}_before"), m.mean(arm, r, f"{metric}_after"))
            if r in own
            else "—"
            for r in rounds
        )
        rows.append((m.name(arm), *cells))
    return Table(
        "Variance of reward differences, relative to SFT responses: before → after the round",
        ("Arm", *(f"Round {r}" for r in rounds)),
        tuple(rows),
        "1 is the spread on SFT responses under the same reward model. A retrained reward model "
        "is another one in every round. Larger differences are not by themselves better judgement.",
    )


def _adaptation_table(m: Results) -> Table | None:
    """Return the changes by each adaptation on the same policy, with a reading; None if none."""
    rows = tuple(
        (
            m.name(a.method),
            str(a.round),
            a.reading,
            arrow(*a.accuracy, 3),
            arrow(*a.relative_variance, 2),
            arrow(*a.variance, 3),
        )
        for a in adaptations(m)
    )
    if not rows:
        return None
    return Table(
        "What each adaptation changed (old → adapted reward model, same policy)",
        ("Arm", "Round", "Reading", "Accuracy", "Relative variance", "Raw variance"),
        rows,
        "Old: the reward model of the round before (round 1: the first one). A change of "
        "accuracy counts beyond two standard errors and 0.02, more spread beyond a quarter.",
        text_columns=3,
    )
