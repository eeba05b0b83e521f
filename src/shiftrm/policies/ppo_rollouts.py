"""What goes into and comes out of one PPO step: roll-outs, their rewards, measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text
from shiftrm.models.responses import Response
from shiftrm.models.sampling import Sample, as_response, generate
from shiftrm.models.scoring import rewards_of
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_update import autocast


class RewardFunction(Protocol):
    """Text in, rewards out; `finished` is False where the length limit cut a response off.

    A `scoring.Scorer` is one, and reads the sampled tokens where its tokenizer is the policy's.
    """

    def __call__(
        self, prompts: list[Text], responses: list[str], /, *, finished: list[bool]
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Rollouts:
    """What one step sampled, in order: the responses to one prompt stand together.

    Attributes:
        prompts, responses: texts, one entry a response.
        finished: False where the length limit cut the response off.
        rewards: raw, as the reward function gave them.
        samples: the same as tokens.
        tokenizer: `responses.tokenizer_name` of the policy's, to which they belong.
    """

    prompts: list[Text]
    responses: list[str]
    finished: list[bool]
    rewards: list[float]
    samples: list[Sample]
    tokenizer: str

    def as_responses(self) -> list[Response]:
        """Texts with the tokens that were sampled, for another reward function."""
        ids = [sample.response_ids for sample in self.samples]
        columns = zip(self.prompts, self.responses, self.finished, ids, strict=True)
        return [Response(*row, self.tokenizer) for row in columns]


@dataclass(frozen=True)
class StepLog:
    """One step's measurements; all of the policy as it was when it sampled, before the update.

    Attributes:
        step: from 1.
        score_mean: raw reward.
        standardised_mean: `(reward - reward_mean) / reward_std`.
        kl: sequence KL to the reference in nats, mean over the responses of the sum over their
            states of KL(pi || pi_ref) over the whole vocabulary. Never negative, whatever the
            sampling; unbiased for the policy's own KL if it leaves the policy unmodified
            (temperature 1, top-p 1, no penalty), else the KL over the states that it visits. The
            controller steers by it.
        kl_sampled: the same by `sum_t log pi/pi_ref` of the sampled tokens (k1), which the penalty
            in the rewards consists of. With modified sampling it estimates no KL and can be
            negative while the policy moves away.
        kl_coefficient: the one used in this step.
        entropy: nats a token, exactly over the vocabulary at the states visited.
        clip_fraction: share of tokens whose ratio left the clip range, mean over the updates.
        policy_loss, value_loss, gradient_norm: mean over the step's updates.
        explained_variance: of the returns by the old values; 1 is a perfect critic; None
            where all returns are equal.
        length_mean: tokens a response, EOS included.
        truncated_share: of responses cut off by the length limit.
        difference_variance: variance of the raw reward difference between two responses to one
            prompt, unbiased; None with one roll-out a prompt.
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


def sample_chunks(
    chunks: Sequence[tuple[int, list[int], int]],
    policy: Any,
    tokenizer: Any,
    reward_fn: RewardFunction,
    prompts: Sequence[Text],
    encoded: Sequence[list[int]],
    *,
    config: PPOConfig,
) -> list[tuple[int, Sample, float]]:
    """Sample chunk by chunk, then score all of it at once.

    Args:
        chunks: each with its place among all, the prompts' numbers, and its seed.
        prompts, encoded: all of the run, as text and as tokens.

    Returns:
        Samples and rewards in order, each after the place of its chunk.

    Raises:
        UserError: not one reward a response.
    """
    device, K = next(policy.parameters()).device, config.rollouts_per_prompt
    places, texts, samples = [], [], []
    for place, drawn, seed in chunks:
        with autocast(config, device):
            samples += generate(
                policy,
                tokenizer,
                [encoded[i] for i in drawn],
                config=config.sampling,
                num_responses=K,
                seed=seed,
            )
        places += [place] * (len(drawn) * K)
        texts += [prompts[i] for i in drawn for _ in range(K)]
    if not samples:  # more processes than chunks
        return []
    responses = [as_response(tokenizer, *one) for one in zip(texts, samples, strict=True)]
    rewards = rewards_of(reward_fn, responses)
    return list(zip(places, samples, rewards, strict=True))


def difference_variance(rewards_BK: Tensor) -> float | None:
    """Variance of `r_i - r_j` over pairs of responses to one prompt: twice the variance of r."""
    if rewards_BK.shape[1] < 2:
        return None
    return float(2 * rewards_BK.var(dim=1).mean())


def require_finite(numbers_B: Tensor, what: str, step: int, prompts: list[Text]) -> None:
    bad = (~torch.isfinite(numbers_B)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise UserError(
            f"step {step}: {what} is {float(numbers_B[index])} for the prompt {prompts[index]!r}; "
            "check the reward model, or lower the learning rates"
        )
