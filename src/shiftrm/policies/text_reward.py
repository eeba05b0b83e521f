"""A text reward as TRL's trainers call one, and its scale over a reference's samples."""

import math
import random
from collections.abc import Sequence
from typing import Any

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text, decode_response, encode_prompt, stop_token_ids
from shiftrm.models.responses import Response, tokenizer_name
from shiftrm.models.sampling import SamplingConfig, sample_rows
from shiftrm.models.scoring import mean_and_spread, rewards_of, score_rows
from shiftrm.policies.ppo import RewardFunction
from shiftrm.progress import task

__all__ = ["SCALE_SAMPLES", "TextReward", "reward_scale"]

SCALE_SAMPLES = 256
"""Responses of the reference on which a reward's mean and spread are taken."""


class TextReward:
    """Rewards of sampled tokens by a text reward, as TRL's RLOO and GRPO trainers want them.

    A reward model with the policy's tokenizer reads the sampled tokens. The text for others is
    decoded here and not taken from TRL, which decodes a response alone and so loses the space
    between it and its prompt; and what the length limit cut off is scored as unfinished.

    Attributes:
        stop: the tokens that end a response; the trainer sets those it samples with.
    """

    __name__ = "reward_model"  # under which TRL logs the rewards

    def __init__(
        self, reward_fn: RewardFunction, tokenizer: Any, template_options: dict[str, Any]
    ) -> None:
        self.reward_fn, self.tokenizer = reward_fn, tokenizer
        self.template_options = template_options
        self.stop: Sequence[int] = stop_token_ids(tokenizer)

    def __call__(
        self, *, prompts: list[Text], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        rewards = rewards_of(
            self.reward_fn,
            [
                self._response(prompt, ids)
                for prompt, ids in zip(prompts, completion_ids, strict=True)
            ],
        )
        for prompt, reward in zip(prompts, rewards, strict=True):
            _require_finite(reward, prompt)
        return rewards

    def _response(self, prompt: Text, ids: list[int]) -> Response:
        opening = encode_prompt(self.tokenizer, prompt, template_options=self.template_options)
        finished = bool(ids) and ids[-1] in self.stop
        text = decode_response(self.tokenizer, opening, ids, finished=finished)
        name = tokenizer_name(self.tokenizer)
        return Response(prompt, text, finished, ids, name, self.template_options)


@task("measuring the scale of the rewards", None)
def reward_scale(
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    reward_fn: RewardFunction,
    sampling: SamplingConfig,
    batch_size: int,
    seed: int,
) -> tuple[float, float]:
    """Mean and standard deviation of the rewards of a reference's responses.

    Args:
        prompts: `SCALE_SAMPLES` are drawn from them, with replacement.
        batch_size: responses drawn at once; other sizes are other draws.

    Returns:
        The mean, and the spread (unbiased variance), which is at least 1e-8.

    Raises:
        UserError: a reward that is not finite.
    """
    rng = random.Random(f"spread/{seed}")
    rows = sample_rows(
        reference,
        tokenizer,
        [rng.choice(prompts) for _ in range(SCALE_SAMPLES)],
        config=sampling,
        num_responses=1,
        batch_size=batch_size,
        seed=rng.getrandbits(31),
    )
    rewards = score_rows(reward_fn, rows)
    for row, found in zip(rows, rewards, strict=True):
        for reward in found:
            _require_finite(reward, row["prompt"])
    return mean_and_spread(rewards)


def _require_finite(reward: float, prompt: Text) -> None:
    if not math.isfinite(reward):
        raise UserError(f"the reward is {reward} for the prompt {prompt!r}; check the reward model")
