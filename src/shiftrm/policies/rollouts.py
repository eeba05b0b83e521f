"""What policy training starts from (`Problem`), and what a PPO step samples and measures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text
from shiftrm.models.responses import Response, tokenizer_name
from shiftrm.models.reward_functions import rewards_of
from shiftrm.models.sampling import Sample, as_response, draw_seed, generate
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_update import autocast, reference_of
from shiftrm.policies.shaping import REFERENCES

__all__ = ["Problem", "RewardFunction", "Rollouts", "StepLog"]


class RewardFunction(Protocol):
    """Maps texts to rewards; `finished` is False if the length limit cut the response off.

    A `scoring.Scorer` is one. It reads the sampled tokens if it has the policy's tokenizer.
    """

    def __call__(
        self, prompts: list[Text], responses: list[str], /, *, finished: list[bool]
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Problem:
    """A policy to optimise, the model it stays close to, and what it is rewarded for.

    Attributes:
        policy: causal language model of transformers, bare or with LoRA (a `PeftModel`).
        reference: causal language model with the same vocabulary. None: the policy without its LoRA
            adapter; merge an earlier adapter of the policy before you add a new one.
        tokenizer: of the policy and the reference.
        reward_fn: a `RewardFunction`; the reward model may have another tokenizer. None where no
            reward is needed.
    """

    policy: Any
    reference: Any
    tokenizer: Any
    prompts: Sequence[Text]
    reward_fn: Any = None


@dataclass(frozen=True)
class Rollouts:
    """The samples of one step; the responses to one prompt are adjacent.

    Attributes:
        prompts, responses: texts, one entry per response.
        finished: False if the length limit cut the response off.
        rewards: raw output of the reward function.
        samples: the same responses as tokens.
        tokenizer: `responses.tokenizer_name` of the tokenizer that the tokens belong to.
        references: rewards of the reference's responses to the same prompt, one list per response;
            empty lists without reward shaping.
    """

    prompts: list[Text]
    responses: list[str]
    finished: list[bool]
    rewards: list[float]
    samples: list[Sample]
    tokenizer: str
    references: list[list[float]] = field(default_factory=list)

    @classmethod
    def join(cls, scored: Sequence["Scored"], tokenizer: Any) -> "Rollouts":
        """Return the samples of all processes in the order of their chunks."""
        ordered = sorted(scored, key=lambda one: one.place)
        return cls(
            prompts=[one.prompt for one in ordered],
            responses=[one.text for one in ordered],
            finished=[one.sample.finished for one in ordered],
            rewards=[one.reward for one in ordered],
            samples=[one.sample for one in ordered],
            tokenizer=tokenizer_name(tokenizer),
            references=[one.references for one in ordered],
        )

    def as_responses(self) -> list[Response]:
        """Return texts with their sampled tokens, for another reward function."""
        ids = [sample.response_ids for sample in self.samples]
        columns = zip(self.prompts, self.responses, self.finished, ids, strict=True)
        return [Response(*row, self.tokenizer) for row in columns]


@dataclass(frozen=True)
class StepLog:
    """Measurements of one step, all on the policy before the update.

    Attributes:
        step: counts from 1.
        score_mean: mean raw reward.
        standardised_mean: `(reward - reward_mean) / reward_std`.
        shaped_mean: mean of the shaped rewards; None without `reward_shaping`.
        kl: sequence KL to the reference in nats, mean over the responses of the sum over their
            states of KL(pi || pi_ref) over the whole vocabulary. Never negative, whatever the
            sampling. Unbiased for the policy's KL if sampling does not modify the policy
            (temperature 1, top-p 1, no penalty), else the KL over the visited states. Input of
            the controller.
        kl_sampled: the estimate `sum_t log pi/pi_ref` over sampled tokens (k1): the penalty in the
            rewards. With modified sampling it does not estimate a KL and can be negative
            while the policy moves away.
        kl_coefficient: value used in this step.
        entropy: nats per token, over the whole vocabulary at the visited states.
        clip_fraction: share of tokens with a ratio outside the clip range, mean over updates.
        policy_loss, value_loss, gradient_norm: mean over the updates of the step.
        explained_variance: share of the returns' variance that the old values explain; 1 is a
            perfect critic; None if all returns are equal.
        length_mean: tokens per response, including EOS.
        truncated_share: share of responses cut off by the length limit.
        difference_variance: variance of the raw reward difference between two responses to one
            prompt, unbiased; None with one response per prompt.
    """

    step: int
    score_mean: float
    standardised_mean: float
    kl: float
    kl_sampled: float
    kl_coefficient: float
    entropy: float
    clip_fraction: float
    policy_loss: float
    value_loss: float
    gradient_norm: float
    explained_variance: float | None
    length_mean: float
    truncated_share: float
    difference_variance: float | None
    shaped_mean: float | None = None


class Scored(NamedTuple):
    """A sample with its reward and the position of its chunk among all chunks of the step."""

    place: int
    prompt: Text
    text: str
    sample: Sample
    reward: float
    references: list[float]


def sample_chunks(
    chunks: Sequence[tuple[int, list[int], int]],
    problem: Problem,
    encoded: Sequence[list[int]],
    config: PPOConfig,
) -> list[Scored]:
    """Sample chunk by chunk, then score all samples in one call.

    With reward shaping, also sample `REFERENCES` responses of the reference to each prompt.

    Args:
        chunks: (position among all chunks, indices of prompts, seed) of each chunk.
        encoded: tokens of the problem's prompts.

    Raises:
        UserError: the number of rewards differs from the number of responses.
    """
    if not chunks:  # more processes than chunks
        return []
    K, R = config.rollouts_per_prompt, REFERENCES if config.reward_shaping != "none" else 0
    places = [place for place, drawn, _ in chunks for _ in range(len(drawn) * K)]
    drawn = [index for _, some, _ in chunks for index in some]
    samples, responses = _sampled(chunks, problem.policy, problem, encoded, config, K)
    rewards = rewards_of(problem.reward_fn, responses)
    references: list[list[float]] = [[] for _ in drawn]
    if R:
        apart = [(place, some, draw_seed(seed, 1)) for place, some, seed in chunks]
        with reference_of(problem.policy, problem.reference) as model:
            _, answers = _sampled(apart, model, problem, encoded, config, R)
        found = rewards_of(problem.reward_fn, answers)
        references = [found[i * R : (i + 1) * R] for i in range(len(drawn))]
    return [
        Scored(places[i], r.prompt or "", str(r.text), samples[i], rewards[i], references[i // K])
        for i, r in enumerate(responses)
    ]


def _sampled(
    chunks: Sequence[tuple[int, list[int], int]],
    model: Any,
    problem: Problem,
    encoded: Sequence[list[int]],
    config: PPOConfig,
    count: int,
) -> tuple[list[Sample], list[Response]]:
    """Return `count` responses of the model to each prompt of the chunks."""
    samples: list[Sample] = []
    for _, drawn, seed in chunks:
        with autocast(config, next(model.parameters()).device):
            samples += generate(
                model,
                problem.tokenizer,
                [encoded[i] for i in drawn],
                config=config.sampling,
                num_responses=count,
                seed=seed,
            )
    prompts = [problem.prompts[i] for _, drawn, _ in chunks for i in drawn for _ in range(count)]
    pairs = zip(prompts, samples, strict=True)
    return samples, [as_response(problem.tokenizer, prompt, sample) for prompt, sample in pairs]


def difference_variance(rewards_BK: Tensor) -> float | None:
    """Variance of `r_i - r_j` over pairs of responses to one prompt: twice the variance of r."""
    if rewards_BK.shape[1] < 2:
        return None
    return float(2 * rewards_BK.var(dim=1).mean())


def require_finite(numbers_B: Tensor, what: str, step: int, prompts: Sequence[Text]) -> None:
    """Check the numbers of a step, one per response.

    Raises:
        UserError: one is not finite; the message names its prompt.
    """
    bad = (~torch.isfinite(numbers_B)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise UserError(
            f"step {step}: {what} is {float(numbers_B[index])} for the prompt {prompts[index]!r}; "
            "check the reward model, or lower the learning rates"
        )
