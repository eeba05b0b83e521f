"""Estimates before a run starts: rows, optimizer steps, memory, and requests to a judge."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.pipeline.data_sets import assembled, place_of, read_source
from shiftrm.pipeline.domain_section import DomainSection
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.inputs import KINDS
from shiftrm.pipeline.job_checks import job_of, settings_of
from shiftrm.pipeline.jobs import External, MetaTrain, Optimise, Sft, TrainReward
from shiftrm.pipeline.memory import LIBRARIES, stage_memory, working_memory
from shiftrm.pipeline.passes import count_passes
from shiftrm.pipeline.resources import Disk, Sizes, disk_of, members_of, operations
from shiftrm.pipeline.row_lengths import Lengths, lengths_of, spelling_of
from shiftrm.world.build import WorldConfig, base_model_config
from shiftrm.world.language import MAX_RESPONSE_TOKENS

__all__ = [
    "Estimate",
    "Sizes",
    "StageEstimate",
    "estimate",
    "judging_cost",
    "sizes_of",
]

DOMAIN_PROMPT_TOKENS = 8
"""Such as "describe the garden with roses and soil :"."""

_ANSWER_TOKENS = 200  # of a judge that compares before it decides; a guess until it has answered


@dataclass(frozen=True)
class StageEstimate:
    """The needs of one stage; None if unknown until the data or the model is there.

    Attributes:
        steps: optimizer steps (PPO: batches of roll-outs).
        memory: bytes per process, see `memory.MEMORY_NOTE`.
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
        rows, lengths, exact = _domain_rows(recipe.domains)
        sizes = sizes_of(_world_model(recipe.domains.world.model()), recipe.lora)
    elif recipe.world is None:
        rows, lengths, exact = _rows(recipe, stages[0])
        sizes = sizes_of(str(recipe.model), recipe.lora)
    else:
        rows, lengths, exact = _world_rows(recipe, stages[0])
        sizes = sizes_of(_world_model(recipe.world), recipe.lora)
    found = []
    for stage in stages:
        steps = _steps(recipe, stage, rows)
        disk: Disk | None = disk_of(stage, sizes or Sizes(1, 1), steps)
        work = operations(recipe, stage, sizes or Sizes(1, 1), steps, rows, lengths.mean)
        if sizes is None:  # none at all can be told even so
            disk, work = (None if disk and disk.kept else disk), None if work else work
        memory = _memory(recipe, stage, lengths, sizes)
        found.append(StageEstimate(stage.name, steps, memory, disk, work))
    return Estimate(rows, exact, sizes, tuple(found))


# -- rows ----------------------------------------------------------------------------------------


def _rows(recipe: Experiment, data: Stage) -> tuple[dict[str, int | None], Lengths, bool]:
    """How many rows each data set has, how long they are, and whether the count is exact."""
    settings = data.settings
    used = [name for name in KINDS if name != "demonstrations" or recipe.sft is not None]
    local = {
        name: settings[name] is not None and Path(place_of(settings[name])).exists()
        for name in used
    }
    if all(local[name] for name in used if settings[name] is not None):
        # As `StageContext.random_seed` of the stage "data" draws.
        found = assembled(settings, seed=random_seed(recipe.seed, "splits"))
        there = {name: found[name].rows for name in used}
        return {name: len(there[name]) for name in used}, _lengths(recipe, there), True
    rows: dict[str, int | None] = {}
    there = {}
    for name in used:
        rows[name] = None
        if local[name]:
            there[name] = read_source(settings[name], KINDS[name]).rows
            limit = settings.get(f"max_{name}")
            rows[name] = len(there[name]) if limit is None else min(limit, len(there[name]))
    return rows, _lengths(recipe, there), False


def _lengths(recipe: Experiment, rows: dict[str, list[Row]]) -> Lengths:
    """How long the rows are that reach a model: longer pairs and prompts are dropped."""
    longest = {
        "pairs": recipe.reward.settings.get("max_length", 1024),
        "heldout": recipe.reward.settings.get("max_length", 1024),
        "demonstrations": (recipe.sft.settings if recipe.sft else {}).get("max_length", 1024),
        "prompts": recipe.policy.settings.get("max_prompt_length"),
    }
    return lengths_of(rows, longest, spelling_of(str(recipe.model), rows.get("prompts", [])))


def _domain_rows(
    section: DomainSection,
) -> tuple[dict[str, int | None], Lengths, bool]:
    """Rows and tokens of the gold world's domains."""
    world = section.world
    rows: dict[str, int | None] = {"demonstrations": world.sft_examples}
    rows["pairs"] = world.pairs * len(section.sources)
    whole = float(DOMAIN_PROMPT_TOKENS + MAX_RESPONSE_TOKENS)
    return rows, Lengths({"demonstrations": whole, "pairs": 2 * whole}, {}), False


def _world_rows(recipe: Experiment, data: Stage) -> tuple[dict[str, int | None], Lengths, bool]:
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
    return rows, Lengths(tokens, tokens), False


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


def sizes_of(model: Any, lora: Mapping[str, Any] | None, *, tokens: int = 128) -> Sizes | None:
    """Count the parameters on the networks themselves, without making their weights.

    Args:
        model: folder, hub name, or configuration.
        tokens: of the row on which passes are counted.

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
        return Sizes(
            policy_size, reward_size, passes=count_passes(policy, policy_size, None, tokens=tokens)
        )
    policy = _adapted(policy, lora, "CAUSAL_LM")
    adapters = _trained_of(policy)
    return Sizes(
        policy_size,
        reward_size,
        adapters,
        _trained_of(_adapted(reward, lora, "SEQ_CLS")),
        count_passes(policy, policy_size, adapters, tokens=tokens),
    )


def _count(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def _trained_of(network: Any) -> int:
    """What LoRA trains, a reward model's head included."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _adapted(network: Any, lora: Mapping[str, Any], task: str) -> Any:
    import torch
    from peft import get_peft_model
    from trl import ModelConfig, get_peft_config

    try:
        config = get_peft_config(ModelConfig(use_peft=True, lora_task_type=task, **lora))
        with torch.device("meta"):
            return get_peft_model(network, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {str(error).splitlines()[0]}") from None


def _memory(
    recipe: Experiment, stage: Stage, lengths: "Lengths", sizes: Sizes | None
) -> int | None:
    if isinstance(job_of(stage), External):  # the other program's
        return None
    if sizes is None:  # none at all can be told even so
        return None if stage_memory(stage, Sizes(1, 1, 1, 1)) else 0
    models = stage_memory(stage, sizes)
    if not models:
        return 0
    most = recipe.sampling.max_new_tokens
    return LIBRARIES + models + working_memory(stage, sizes, lengths.longest, most)


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
