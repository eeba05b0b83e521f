"""The outcome of a policy training: KL to the reference, summary, and README.md."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shiftrm.models.rendering import encode_prompt
from shiftrm.models.rope import context_limit
from shiftrm.models.sampling import SamplingConfig, generate
from shiftrm.policies.ppo_math import exact_token_kl
from shiftrm.policies.rollouts import Problem
from shiftrm.progress import task
from shiftrm.trainers.model_card import TrainedModel, markdown_table

__all__ = [
    "AdapterOff",
    "MeasuredKL",
    "PolicyOutcome",
    "measure_kl",
    "policy_card",
    "policy_summary",
]


@dataclass(frozen=True)
class MeasuredKL:
    """Sequence KL of a policy to its reference.

    Attributes:
        kl: mean over the samples, in nats per response.
        standard_error: standard error of that mean.
        samples: number of responses.
    """

    kl: float
    standard_error: float
    samples: int


class AdapterOff:
    """Runs a LoRA policy with its adapter off, as a reference without a second copy in memory."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.config = policy.config

    def forward(self, **inputs: Any) -> Any:
        with self.policy.disable_adapter():
            return self.policy(**inputs)

    __call__ = forward

    def get_base_model(self) -> Any:
        """Return the base model, whose forward declares the arguments."""
        return self.policy.get_base_model()

    def parameters(self) -> Any:
        return self.policy.parameters()


@task("measuring the KL", None)
def measure_kl(
    problem: Problem, *, samples: int, max_new_tokens: int, batch_size: int, seed: int
) -> MeasuredKL | None:
    """Measure the KL to the reference on responses of the policy (temperature 1, top-p 1).

    Args:
        problem: prompts that leave room for a response are drawn from it, with replacement.
        samples: number of responses, one per prompt.
        batch_size: responses sampled at once; changing it changes the draws.

    Returns:
        The mean of `ppo_math.exact_token_kl`; None if no prompt leaves room in the context.
    """
    policy, tokenizer = problem.policy, problem.tokenizer
    reference = AdapterOff(policy) if problem.reference is None else problem.reference
    limit = context_limit(policy.config)
    longest = math.inf if limit is None else limit - max_new_tokens
    encoded = [encode_prompt(tokenizer, prompt) for prompt in problem.prompts]
    fitting = [ids for ids in encoded if 0 < len(ids) <= longest]
    if not fitting or samples < 1:
        return None
    rng = random.Random(f"kl/{seed}")
    drawn = [rng.choice(fitting) for _ in range(samples)]
    found = []
    for start in range(0, samples, batch_size):
        rows = generate(
            policy,
            tokenizer,
            drawn[start : start + batch_size],
            config=SamplingConfig(max_new_tokens=max_new_tokens),
            seed=rng.getrandbits(31),
        )
        found.append(exact_token_kl(policy, reference, rows, batch_size=batch_size))
    kl_B = torch.cat(found).double()
    spread = float(kl_B.std()) if len(kl_B) > 1 else 0.0
    return MeasuredKL(float(kl_B.mean()), spread / len(kl_B) ** 0.5, len(kl_B))


TITLES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimisation (DPO)",
    "ppo": "PPO against a reward model",
    "rloo": "RLOO against a reward model",
    "grpo": "GRPO against a reward model",
}


@dataclass
class PolicyOutcome(TrainedModel):
    """The contents of card and summary.

    Attributes:
        method: a key of `TITLES`.
        examples: number of training rows used; the first data set is the training data.
        dropped: number of dropped rows by reason.
        log: the rows of training_log.jsonl.
        kl: KL to the reference after training; None if not measured.
    """

    method: str
    examples: int
    dropped: Mapping[str, int]
    log: Sequence[Mapping[str, Any]]
    reference: str | None = None
    reward: str | None = None
    kl: MeasuredKL | None = None
    notes: list[str] = field(default_factory=list)


def policy_summary(outcome: PolicyOutcome) -> str:
    """Return the text that `shiftrm sft` and `shiftrm optimise` print at the end."""
    return "\n".join([*_sentences(outcome), f"Policy: {outcome.output}"])


def _sentences(outcome: PolicyOutcome) -> list[str]:
    what = outcome.data[0].name
    count = sum(outcome.dropped.values())
    lines = [
        f"{TITLES[outcome.method]} on {outcome.examples} {what} ({count} dropped) for "
        f"{outcome.steps} steps."
    ]
    if count:
        reasons = "; ".join(f"{n} {reason}" for reason, n in outcome.dropped.items() if n)
        lines.append(f"Dropped from the {what}: {reasons}.")
    shown = SHOWN if outcome.method in ("sft", "dpo") else SHOWN_OF_REWARDS
    lines += [_change(outcome.log, *words) for words in shown if _series(outcome.log, words[0])]
    if outcome.kl is not None:
        lines.append(
            f"KL to the reference at the end: {outcome.kl.kl:.3g} nats a response (standard error "
            f"{outcome.kl.standard_error:.2g}, {outcome.kl.samples} responses)."
        )
    return lines + outcome.notes


SHOWN = (
    ("loss", "Loss"),
    ("rewards/accuracies", "Share of pairs ordered as they should be"),
)
SHOWN_OF_REWARDS = (("reward", "Mean reward"),)  # their loss is not informative


def _series(log: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [row[metric] for row in log if metric in row]


def _change(log: Sequence[Mapping[str, Any]], metric: str, words: str) -> str:
    values = _series(log, metric)
    if len(values) == 1:
        return f"{words}: {values[0]:.4g}."
    return f"{words}: {values[0]:.4g} at the first log, {values[-1]:.4g} at the last."


def policy_card(outcome: PolicyOutcome) -> str:
    """Return README.md: inputs, settings and measurements. Needs no network."""
    made_of = [("started from", outcome.model)]
    made_of += [("reference", outcome.reference)] if outcome.reference else []
    made_of += [("reward model", outcome.reward)] if outcome.reward else []
    lora = "LoRA was merged into these weights; the adapter alone is in `adapter/`."
    return outcome.card(
        [
            f"# {TITLES[outcome.method]} from {outcome.model}",
            "An ordinary causal language model that transformers loads. The log of all steps is in "
            "`training_log.jsonl`.",
            "\n".join([*_sentences(outcome), *([lora] if outcome.lora else [])]),
            markdown_table(("model", "from"), [(what, f"`{name}`") for what, name in made_of]),
        ],
        pipeline_tag="text-generation",
        tags=["shiftrm", outcome.method],
    )
