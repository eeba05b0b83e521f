"""The disk space of a stage and an estimate of its time, for `estimate`."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shiftrm.files import Row
from shiftrm.methods.method import METHODS
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.job_checks import job_of, settings_of
from shiftrm.pipeline.jobs import (
    External,
    Made,
    MetaTest,
    MetaTrain,
    Sample,
    Sft,
    TrainReward,
    is_training,
)

__all__ = [
    "Disk",
    "Sizes",
    "disk_of",
    "mean_tokens",
    "members_of",
    "operations",
    "speed",
    "time_note",
]

_BYTES = {"bfloat16": 2, "float16": 2}
"""Bytes per number by dtype; others take 4."""

_CHARACTERS = 4
"""Characters per token, a guess: a dry run tokenises nothing."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of the policy, of a reward model on it, and of the adapters of each (LoRA)."""

    policy: int
    reward: int
    policy_adapters: int | None = None
    reward_adapters: int | None = None


class Disk(NamedTuple):
    """Bytes that a stage leaves, and what its checkpoints take beside that while it runs."""

    kept: int
    checkpoints: int


def disk_of(stage: Stage, sizes: Sizes, steps: int | None) -> Disk:
    """Return the disk space from parameters and dtype: a model, and checkpoints with AdamW states.

    A checkpoint holds what is trained. Texts, records and logs are not counted.
    """
    job = job_of(stage)
    if isinstance(job, External) or (isinstance(job, MetaTest) and job.way != "none"):
        return Disk(4 * sizes.policy, 0)
    if not is_training(job):
        return Disk(0, 0)
    given = settings_of(stage)
    size, adapters = sizes.policy, sizes.policy_adapters
    if isinstance(job, TrainReward | MetaTrain):
        size, adapters = sizes.reward, sizes.reward_adapters
    width = _BYTES.get(str(given.get("dtype")), 4)
    trained = 3 * width * size if adapters is None else 3 * 4 * adapters
    kept = width * size + 4 * (adapters or 0)
    members = members_of(job)
    steps = None if steps is None else math.ceil(steps / members)
    if (
        getattr(job, "method", None) == "ppo"
    ):  # the critic, too; the newest and the one being written
        critic = sizes.reward_adapters
        trained += 3 * width * sizes.reward if critic is None else 3 * 4 * critic
        every = float(given.get("save_steps", 20))
        number = 2 if steps is None else min(2, int((steps - 1) / every))
    else:  # transformers stores one after the last step, too, and one more before it deletes
        most = int(given.get("save_total_limit", 2)) + 1
        number = most if steps is None else min(most, math.ceil(steps / _save_steps(given, steps)))
    if given.get("save_strategy") in ("no", False):
        number = 0
    if members == 1:
        return Disk(kept, number * trained)
    if METHODS.get(job.adaptation).combine == "warm":  # the members go when their mean is there
        return Disk(kept, number * trained + members * kept)
    return Disk(members * kept, number * trained)


def members_of(job: Any) -> int:
    """Return the number of models that a job trains one after another."""
    known = isinstance(job, TrainReward) and job.adaptation is not None
    return METHODS.get(job.adaptation).members if known else 1


def _save_steps(given: Mapping[str, Any], steps: int) -> float:
    every = float(given.get("save_steps", 500))
    return every * steps if every < 1 else every  # below 1: a share of the steps


def mean_tokens(rows: Sequence[Row]) -> float:
    """Mean length of a row's texts, in guessed tokens."""
    return sum(_characters(row) for row in rows) / _CHARACTERS / max(1, len(rows))


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, parts))


