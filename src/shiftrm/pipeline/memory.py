"""Memory of a stage: models, what passes keep, caches of sampling, and the libraries.

Models are weights, gradients and the two moments of AdamW in fp32, 4 bytes each (autocast keeps
the weights in fp32). The largest of a stage's passes comes on top; see `working_memory`.
"""

from collections.abc import Mapping

from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.job_checks import job_of, settings_of
from shiftrm.pipeline.jobs import MetaTest, MetaTrain, Optimise, Sample, Sft, TrainReward
from shiftrm.pipeline.passes import Passes
from shiftrm.pipeline.resources import Sizes
from shiftrm.world.world import gold_world

__all__ = ["LIBRARIES", "MEMORY_NOTE", "stage_memory", "working_memory"]

FP32 = 4  # bytes
TRAINED = 4 * FP32  # weight, gradient, AdamW's two moments

LIBRARIES = 550 * 2**20
"""What a process takes in which torch and transformers are loaded and nothing else."""

MEMORY_NOTE = (
    "Memory is of one process that is not sharded: weights, gradients and optimizer states in "
    "fp32, what passes keep at the longest rows, caches of sampling, and half a GiB of libraries. "
    "With bf16, autocast's copies of weights come on top and activations are smaller; models of "
    "judges and embedders, and a server's, are not counted."
)


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


def working_memory(
    stage: Stage, sizes: Sizes, longest: Mapping[str, float], max_new_tokens: int
) -> int:
    """Bytes of a stage's largest pass, beside its models; 0 where it holds none.

    Args:
        longest: the most tokens of a row of each data set that reaches a model.
        max_new_tokens: of a response.
    """
    passes, job = sizes.passes, job_of(stage)
    if passes is None or stage_memory(stage, sizes) == 0:
        return 0
    at_once = int(stage.execution["sampling_batch_size"])
    prompt = longest.get("prompts", 0.0)
    if job is None:  # rewards, then the KL with logits of both policies
        scored = at_once * (prompt + max_new_tokens) * passes.moment
        return round(scored + _logits(passes, 2 * at_once * max_new_tokens))
    if isinstance(job, Sample):
        prompts = int(settings_of(stage).get("batch_size", at_once))
        return round(_sampling(passes, prompts * job.responses, prompt + max_new_tokens))
    if isinstance(job, MetaTrain | MetaTest):
        return 0
    if isinstance(job, Optimise) and job.method == "ppo":
        return round(_ppo(stage, passes, prompt, max_new_tokens))
    way = stage.execution["way"]
    kept = passes.kept_inputs if way["gradient_checkpointing"] else passes.kept
    rows = int(way["per_device_train_batch_size"])
    if isinstance(job, TrainReward):
        of_pairs = rows * longest.get("pairs", 0.0) * kept
        return round(max(of_pairs, 2 * rows * longest.get("heldout", 0.0) * passes.moment))
    name = "demonstrations" if isinstance(job, Sft) else "pairs"
    tokens = longest.get(name, prompt + max_new_tokens)
    if isinstance(job, Optimise) and job.method != "dpo":
        tokens = prompt + max_new_tokens
    # TRL computes logits of all tokens: with their gradient and the log-softmax, three of them.
    return round(rows * tokens * (kept + 3 * FP32 * passes.vocabulary))


def _sampling(passes: Passes, rows: int, length: float) -> float:
    """Keys and values of all rows, and the logits of their next tokens in a few copies."""
    return rows * (length * passes.cache + 4 * FP32 * passes.vocabulary)


def _logits(passes: Passes, states: float) -> float:
    from shiftrm.policies.ppo_rows import LOGITS_AT_ONCE

    return FP32 * min(2 * LOGITS_AT_ONCE, states * passes.vocabulary)


def _ppo(stage: Stage, passes: Passes, prompt: float, new: int) -> float:
    """The largest of sampling, the passes before an update, and an update.

    An update computes a prompt once for its roll-outs, and logits of responses only, in chunks.
    """
    from shiftrm.policies.ppo_config import PPOConfig
    from shiftrm.policies.ppo_passes import LOGITS_IN_CHUNK
    from shiftrm.policies.ppo_rows import LEAST_SHARED

    given = {**stage.execution["way"], **settings_of(stage)}
    default = PPOConfig()

    def number(name: str) -> int:
        value = given.get(name, getattr(default, name))
        return int(value) if value is not None else 0

    answers = number("rollouts_per_prompt")
    all_rows = number("prompts_per_step") * answers
    at_once = min(all_rows, number("forward_batch_size"))
    rows = min(number("minibatch_size"), number("micro_batch_size") or all_rows, all_rows)
    shares = prompt * (1 - 1 / answers) >= LEAST_SHARED
    prompts = min(rows, -(-rows // answers) + 1) if shares else rows
    kept = passes.kept_inputs if given.get("gradient_checkpointing") else passes.kept
    states = rows * new
    logits = FP32 * min(3 * states * passes.vocabulary, 4 * LOGITS_IN_CHUNK)
    update = (prompts * prompt + states) * kept + logits
    before = _logits(passes, 2 * at_once * new)
    return max(_sampling(passes, at_once, prompt + new), before, update)


def _trained(size: int, adapters: int | None) -> int:
    return TRAINED * size if adapters is None else FP32 * size + TRAINED * adapters
