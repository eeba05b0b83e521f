"""Estimates before a run starts: rows, optimizer steps, memory, and requests to a judge.

Memory is counted from the number of parameters: weights, gradients and the two moments of AdamW in
fp32, 4 bytes each (autocast keeps the weights in fp32).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.pipeline.data_sets import assembled, place_of, read_source
from shiftrm.pipeline.domain_section import DomainSection
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.inputs import KINDS
from shiftrm.pipeline.job_checks import job_of, settings_of
from shiftrm.pipeline.jobs import External, MetaTest, MetaTrain, Optimise, Sample, Sft, TrainReward
from shiftrm.pipeline.resources import Disk, Sizes, disk_of, mean_tokens, members_of, operations
from shiftrm.world.build import WorldConfig, base_model_config
from shiftrm.world.language import MAX_RESPONSE_TOKENS
from shiftrm.world.world import gold_world

__all__ = [
    "MEMORY_NOTE",
    "Estimate",
    "Sizes",
    "StageEstimate",
    "estimate",
    "judging_cost",
    "sizes_of",
    "stage_memory",
]

FP32 = 4  # bytes
TRAINED = 4 * FP32  # weight, gradient, AdamW's two moments

DOMAIN_PROMPT_TOKENS = 8
"""Such as "describe the garden with roses and soil :"."""

MEMORY_NOTE = (
    "Memory is of weights, gradients and optimizer states in fp32, for one process that is not "
    "sharded. Activations, caches of sampling and (with bf16) autocast's copies of weights come on "
    "top; models of judges and embedders, and a server's, are not counted."
)

_ANSWER_TOKENS = 200  # of a judge that compares before it decides; a guess until it has answered


@dataclass(frozen=True)
class StageEstimate:
    """The needs of one stage; None if unknown until the data or the model is there.

    Attributes:
        steps: optimizer steps (PPO: batches of roll-outs).
        memory: bytes per process, see `MEMORY_NOTE`.
        disk: what the stage stores.
        operations: see `resources.operations`.
    """

    stage: str
    steps: int | None
    memory: int | None
    disk: Disk | None
    operations: float | None


@dataclass(frozen=True)
class Estimate:
    """The result of `estimate`.

    Attributes:
        rows: by data set; None where it is not on this machine.
        exact: whether the rows are counted as the run counts them, after limits, splits and drops.
            Otherwise a data set is not on this machine, and the counts are upper bounds.
    """

    rows: dict[str, int | None]
    exact: bool
    sizes: Sizes | None
    stages: tuple[StageEstimate, ...]

    @property
    def parameters(self) -> int | None:
        return None if self.sizes is None else self.sizes.policy


def estimate(recipe: Experiment, stages: list[Stage]) -> Estimate:
    """Read local data and the model's configuration; what only the hub has stays unknown."""
    if recipe.domains is not None:
        rows, tokens, exact = _domain_rows(recipe.domains)
        sizes = sizes_of(_world_model(recipe.domains.world.model()), recipe.lora)
    elif recipe.world is None:
        rows, tokens, exact = _rows(recipe, stages[0])
        sizes = sizes_of(str(recipe.model), recipe.lora)
    else:
        rows, tokens, exact = _world_rows(recipe, stages[0])
        sizes = sizes_of(_world_model(recipe.world), recipe.lora)
    found = []
    for stage in stages:
        steps = _steps(recipe, stage, rows)
        disk: Disk | None = disk_of(stage, sizes or Sizes(1, 1), steps)
        work = operations(recipe, stage, sizes or Sizes(1, 1), steps, rows, tokens)
        if sizes is None:  # none at all can be told even so
            disk, work = (None if disk and disk.kept else disk), None if work else work
        found.append(StageEstimate(stage.name, steps, _memory(stage, sizes), disk, work))
    return Estimate(rows, exact, sizes, tuple(found))


# -- rows ----------------------------------------------------------------------------------------


def _rows(recipe: Experiment, data: Stage) -> tuple[dict[str, int | None], dict[str, float], bool]:
    """How many rows each data set has, how many tokens a row, and whether the count is exact."""
    settings = data.settings
    used = [name for name in KINDS if name != "demonstrations" or recipe.sft is not None]
    local = {
        name: settings[name] is not None and Path(place_of(settings[name])).exists()
        for name in used
    }
    if all(local[name] for name in used if settings[name] is not None):
        # As `StageContext.random_seed` of the stage "data" draws.
        found = assembled(settings, seed=random_seed(recipe.seed, "splits"))
        lengths = {name: mean_tokens(found[name].rows) for name in used}
        return {name: len(found[name].rows) for name in used}, lengths, True
    rows: dict[str, int | None] = {}
    tokens: dict[str, float] = {}
    for name in used:
        rows[name] = None
        if local[name]:
            read = read_source(settings[name], KINDS[name]).rows
            count, tokens[name] = len(read), mean_tokens(read)
            limit = settings.get(f"max_{name}")
            rows[name] = count if limit is None else min(limit, count)
    return rows, tokens, False


