"""The tables of the sight tests: how well they rank reward models, and how true their pairs are."""

from collections.abc import Sequence

from scipy.stats import spearmanr

from shiftrm.measure.sight import Prediction, predicts
from shiftrm.records import Record

from .cells import WORLD_NAMES, Study, capital, interval, mean
from .plan import START
from .results import Result
from .statistics import Paired, paired

SHARING = {
    **dict.fromkeys(("log_sigmoid", "par", "clip", "reference_reset"), "retrained"),
    **dict.fromkeys(("contrast_log_sigmoid", "contrast_rounds"), "contrast"),
    "contrast_all_25_log_sigmoid": "contrast_all",
    "contrast_75_reset": "contrast_75_log_sigmoid",
    "laplace_log_sigmoid": "laplace",
    "fresh_labels_log_sigmoid": "fresh_labels",
    "metarm_log_sigmoid": "metarm_by_effect",
}
"""Arms whose reward model is another arm's in the second round: they differ in PPO alone."""

FEW = 10
"""Reward models of one policy that a rank correlation is computed from, at least."""

FIRST_ADAPTED = 2
"""The first round with adapted reward models; all arms share the first."""


def sight_table(study: Study) -> str:
    """Return how each sight test ranks the reward models, against what labels would say.

    Every reward model (seed, arm, round, KL target) is one point; intervals resample seeds. Arms
    that share a reward model count once. The second rows leave out arms that were trained on pairs
    like those of the tests. The last column compares only reward models of the same policy.
    """
    made = {(r.seed, r.kl_target, r.arm) for r in study.results if r.round == FIRST_ADAPTED}
    alone = [
        r
        for r in study.results
        if r.arm not in ("gold", START)
        and not (r.round == FIRST_ADAPTED and (r.seed, r.kl_target, SHARING.get(r.arm)) in made)
    ]
    lines = [
        "| sight test | reward models | accuracy on policy pairs | rank correlation with gold "
        "| models | seeds | accuracy, of the same policy |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, results in (
        ("all", alone),
        ("not trained on such pairs", [r for r in alone if not r.arm.startswith("contrast")]),
    ):
        records = [
            Record("evaluate", f"{r.arm} {r.kl_target:g}", r.round, name, value, seed=r.seed)
            for r in results
            for name, value in r.numbers.items()
            if name.startswith(("sight_", "accuracy_policy_", "rank_policy_"))
        ]
        ranks = {p.kind: p for p in predicts(records, when="before", target="rank_policy")}
        for one in predicts(records, when="before"):
            cells = [one.kind, label, _rho(one), _rho(ranks[one.kind]), str(one.n), str(one.seeds)]
            lines.append("| " + " | ".join([*cells, interval(_within(results, one.kind))]) + " |")
    return "\n".join(lines)


def _within(results: Sequence[Result], kind: str) -> Paired:
    """Return the mean over seeds of the rank correlation among reward models of one policy.

    Policies with fewer than `FEW` reward models are left out.
    """
    sight, accuracy = f"sight_{kind}_before", "accuracy_policy_before"
    points: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for r in results:  # in later rounds every arm has a policy of its own
        if r.round == FIRST_ADAPTED and {sight, accuracy} <= r.numbers.keys():
            found = points.setdefault((r.seed, r.kl_target), [])
            found.append((r.numbers[sight], r.numbers[accuracy]))
    rhos: dict[int, list[float]] = {}
    for (seed, _), found in points.items():
        if len(found) >= FEW:
            rhos.setdefault(seed, []).append(spearmanr(found).statistic)
    means = {seed: mean(values) for seed, values in rhos.items()}
    return paired(means, dict.fromkeys(means, 0.0))


def truth_table(studies: Sequence[Study]) -> str:
    """Return how often gold itself prefers the response in the pairs of each sight test.

    On the policy after the first round, which all arms of a seed share: mean over seeds, and the
    lowest and highest.
    """
    kinds = ("other_prompt", "repeated", "cut", "shuffled")
    lines = ["| policy | " + " | ".join(kinds) + " | seeds |", "|---" * (len(kinds) + 2) + "|"]
    for study in studies:
        for kl in sorted({r.kl_target for r in study.results}):
            of_gold = [r.numbers for r in study.cell(kl, 2).results if r.arm == "gold"]
            world = WORLD_NAMES.get(study.world, study.world)
            row = [capital(f"{world}KL {kl:g}")]
            for kind in kinds:
                found = [n[f"sight_{kind}_before"] for n in of_gold if f"sight_{kind}_before" in n]
                shown = f"{mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
                row.append(shown)
            if any(row[1:]):
                lines.append("| " + " | ".join([*row, str(len(of_gold))]) + " |")
    return "\n".join(lines)


def _rho(found: Prediction) -> str:
    if found.rho is None or found.low is None or found.high is None:
        return "" if found.rho is None else f"{found.rho:+.2f}"
    return f"{found.rho:+.2f} ({found.low:+.2f}, {found.high:+.2f})"
