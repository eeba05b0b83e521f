"""The arms and the sweep of the study, and one result row for each, made only if it is missing.

A row is `{"kind", "world", "seed", "name", ...numbers}`; the first four are its key.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, read_jsonl
from shiftrm.world.domain_gold import HELD_OUT

from .data import Start, fresh_reward_model, gold_rewards, make_start, text_rewards
from .guiding import Rewards, Targets, make_targets, measured, of_reward_model, ppo, weighted
from .inner import RATES, STEPS, inner_rows
from .learning import Meta, Trace, bradley_terry, meta_train, policy_on_pairs, regressed

KEY = ("kind", "world", "seed", "name")

D16 = Meta(inner_steps=16, inner_rate=0.1, support=16)
SIGNED = Meta(inner_rate=1.0)
FROZEN = {"tastes": D16, "signed": SIGNED, "named": SIGNED, "topics": SIGNED}
"""OODPL on the fresh seeds: chosen on the watched domains of seeds 100 and 101."""

FROM_POOLED = {
    world: replace(Meta() if world == "tastes" else SIGNED, from_pooled=True, rate=2e-4)
    for world in FROZEN
}
"""The same for OODPL that starts from the pooled model."""

POOLED = "pooled.pt"


@dataclass(frozen=True)
class Arm:
    """A method of the study.

    Attributes:
        reward: makes a reward model's rewards; it is then measured in all ways of guiding.
        policy: or makes a policy, which is measured as it is.
        ours: whether the method, or a part of it, is ours.
    """

    label: str
    reward: Callable[["Seed"], Rewards] | None = None
    policy: Callable[["Seed"], object] | None = None
    ours: bool = False


class Seed:
    """A seed of a world, with what several arms share, made when it is first used."""

    def __init__(self, world: str, seed: int, folder: Path) -> None:
        self.world = world
        self.start: Start = make_start(world, seed, folder)
        self._folder = folder / f"{world}-{seed}"
        self._targets: dict[tuple[str, ...], Targets] = {}

    def targets(self, names: Sequence[str]) -> Targets:
        key = tuple(names)
        if key not in self._targets:
            self._targets[key] = make_targets(self.start, names)
        return self._targets[key]

    def pooled(self) -> nn.Module:
        """Return the pooled Bradley-Terry model."""
        path = self._folder / POOLED
        if path.exists():
            model = fresh_reward_model(self.start)
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        model = bradley_terry(self.start)
        torch.save(model.state_dict(), path)
        return model

    def rewards(self, model: nn.Module) -> Rewards:
        return text_rewards(model, self.start)

    def meta(self, meta: Meta) -> tuple[nn.Module, Trace]:
        pooled = self.pooled() if meta.from_pooled else None
        return meta_train(self.start, meta, pooled=pooled)


def _meta(settings: dict[str, Meta], **changes: float) -> Callable[[Seed], Rewards]:
    def make(seed: Seed) -> Rewards:
        return seed.rewards(seed.meta(replace(settings[seed.world], **changes))[0])  # type: ignore[arg-type]

    return make


def pooled_on(seed: Seed) -> nn.Module:
    """Return the pooled model trained on as `oodpl_meta` is: the control of its further steps."""
    return bradley_terry(seed.start, on=seed.pooled(), rate=2e-4)


ARMS: dict[str, Arm] = {
    "reference": Arm("reference", policy=lambda s: s.start.reference),
    "plain": Arm("plain fine-tuning"),
    "dpo": Arm("DPO, pooled", policy=lambda s: policy_on_pairs(s.start, "dpo")),
    "cpl": Arm("public code (`cpl`)", policy=lambda s: policy_on_pairs(s.start, "cpl")),
    "pooled": Arm("pooled BT", lambda s: s.rewards(s.pooled())),
    "pooled_last": Arm(
        "pooled BT, last step", lambda s: s.rewards(bradley_terry(s.start, stop=False))
    ),
    "regressed": Arm(
        "regression on each source's own BT",
        lambda s: s.rewards(regressed(s.start)),
        ours=True,
    ),
    "balanced": Arm(
        "pooled BT, domains balanced", lambda s: s.rewards(bradley_terry(s.start, balanced=True))
    ),
    "pooled_on": Arm("pooled BT, as many steps again", lambda s: s.rewards(pooled_on(s))),
    "dro": Arm("pooled BT, group DRO", lambda s: s.rewards(bradley_terry(s.start, dro=True))),
    "oodpl": Arm("OODPL", _meta(FROZEN)),
    "oodpl_bt": Arm("OODPL + 0.1 pooled BT", _meta(FROZEN, bt=0.1), ours=True),
    "oodpl_meta": Arm("OODPL from pooled BT", _meta(FROM_POOLED), ours=True),
    "gold": Arm("gold (ceiling)", lambda s: gold_rewards(s.start)),
}

WAYS = {
    "best_of": "best of 16",
    "weighted": "weighted fine-tuning",
    "ppo": "PPO at matched KL",
    "policy": "itself",
}

SWEEP: dict[str, Meta] = {
    "base": Meta(),
    "inner rate 1": Meta(inner_rate=1.0),
    "D = 4, rate 0.1": Meta(inner_steps=4, inner_rate=0.1),
    "D = 16, rate 0.1, support 16": D16,
    "beta 0.25": Meta(beta=0.25),
    "beta 4": Meta(beta=4.0),
    "support 16": Meta(support=16),
    "support 256": Meta(support=256),
    "not normalised": Meta(normalize=False),
    "outer rate 0.0003": Meta(rate=3e-4),
    "+ 0.1 pooled BT": Meta(bt=0.1),
    "from pooled BT": Meta(from_pooled=True),
    "from pooled BT, outer rate 0.0002": Meta(from_pooled=True, rate=2e-4),
    "from pooled BT, inner rate 1": Meta(from_pooled=True, rate=2e-4, inner_rate=1.0),
    "from pooled BT + 0.1 pooled BT": Meta(from_pooled=True, rate=2e-4, bt=0.1),
    "from pooled BT, D = 16": replace(D16, from_pooled=True, rate=2e-4),
    "D = 16 + 0.1 pooled BT": replace(D16, bt=0.1),
}
"""Settings tried on the watched domains, one or two changes at a time."""

BASELINES = ("plain", "pooled", "pooled_on", "gold")
"""Arms that the sweep also measures on the watched domains."""

CONVERGENCE_BETAS = (0.5, 1.0, 4.0)
CONVERGENCE = Meta(
    inner_steps=4, inner_rate=0.1, support=16, tasks=1, curvature="finite_difference", steps=60
)


def run_inner(seed: Seed) -> Iterable[Row]:
    for row in inner_rows(seed.start, steps=STEPS, rates=RATES):
        yield {"name": f"D {row['inner_steps']}, rate {row['inner_rate']:g}", **row}


def sweep_row(seed: Seed, name: str) -> Row:
    """Return a setting's numbers on the watched domains."""
    targets = seed.targets(seed.start.world.watched)
    if name in SWEEP:
        model, trace = seed.meta(SWEEP[name])
        rewards, more = seed.rewards(model), _summary(trace)
    else:
        arm, more = ARMS[name], {}
        if arm.reward is None:
            return _prefixed("weighted", weighted(seed.start, targets, None))
        rewards = arm.reward(seed)
    numbers = of_reward_model(targets, rewards)
    return numbers | _prefixed("weighted", weighted(seed.start, targets, rewards)) | more


