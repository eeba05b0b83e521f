"""Text rewards in policy training: for TRL's trainers, their scale, and a second one to watch.

A watched reward model scores the roll-outs and trains nothing. Its mean is logged as `gold_mean`:
when the reward keeps rising while this falls, the reward model is being over-optimised.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text, decode_response, encode_prompt, stop_token_ids
from shiftrm.models.responses import Response, tokenizer_name
from shiftrm.models.reward_functions import rewards_of
from shiftrm.models.sampling import Draws, SamplingConfig, sample_rows
from shiftrm.models.scoring import mean_and_spread, score_rows
from shiftrm.policies.loading import check_reward_model, load_scorer
from shiftrm.policies.rollouts import RewardFunction, Rollouts
from shiftrm.progress import task
from shiftrm.world.world import GOLD as GOLD_WORLD
from shiftrm.world.world import GoldReward, gold_world

__all__ = [
    "GOLD",
    "GOLD_WORLD",
    "SCALE_SAMPLES",
    "TextReward",
    "Watch",
    "check_watch",
    "open_watch",
    "reward_scale",
    "scale_of",
    "with_gold",
]

SCALE_SAMPLES = 256
"""Number of reference responses from which mean and spread of the rewards are computed."""


class TextReward:
    """A text reward as a reward function of TRL's RLOO and GRPO trainers.

    A reward model with the policy's tokenizer reads the sampled tokens. For others, the text is
    decoded here: TRL decodes a response alone and so loses the space between prompt and response.
    Responses that the length limit cut off are scored as unfinished.

    Attributes:
        stop: tokens that end a response; the trainer sets those it samples with.
    """

    __name__ = "reward_model"  # name of the rewards in TRL's logs

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
    """Return mean and standard deviation of the rewards of a reference's responses.

    Args:
        prompts: `SCALE_SAMPLES` are drawn from them, with replacement.
        batch_size: responses sampled at once; changing it changes the draws.

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
        Draws(sampling, 1, batch_size=batch_size, seed=rng.getrandbits(31)),
    )
    return _scale(reward_fn, rows)


def scale_of(reward: str, responses: str) -> tuple[float, float]:
    """Return mean and standard deviation of a reward model's rewards of a group file.

    Args:
        reward: folder of the reward model, or "gold".
        responses: source of rows as `sample_rows` makes them, of the reference policy.

    Raises:
        UserError: as `read_groups` and `open_watch`, or a reward that is not finite.
    """
    rows = read_groups(responses, least=1)
    return _scale(open_watch(reward, batch_size=64), rows)


def _scale(reward_fn: RewardFunction, rows: list[Row]) -> tuple[float, float]:
    """Return mean and standard deviation of the rewards of rows, all of them finite."""
    rewards = score_rows(reward_fn, rows)
    for row, found in zip(rows, rewards, strict=True):
        for reward in found:
            _require_finite(reward, row["prompt"])
    return mean_and_spread(rewards)


def _require_finite(reward: float, prompt: Text) -> None:
    if not math.isfinite(reward):
        raise UserError(f"the reward is {reward} for the prompt {prompt!r}; check the reward model")


GOLD = "gold_mean"

WATCHED_FILE = "watched.jsonl"
"""In PPO's work folder: the watched rewards, which a resumed run reads again."""


def check_watch(name: str, option: str = "--watch") -> None:
    """Reject a name that cannot be a reward model, before weights are loaded."""
    if gold_world(name) is None:
        check_reward_model(name, option)


def open_watch(name: str, *, batch_size: int = 32) -> RewardFunction:
    """Load a reward model on this process's device, or the reward of a gold world.

    Args:
        name: folder of a reward model, "gold", or "gold:NAME" of another world.
        batch_size: responses in one pass; changes memory, not the rewards.
    """
    world = gold_world(name)
    if world is not None:
        return _TextsOnly(GoldReward(world))
    return load_scorer(name, batch_size=batch_size)


class _TextsOnly:
    """The reward of a gold world, which does not accept chat messages."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def __call__(
        self, prompts: list[Text], responses: list[str], /, *, finished: list[bool]
    ) -> list[float]:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("the gold reward reads texts of the gold world, not chat messages")
        return list(self._reward(prompts, responses, finished))


class Watch:
    """Records `gold_mean` at each step of a PPO run.

    Args:
        work: the run's work folder, from which a resumed run reads earlier values.
    """

    def __init__(self, reward_fn: RewardFunction, work: Path) -> None:
        self._reward_fn, self._path = reward_fn, work / WATCHED_FILE
        self._seen: dict[int, float] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # an incomplete last line of a killed run
                    continue
                self._seen[row["step"]] = row[GOLD]

    def see(self, step: int, rollouts: Rollouts) -> None:
        """Score the roll-outs of a step."""
        rewards = rewards_of(self._reward_fn, rollouts.as_responses())
        self._seen[step] = sum(rewards) / len(rewards)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"step": step, GOLD: self._seen[step]}))

    def beside(self, row: Row) -> Row:
        """Return a log row with the value of its step added."""
        seen = self._seen.get(row["step"])
        return row if seen is None else {**row, GOLD: seen}


def with_gold(row: Row) -> Row:
    """Rename the second reward in a row of TRL's log."""
    name = f"rewards/{GOLD_WORLD}"
    kept = {key: value for key, value in row.items() if not key.startswith(f"{name}/")}
    return {**kept, GOLD: row[f"{name}/mean"]} if f"{name}/mean" in row else kept