def _domain_rows(
    section: DomainSection,
) -> tuple[dict[str, int | None], dict[str, float], bool]:
    """Rows and tokens of the gold world's domains."""
    world = section.world
    rows: dict[str, int | None] = {"demonstrations": world.sft_examples}
    rows["pairs"] = world.pairs * len(section.sources)
    whole = float(DOMAIN_PROMPT_TOKENS + MAX_RESPONSE_TOKENS)
    return rows, {"demonstrations": whole, "pairs": 2 * whole}, False


def _world_rows(
    recipe: Experiment, data: Stage
) -> tuple[dict[str, int | None], dict[str, float], bool]:
    """Rows and tokens of the gold world; pairs of equal responses will be dropped."""
    world, settings = recipe.world, data.settings
    assert world is not None
    rows: dict[str, int | None] = {
        "demonstrations": world.sft_examples,
        "pairs": world.pairs,
        "heldout": world.heldout_pairs,
        "prompts": world.policy_prompts,
        **settings["evaluated"],
        **{name: count for name, (_, count) in settings["draws"].items()},
    }
    prompt = float(world.world.prompt_tokens)
    whole = prompt + world.world.max_response_tokens
    tokens = dict.fromkeys(rows, prompt)
    tokens |= {"demonstrations": whole, "pairs": 2 * whole, "heldout": 2 * whole}
    return rows, tokens, False


# -- steps ---------------------------------------------------------------------------------------


def _steps(recipe: Experiment, stage: Stage, rows: Mapping[str, int | None]) -> int | None:
    given = settings_of(stage)
    if not given:
        return None
    job = job_of(stage)
    method = getattr(job, "method", None)
    if method == "ppo":
        from shiftrm.policies.ppo_config import PPOConfig

        return int(given.get("steps", PPOConfig().steps))
    if int(given.get("max_steps", -1)) > 0:
        return int(given["max_steps"]) * members_of(job)
    if isinstance(job, MetaTrain):
        from shiftrm.oodpl.meta_config import OODPLConfig

        return OODPLConfig.max_steps
    section, name = {
        Sft: (recipe.sft, "demonstrations"),
        TrainReward: (recipe.reward, "pairs"),
        "dpo": (recipe.dpo, "pairs"),
        "rloo": (recipe.policy, "prompts"),
        "grpo": (recipe.policy, "prompts"),
    }[method or type(job)]
    count = rows[name]
    if count is None or section is None:
        return None
    config = _config_class(job)
    epochs = float(given.get("num_train_epochs", config.num_train_epochs))
    if name == "prompts":  # trl's RepeatSampler: whole batches only, each used num_iterations times
        answers = int(given.get("num_generations", config.num_generations))
        uses = int(given.get("num_iterations", config.num_iterations))
        an_epoch = count * answers // section.batch_size * uses
    else:
        an_epoch = math.ceil(count / section.batch_size)
    return members_of(job) * math.ceil(epochs * an_epoch)  # as transformers' Trainer rounds


def _config_class(job: Any) -> Any:
    from shiftrm.policies.commands import METHODS
    from shiftrm.policies.configs import SFTConfig
    from shiftrm.trainers.reward import RewardConfig

    if isinstance(job, Optimise):
        return METHODS[job.method]
    return SFTConfig if isinstance(job, Sft) else RewardConfig


# -- memory --------------------------------------------------------------------------------------


def _world_model(world: WorldConfig) -> Any:
    return base_model_config(world, world.world.tokenizer(model_max_length=world.max_positions))


