"""The runs of the study: PPO in the gold world under four kinds of reward, measured step by step.

A run is one file, `KIND-SEED.jsonl.gz`: first a row about the run, then one for every step with the
free signals that a `DriftMonitor` measured, and each group's rewards, gold and which texts are
equal. That is all that audits need, so that their settings can be tried without training again.
"""

import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seed_range import seeds_of
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, atomic_write_bytes, read_jsonl
from shiftrm.models.sampling import SamplingConfig
from shiftrm.models.scoring import Scorer, mean_and_spread, score_rows
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import SIGNALS
from shiftrm.monitor.trained_on import TrainingStates
from shiftrm.policies.ppo import PPOTrainer, Problem, Rollouts, StepLog, make_critic
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.world.build import PROMPTS_TRAIN
from shiftrm.world.world import GoldReward

from .start import DONE, POLICY, RESPONSES, REWARD, SECOND, TRAINING_PAIRS, make_start

STEPS = 70
"""PPO steps of a run; every step draws 16 prompts and 16 responses to each."""

CONFIG = PPOConfig(
    steps=STEPS,
    prompts_per_step=16,
    rollouts_per_prompt=16,
    minibatch_size=64,
    forward_batch_size=256,
    learning_rate=2.5e-4,
    critic_learning_rate=1e-3,
    value_clip=None,
    truncation_penalty=1.0,
    sampling=SamplingConfig(max_new_tokens=20),
)
"""The demo's PPO, with a quarter of its learning rate: with that, gold peaks after 10 steps."""

SQUASH = 1.0
"""Width of the squashed gold, in standard deviations of gold on SFT samples."""

EVERY = 2
"""Steps between measurements of the signals: they cost as much as the step itself."""

SIGNALS_ONLY = MonitorConfig(budget=0, probe_groups=64, baseline=4, every=EVERY)


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        reward: "model", the reward model; "gold"; or "squashed", a monotone function of gold that
            flattens where gold is high, so that rewards draw together and their order stays.
        kl_target: None: no KL penalty at all.
        bad: whether the reward model is over-optimised.
    """

    label: str
    reward: str
    kl_target: float | None
    bad: bool


KINDS: dict[str, Kind] = {
    "free": Kind("reward model, no KL penalty", "model", None, True),
    "kl": Kind("reward model, KL held at 12", "model", 12.0, True),
    "gold": Kind("gold as reward", "gold", 12.0, False),
    "squashed": Kind("squashed gold: spread falls, accuracy does not", "squashed", 12.0, False),
}


def squashed(mean: float, spread: float) -> Callable[..., list[float]]:
    """Return the reward function `tanh((gold - mean) / (SQUASH * spread))`."""
    gold = GoldReward()

    def of(prompts: Any, responses: Any, *, finished: Any) -> list[float]:
        values = gold(prompts, responses, finished)
        return [math.tanh((value - mean) / (SQUASH * spread)) for value in values]

    return of


def gold_reward(prompts: Any, responses: Any, *, finished: Any) -> list[float]:
    return GoldReward()(prompts, responses, finished)


def make_run(name: str, seed: int, root: Path, steps: int = STEPS) -> Path:
    """Train one run, if it is not there, and return its file."""
    path = root / f"{name}-{seed}.jsonl.gz"
    if path.exists():
        return path
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began, kind = time.process_time(), KINDS[name]
    start = make_start(seed, root / f"start-{seed}")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(start / POLICY).eval() for _ in range(2)
    )
    reference.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(start / POLICY)
    prompts = [row["prompt"] for row in read_jsonl(start / "world" / PROMPTS_TRAIN)]
    sft = read_jsonl(start / RESPONSES)
    reward: Any = gold_reward
    if kind.reward == "model":
        reward = Scorer.from_pretrained(start / REWARD)
    elif kind.reward == "squashed":
        reward = squashed(*mean_and_spread(score_rows(gold_reward, sft)))
    mean, spread = mean_and_spread(score_rows(reward, sft))
    config = replace(
        CONFIG,
        steps=steps,
        seed=seed,
        reward_mean=mean,
        reward_std=spread,
        kl_target=kind.kl_target,
        kl_coefficient=0.0 if kind.kl_target is None else 0.05,
    )
    lines: list[Row] = [{"kind": name, "seed": seed, **json.loads((start / DONE).read_text())}]
    with tempfile.TemporaryDirectory() as folder:
        monitor = DriftMonitor(
            reward,
            Path(folder) / "monitor",
            SIGNALS_ONLY,
            score=reward,
            second=Scorer.from_pretrained(start / SECOND),
            trained_on=TrainingStates.from_pretrained(start / REWARD, start / TRAINING_PAIRS),
        )

        def watch(log: StepLog, rollouts: Rollouts) -> None:
            groups = groups_of(rollouts, config.rollouts_per_prompt)
            signals = monitor.see([{k: v for k, v in g.items() if k != "gold"} for g in groups])
            lines.append(row_of(log, groups, signals))

        problem = Problem(policy, reference, tokenizer, prompts, reward)
        PPOTrainer(problem, make_critic(policy, seed=seed), config, on_step=watch).train()
        monitor.close()
    lines[0] |= {"errors": monitor.errors, "seconds": round(time.process_time() - began, 1)}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return atomic_write_bytes(path, gzip.compress(text.encode(), mtime=0))


def groups_of(rollouts: Rollouts, size: int) -> list[Row]:
    """Return the groups of a step with rewards and gold."""
    gold = gold_reward(rollouts.prompts, rollouts.responses, finished=rollouts.finished)
    columns = {
        "responses": rollouts.responses,
        "finished": rollouts.finished,
        "rewards": rollouts.rewards,
        "gold": gold,
    }
    return [
        {"prompt": rollouts.prompts[at]} | {k: v[at : at + size] for k, v in columns.items()}
        for at in range(0, len(rollouts.prompts), size)
    ]


def row_of(log: StepLog, groups: Sequence[Row], signals: dict[str, float]) -> Row:
    """Return a step's row: texts become numbers, equal for equal texts of a group."""
    kept = []
    for group in groups:
        keys = [repr(key) for key in zip(group["responses"], group["finished"], strict=True)]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        kept.append(
            {
                "texts": [number[key] for key in keys],
                "rewards": [round(r, 5) for r in group["rewards"]],
                "gold": [round(g, 3) for g in group["gold"]],
            }
        )
    measured = {name: round(v, 5) for name, v in signals.items() if name in SIGNALS.names()}
    return {"step": log.step, "kl": round(log.kl, 3), "signals": measured, "groups": kept}


def read_run(path: Path) -> tuple[Row, list[Row]]:
    """Return a run's first row and its steps."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows[0], rows[1:]


def parse_runs(words: Sequence[str]) -> list[tuple[str, int]]:
    """Return the (kind, seed) of words such as "free:0" and "gold:3-7", seed by seed.

    Raises:
        UserError: an unknown kind, or seeds that are not numbers.
    """
    found = []
    for word in words:
        name, _, seeds = word.partition(":")
        if name not in KINDS:
            raise UserError(f"unknown kind of run {name!r}{suggest(name, list(KINDS))}")
        wrong = f"{word!r}: write KIND:SEED or KIND:FIRST-LAST"
        found += [(name, seed) for seed in seeds_of(seeds, wrong)]
    return sorted(found, key=lambda run: run[1])