def arm_row(seed: Seed, name: str) -> Row:
    """Return an arm's numbers in the held-out domains."""
    arm, targets = ARMS[name], seed.targets(HELD_OUT)
    if arm.policy is not None:
        return _prefixed("policy", measured(seed.start, arm.policy(seed), HELD_OUT))
    if arm.reward is None:
        return _prefixed("weighted", weighted(seed.start, targets, None))
    rewards = arm.reward(seed)
    numbers = of_reward_model(targets, rewards)
    numbers |= _prefixed("weighted", weighted(seed.start, targets, rewards))
    if seed.start.world.one_policy:
        numbers |= _prefixed("ppo", ppo(seed.start, targets, rewards))
    return numbers


def convergence_row(seed: Seed, name: str) -> Row:
    """Return the outer loss and the gradient's norm by step, for a beta and D > 1."""
    meta = replace(CONVERGENCE, beta=float(name.removeprefix("beta ")))
    _, trace = meta_train(seed.start, meta, stop=False)
    return {"loss": _short(trace.loss), "norm": _short(trace.norm)}


def _summary(trace: Trace) -> Row:
    seen = trace.watched
    assert seen is not None
    return {
        "first_loss": seen.losses[0],
        "best_loss": seen.losses[seen.best],
        "best_step": seen.best,
        "effective": sum(trace.effective) / len(trace.effective),
    }


def _prefixed(way: str, numbers: dict[str, float]) -> Row:
    return {f"{way}_{name}": value for name, value in numbers.items()}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


KINDS: dict[str, tuple[Callable[[Seed, str], Row], tuple[str, ...]]] = {
    "sweep": (sweep_row, (*BASELINES, *SWEEP)),
    "arms": (arm_row, tuple(ARMS)),
    "convergence": (convergence_row, tuple(f"beta {beta:g}" for beta in CONVERGENCE_BETAS)),
}
"""Kind of row -> what makes one by name, and all names."""


def make_rows(
    kind: str,
    world: str,
    seeds: Iterable[int],
    names: Sequence[str],
    *,
    folder: Path,
    results: Path,
    until: float | None = None,
) -> Iterable[str]:
    """Make the rows that are missing, and yield a line about each.

    Args:
        names: of the kind; empty: all.
        until: begin nothing after this `time.monotonic()`.

    Raises:
        UserError: an unknown name.
    """
    known = KINDS[kind][1] if kind in KINDS else ()
    for name in names:
        if name not in known:
            raise UserError(f"unknown name {name!r}{suggest(name, known)}")
    for number in seeds:
        made = {tuple(row[k] for k in KEY) for row in read_results(results)}
        if kind == "inner":
            if not any(key[:3] == (kind, world, number) for key in made):
                began = time.process_time()
                for row in run_inner(Seed(world, number, folder)):
                    _add(results, {"kind": kind, "world": world, **row})
                yield f"{kind} {world} {number}: {time.process_time() - began:.0f} s of CPU"
            continue
        wanted = [n for n in names or known if (kind, world, number, n) not in made]
        seed = None
        for name in wanted:
            if until is not None and time.monotonic() > until:
                yield f"{kind} {world} {number} {name}: left out"
                continue
            began = time.process_time()
            seed = seed or Seed(world, number, folder)
            numbers = {k: _rounded(v) for k, v in KINDS[kind][0](seed, name).items()}
            row = {"kind": kind, "world": world, "seed": number, "name": name, **numbers}
            row["seconds"] = round(time.process_time() - began, 1)
            _add(results, row)
            yield json.dumps(row)


def read_results(path: Path) -> list[Row]:
    """Return the rows of a file; of rows with the same key the last."""
    rows = read_jsonl(path) if path.exists() else []
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())


def _add(path: Path, row: Row) -> None:
    """Append a line in one write, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