def sizes_of(model: Any, lora: Mapping[str, Any] | None) -> Sizes | None:
    """Count the parameters on the networks themselves, without making their weights.

    Args:
        model: folder, hub name, or configuration.

    Returns:
        None if the model's configuration is not on this machine.

    Raises:
        UserError: adapters that do not fit the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        config = model
        if isinstance(model, str):
            config = AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(config)
            config.num_labels = 1
            reward = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError):
        return None
    policy_size, reward_size = _count(policy), _count(reward)
    if lora is None:
        return Sizes(policy_size, reward_size)
    return Sizes(
        policy_size,
        reward_size,
        _adapters(policy, lora, "CAUSAL_LM"),
        _adapters(reward, lora, "SEQ_CLS"),
    )


def _count(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def _adapters(network: Any, lora: Mapping[str, Any], task: str) -> int:
    """What LoRA trains, a reward model's head included."""
    import torch
    from peft import get_peft_model
    from trl import ModelConfig, get_peft_config

    try:
        config = get_peft_config(ModelConfig(use_peft=True, lora_task_type=task, **lora))
        with torch.device("meta"):
            adapted = get_peft_model(network, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {str(error).splitlines()[0]}") from None
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def stage_memory(stage: Stage, sizes: Sizes) -> int:
    """Bytes of a stage's models; 0 where it holds none."""
    job = job_of(stage)
    policy, reward = FP32 * sizes.policy, FP32 * sizes.reward
    if job is None:
        if "choice" in stage.settings:  # of the pairs to label
            return reward
        if stage.name.endswith("evaluation"):  # the reward model goes before the policies come
            return max(reward, 0 if stage.settings["policy_stage"] is None else 2 * policy)
        return reward if stage.name.startswith("best_of_n") else 0
    if isinstance(job, Sample):
        return 0 if job.vllm or job.server else policy
    trained = _trained(sizes.policy, sizes.policy_adapters)
    if isinstance(job, MetaTest):  # policy, reference, reward model, and a critic
        return trained + policy + reward + (_trained(sizes.reward, None) if job.way == "ppo" else 0)
    if isinstance(job, MetaTrain):  # its hypergradient keeps a copy of the policy and its gradient
        return _trained(sizes.reward, sizes.reward_adapters) + 3 * policy
    if isinstance(job, Sft):
        return trained
    critic = _trained(sizes.reward, sizes.reward_adapters)
    if isinstance(job, TrainReward):  # MetaRM holds grad J and a copy of what it shifts
        shifted = sizes.reward_adapters or sizes.reward
        return critic + (0 if job.groups is None else 2 * FP32 * shifted)
    lora = sizes.policy_adapters is not None
    reference = 0 if lora and job.policy == job.reference else policy  # its own, adapter off
    if job.method == "dpo":
        return trained + reference
    watched = job.watch is not None and gold_world(str(job.watch)) is None
    scoring = reward + (reward if watched else 0)  # a second one is taken to be as large
    if job.method != "ppo":
        return trained + reference + scoring
    if lora:  # the critic is one more adapter in the policy
        critic = TRAINED * (sizes.reward_adapters or 0)
    return trained + reference + scoring + critic


def _memory(stage: Stage, sizes: Sizes | None) -> int | None:
    if isinstance(job_of(stage), External):  # the other program's
        return None
    if sizes is None:  # none at all can be told even so
        return None if stage_memory(stage, Sizes(1, 1, 1, 1)) else 0
    return stage_memory(stage, sizes)


def _trained(size: int, adapters: int | None) -> int:
    return TRAINED * size if adapters is None else FP32 * size + TRAINED * adapters


# -- the judge -----------------------------------------------------------------------------------


def judging_cost(recipe: Experiment, eval_prompts: int | None) -> str:
    """Return the number of requests to a judge, with both orders, and their cost, in words.

    Each round against SFT on all judged prompts; at the end every two arms on half of them (the
    comparisons with SFT are in the cache by then).
    """
    judged = min(recipe.evaluation.judged, recipe.evaluation.prompts)
    if eval_prompts is not None:
        judged = min(judged, eval_prompts)
    rounds = sum(recipe.rounds_of(name) for name in recipe.methods)
    pairs_of_arms = math.comb(len(recipe.methods), 2)
    requests = 2 * (rounds * judged + pairs_of_arms * (judged - judged // 2))
    said = f"judge's requests: at most {requests:,} (identical responses are not asked)"
    judge = recipe.judge
    if judge.price_in is None and judge.price_out is None:
        return f"{said}; give judge.price_in and judge.price_out for their cost"
    # Two responses of full length and as much again for instructions and prompt.
    inner = 3 * recipe.sampling.max_new_tokens
    cost = (
        requests * (inner * (judge.price_in or 0) + _ANSWER_TOKENS * (judge.price_out or 0)) / 1e6
    )
    return (
        f"{said}; about {cost:.3g} at the given prices (guessed: {inner} tokens in, "
        f"{_ANSWER_TOKENS} out a request)"
    )