def operations(
    recipe: Experiment,
    stage: Stage,
    sizes: Sizes,
    steps: int | None,
    rows: Mapping[str, int | None],
    tokens: Mapping[str, float],
) -> float | None:
    """Return the floating-point operations of a stage's models.

    2 a parameter and token of a pass without gradient, 6 of one in training (with LoRA 4: the
    weights' own gradients are saved). Responses count at full length.

    Args:
        rows, tokens: of each data set, how many rows and how long they are.

    Returns:
        0 for a stage without models; None where its data is not on this machine.
    """
    job = job_of(stage)
    if job is None:
        return (
            0.0
            if not stage.name.endswith("evaluation")
            else _evaluation(recipe, sizes, rows, tokens)
        )
    train = 6 if sizes.policy_adapters is None else 4
    policy, reward = sizes.policy, sizes.reward
    answer = tokens.get("prompts", math.nan) + recipe.sampling.max_new_tokens
    if isinstance(job, MetaTrain | MetaTest | External):
        return None
    if isinstance(job, Sample):
        made = _sampled(recipe, job, rows)
        return None if made is None or math.isnan(answer) else 2.0 * policy * made * answer
    if steps is None:
        return None
    given = settings_of(stage)
    method = getattr(job, "method", None)
    if method == "ppo":
        from shiftrm.policies.ppo_config import PPOConfig

        default = PPOConfig()
        batch = int(given.get("prompts_per_step", default.prompts_per_step))
        batch *= int(given.get("rollouts_per_prompt", default.rollouts_per_prompt))
        updates = train * int(given.get("epochs", default.epochs)) * (policy + reward)
        # Sampled, then passes of policy, reference, critic and reward model, then the updates.
        each = 6 * policy + 4 * reward + updates
        found = steps * batch * answer * each
    elif method in ("rloo", "grpo"):
        found = steps * recipe.policy.batch_size * answer * ((6 + train) * policy + 2 * reward)
    elif method == "dpo":
        found = steps * recipe.dpo.batch_size * tokens.get("pairs", math.nan) * (2 + train) * policy
    elif isinstance(job, Sft):
        batch = recipe.sft.batch_size if recipe.sft is not None else 0
        found = steps * batch * tokens.get("demonstrations", math.nan) * train * policy
    else:  # MetaRM: groups about as large as the pairs, and the look ahead
        passes = 1 if job.groups is None else 2
        found = steps * recipe.reward.batch_size * tokens.get("pairs", math.nan) * train * reward
        found *= passes
    return None if math.isnan(found) else float(found)


def _evaluation(
    recipe: Experiment, sizes: Sizes, rows: Mapping[str, int | None], tokens: Mapping[str, float]
) -> float | None:
    """Three sets of responses scored, and the KL of one of them."""
    prompts, length = rows["eval_prompts"], tokens.get("prompts", math.nan)
    if prompts is None or math.isnan(length):
        return None
    made = min(recipe.evaluation.prompts, prompts) * recipe.evaluation.responses
    length += recipe.sampling.max_new_tokens
    return float(made * length * (6 * sizes.reward + 4 * sizes.policy))


def _sampled(recipe: Experiment, job: Sample, rows: Mapping[str, int | None]) -> int | None:
    """Return the number of responses that a `sample` stage draws."""
    file = job.prompts.file if isinstance(job.prompts, Made) else str(job.prompts)
    name, limit = Path(file).stem, None
    if name not in rows:  # a share of a data set
        measured = recipe.evaluation
        name, limit = {
            "best_of_n_prompts": ("eval_prompts", measured.best_of_n_prompts),
        }.get(name, ("prompts", recipe.groups.prompts))
    there = rows[name]
    if there is None:
        return None
    prompts = min(there, limit) if isinstance(limit, int) else there
    return prompts * job.responses


def speed() -> float:
    """Operations a second of one matrix product in fp32 on this machine, now."""
    import torch

    from shiftrm.models.loading import accelerator

    device = accelerator() or torch.device("cpu")
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the accelerator
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def time_note(rate: float, processes: int) -> str:
    """How the times were guessed."""
    shared = f", shared by {processes} processes" if processes > 1 else ""
    return (
        f"Time is a guess: parameters times tokens at the {rate / 1e9:,.0f} billion operations a "
        f"second that a matrix product in fp32 reaches on this machine now{shared}; a token taken "
        f"as {_CHARACTERS} characters, every response at full length. Small models, sampling, "
        "loading and busy machines take several times as long, bf16 on a GPU less; judges and "
        "embedders are not counted."
    )
