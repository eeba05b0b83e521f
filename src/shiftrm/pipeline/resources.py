"""The disk space of a stage and an estimate of its time, for `estimate`."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shiftrm.data.negatives import NEGATIVES
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
from shiftrm.pipeline.passes import Passes, guess_passes

__all__ = [
    "Disk",
    "Sizes",
    "disk_of",
    "members_of",
    "operations",
    "seconds",
    "speed",
    "time_note",
]

OVERHEAD, OVERHEAD_PPO = 1.5, 2.5
"""Time of a stage on a CPU over that of its matrix products; docs/smollm2.md has measurements."""

TO_BEGIN = {True: 3.0, False: 10.0}
"""Seconds of a stage before its first pass, in a worker or in a process of its own: imports and
weights. PPO, with two models and its checks of them, takes twice as long."""

_BYTES = {"bfloat16": 2, "float16": 2}
"""Bytes per number by dtype; others take 4."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of the policy, of a reward model on it, and of the adapters of each (LoRA).

    Attributes:
        passes: what a token costs; None if it was not counted.
    """

    policy: int
    reward: int
    policy_adapters: int | None = None
    reward_adapters: int | None = None
    passes: Passes | None = None


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


def operations(
    recipe: Experiment,
    stage: Stage,
    sizes: Sizes,
    steps: int | None,
    rows: Mapping[str, int | None],
    tokens: Mapping[str, float],
) -> float | None:
    """Return the floating-point operations of a stage's models.

    Responses count at full length. A prompt is computed once for all of its responses where the
    stage does so: in sampling, in PPO and for the sides of a pair.

    Args:
        rows, tokens: of each data set, how many rows and how long they are.

    Returns:
        0 for a stage without models; None where its data is not on this machine.
    """
    job = job_of(stage)
    if isinstance(job, MetaTrain | MetaTest | External):
        return None
    passes = sizes.passes or guess_passes(sizes.policy, sizes.policy_adapters)
    cost = _Costs(recipe, passes, rows, tokens)
    if job is None:
        return cost.evaluation(stage) if stage.name.endswith("evaluation") else 0.0
    if isinstance(job, Sample):
        made = _sampled(recipe, job, rows)
        found = None if made is None else cost.sampling(*made)
    elif steps is None:
        found = None
    elif getattr(job, "method", None) == "ppo":
        found = steps * cost.ppo_step(settings_of(stage)) + cost.reward_scale(job)
    elif getattr(job, "method", None) in ("rloo", "grpo"):
        batch = recipe.policy.batch_size
        found = steps * batch * (cost.answer * (2 * passes.forward + passes.training))
        found += steps * cost.sampling(batch, 1)
    elif getattr(job, "method", None) == "dpo":
        each = tokens.get("pairs", math.nan) * (passes.forward + passes.training + 4 * passes.head)
        found = steps * recipe.dpo.batch_size * each
    elif isinstance(job, Sft):
        batch = recipe.sft.batch_size if recipe.sft is not None else 0
        each = tokens.get("demonstrations", math.nan) * (passes.training + 3 * passes.head)
        found = steps * batch * each
    else:
        found = steps * cost.reward_step(job) + cost.held_out(stage, steps)
    return None if found is None or math.isnan(found) else float(found)


@dataclass(frozen=True)
class _Costs:
    """Operations of the parts of stages; NaN where rows or lengths are not known."""

    recipe: Experiment
    passes: Passes
    rows: Mapping[str, int | None]
    tokens: Mapping[str, float]

    @property
    def prompt(self) -> float:
        return self.tokens.get("prompts", math.nan)

    @property
    def new(self) -> int:
        return self.recipe.sampling.max_new_tokens

    @property
    def answer(self) -> float:
        return self.prompt + self.new

    def sampling(self, prompts: float, responses: int) -> float:
        """Each prompt read once, then a token at a time."""
        passes = self.passes
        token = passes.forward + passes.head
        return prompts * (self.prompt * passes.forward + responses * self.new * token)

    def ppo_step(self, given: Mapping[str, Any]) -> float:
        """Sampling, rewards, the passes before the update, and the updates."""
        from shiftrm.policies.ppo_config import PPOConfig

        default, passes = PPOConfig(), self.passes
        prompts = int(given.get("prompts_per_step", default.prompts_per_step))
        answers = int(given.get("rollouts_per_prompt", default.rollouts_per_prompt))
        epochs = int(given.get("epochs", default.epochs))
        shared = prompts * (self.prompt + answers * self.new)
        logits = prompts * answers * self.new * passes.head
        found = self.sampling(prompts, answers)
        found += prompts * answers * self.answer * passes.forward  # the reward model's own rows
        found += 3 * shared * passes.forward + 2 * logits  # policy, reference and critic
        return found + epochs * (2 * shared * passes.training + 4 * logits)

    def reward_scale(self, job: Any) -> float:
        """Responses of the reference that are sampled and scored where no scale is given."""
        from shiftrm.policies.text_rewards import SCALE_SAMPLES

        if job.scale is not None or {"reward_mean", "reward_std"} <= job.settings.keys():
            return 0.0
        scored = SCALE_SAMPLES * self.answer * self.passes.forward
        return self.sampling(SCALE_SAMPLES, 1) + scored

    def reward_step(self, job: TrainReward) -> float:
        """A batch of pairs; with groups about as many tokens again, and the look ahead."""
        batch = self.recipe.reward.batch_size * self.tokens.get("pairs", math.nan)
        return batch * self.passes.training * (1 if job.groups is None else 2)

    def held_out(self, stage: Stage, steps: int) -> float:
        """The held-out pairs before, after, and at every evaluation between."""
        rows, each = self.rows.get("heldout"), self.tokens.get("heldout", math.nan)
        if rows is None or math.isnan(each):
            return 0.0
        given = settings_of(stage)
        every = float(given.get("eval_steps") or given.get("logging_steps", 500))
        every = every * steps if every < 1 else every
        between = math.floor(steps / every) if given.get("eval_strategy") == "steps" else 0
        return rows * each * self.passes.forward * (2 + between)

    def evaluation(self, stage: Stage) -> float | None:
        """Three sets of responses and the held-out pairs scored, sight tests, and the KL."""
        prompts, measured = self.rows["eval_prompts"], self.recipe.evaluation
        if prompts is None or math.isnan(self.prompt):
            return None
        made = min(measured.prompts, prompts) * measured.responses
        # Each kind of sight test has texts of its own; the originals are scored once.
        kinds = len(stage.settings.get("sight_kinds") or NEGATIVES.names())
        tests = 2 * (min(measured.sight_pairs, made) * kinds + made) if measured.sight_pairs else 0
        scored = (3 * made + tests) * self.answer
        scored += (self.rows.get("heldout") or 0) * self.tokens.get("heldout", 0.0)
        found = scored * self.passes.forward
        if stage.settings["policy_stage"] is not None:
            found += 2 * made * (self.answer * self.passes.forward + self.new * self.passes.head)
        return float(found)


def _sampled(
    recipe: Experiment, job: Sample, rows: Mapping[str, int | None]
) -> tuple[int, int] | None:
    """Return the number of prompts that a `sample` stage answers, and of responses to each."""
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
    return (min(there, limit) if isinstance(limit, int) else there), job.responses


def speed() -> float:
    """Operations a second of one matrix product in fp32 on this machine.

    On a CPU by the time that the process itself computes: another one beside it does not count.
    """
    import torch

    from shiftrm.models.loading import accelerator

    device = accelerator() or torch.device("cpu")
    on_cpu = device.type == "cpu"
    n = 1024 if on_cpu else 8192
    clock = time.process_time if on_cpu else time.perf_counter
    a = torch.ones(n, n, device=device)
    best = math.inf
    for _ in range(3):
        began = clock()
        float((a @ a)[0, 0])  # waits for the accelerator
        best = min(best, clock() - began)
    return 2 * n**3 / best * (torch.get_num_threads() if on_cpu else 1)


def seconds(stage: Stage, operations: float | None, rate: float) -> float | None:
    """Return the time of a stage at this many operations a second; 0 if it has no models."""
    if not operations:
        return operations
    begin = TO_BEGIN[bool(stage.execution["in_process"])]
    if getattr(job_of(stage), "method", None) == "ppo":
        return 2 * begin + OVERHEAD_PPO * operations / rate
    return begin + OVERHEAD * operations / rate


def time_note(rate: float, processes: int, *, in_process: bool) -> str:
    """How the times were guessed."""
    shared = f", shared by {processes} processes" if processes > 1 else ""
    return (
        f"Time is a guess: the operations of all passes at the {rate / 1e9:,.0f} billion a second "
        f"that a matrix product in fp32 reaches on this machine when nothing else runs{shared}, "
        f"times {OVERHEAD:g} (PPO: {OVERHEAD_PPO:g}) for all that is none, and "
        f"{TO_BEGIN[in_process]:g} s a stage to load models; every response at full length. bf16 "
        "on a GPU takes less; judges and embedders are not counted."
    )
