"""The study's results: a row per arm, round, KL target and seed, in one file that is committed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.records import Record

TAIL = 10
"""PPO steps at the end of a round over which gold and KL are averaged."""

KEPT = (
    "accuracy_policy_before",
    "accuracy_policy_after",
    "rank_policy_before",
    "rank_policy_after",
    "accuracy_heldout",
    "length_mean",
)
"""Metrics of the evaluation that a row keeps, beside those of `KEPT_BEGINNINGS`."""

META = ("meta_influence", "meta_growth", "meta_rho", "meta_trials")
"""What a meta step logs that a row keeps, as means over the training."""

SECONDS = "seconds_reward_model"
"""The number that says how long the round's reward model was trained."""

KEPT_BEGINNINGS = ("sight_", "pays_", "overpays_")
LEFT_OUT = ("overpays_low_", "overpays_high_")


@dataclass(frozen=True)
class Result:
    """One round of one arm.

    Attributes:
        gold, kl: mean over the roll-outs of the last `TAIL` PPO steps; KL to the SFT policy.
        gold_evaluated, kl_evaluated: of the final policy on the evaluation prompts.
        numbers: other metrics of the evaluation by name.
    """

    world: str
    seed: int
    kl_target: float
    arm: str
    round: int
    gold: float
    kl: float
    gold_evaluated: float
    kl_evaluated: float
    numbers: dict[str, float]
    commit: str

    @property
    def key(self) -> tuple[str, float, int, str, int]:
        return self.world, self.kl_target, self.seed, self.arm, self.round


def results_of(
    records: Sequence[Record],
    *,
    world: str,
    kl_target: float,
    resets: Collection[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> list[Result]:
    """Return a row for every arm and round that the records of one seed hold completely.

    Args:
        resets: arms whose KL in PPO is to the policy that the round starts from. Their `kl` is that
            of the evaluation, which is to the SFT policy for every arm.
        seconds: that each stage took, of those that were not there before.
    """
    found = []
    took = seconds or {}
    for arm, number in dict.fromkeys((r.method, r.round) for r in records if r.stage == "evaluate"):
        mine = [r for r in records if r.method == arm and r.round == number]
        steps = {
            name: [r.value for r in mine if r.stage == "ppo" and r.metric == name and r.step]
            for name in ("gold_mean", "sequence_kl")
        }
        final = {r.metric: r.value for r in mine if r.stage == "evaluate" and r.step is None}
        if not steps["gold_mean"]:  # before the first round
            continue
        numbers = {
            name: float(value)
            for name, value in final.items()
            if not isinstance(value, list) and _is_kept(name)
        }
        numbers |= _training_means(mine)
        training = took.get(f"methods/{arm}/round-{number}/reward_model")
        if training is not None:
            numbers[SECONDS] = round(training, 2)
        found.append(
            Result(
                world,
                mine[0].seed,
                kl_target,
                arm,
                number,
                _tail(steps["gold_mean"]),
                float(final["kl"]) if arm in resets else _tail(steps["sequence_kl"]),
                float(final["gold_mean"]),
                float(final["kl"]),
                numbers,
                mine[0].commit,
            )
        )
    return found


def _training_means(records: Sequence[Record]) -> dict[str, float]:
    """Return the means over the training of the round's reward model, of what a meta step logs."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.stage == "reward_model" and record.metric in META:
            found.setdefault(record.metric, []).append(float(record.value))  # type: ignore[arg-type]
    return {name: round(sum(values) / len(values), 8) for name, values in found.items()}


def _is_kept(name: str) -> bool:
    return name in KEPT or (name.startswith(KEPT_BEGINNINGS) and not name.startswith(LEFT_OUT))


def _tail(values: Sequence[object]) -> float:
    last = [float(value) for value in values[-TAIL:]]  # type: ignore[arg-type]
    return sum(last) / len(last)


def read_results(path: Path) -> list[Result]:
    """Return the rows of the file, or none if there is none."""
    return [Result(**row) for row in read_jsonl(path)] if path.exists() else []


def add_results(path: Path, new: Iterable[Result]) -> list[Result]:
    """Add rows to the file, in the place of older ones with the same key, and return all."""
    rows = {result.key: result for result in [*read_results(path), *new]}
    merged = [rows[key] for key in sorted(rows)]
    write_jsonl(path, (asdict(result) for result in merged))
    return merged
