"""A second reward model that scores the roll-outs of a policy's training and trains nothing.

Its mean is logged as `gold_mean` beside reward and KL: where the reward goes on rising and this
falls, the reward model is being over-optimised.
"""

import json
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text
from shiftrm.models.scoring import rewards_of
from shiftrm.policies.policy_loading import check_reward_model, load_scorer
from shiftrm.policies.ppo_rollouts import RewardFunction, Rollouts

__all__ = ["GOLD", "GOLD_WORLD", "Watch", "check_watch", "open_watch", "with_gold"]

GOLD_WORLD = "gold"
"""Names the gold world's own reward instead of a folder."""

GOLD = "gold_mean"

WATCHED_FILE = "watched.jsonl"
"""In PPO's work folder: what was seen, so that steps before a checkpoint keep theirs."""


def check_watch(name: str) -> None:
    """Refuse what is clearly no reward model, before weights are read."""
    if name != GOLD_WORLD:
        check_reward_model(name, "--watch")


def open_watch(name: str, *, batch_size: int = 32) -> RewardFunction:
    """A reward model on this process's device, or the gold world's reward.

    Args:
        batch_size: responses in one pass; changes memory, not the rewards.
    """
    if name == GOLD_WORLD:
        from shiftrm.world.gold import GoldReward

        return _TextsOnly(GoldReward())
    return load_scorer(name, batch_size=batch_size)


class _TextsOnly:
    """The gold world's reward, which reads no messages."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def __call__(
        self, prompts: list[Text], responses: list[str], /, *, finished: list[bool]
    ) -> list[float]:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("the gold reward reads texts of the gold world only, no messages")
        return list(self._reward(prompts, responses, finished))


class Watch:
    """`gold_mean` by step of a PPO run.

    Args:
        work: the run's work folder; a continued run finds there what it saw before.
    """

    def __init__(self, reward_fn: RewardFunction, work: Path) -> None:
        self._reward_fn, self._path = reward_fn, work / WATCHED_FILE
        self._seen: dict[int, float] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the last one, when the run was killed
                    continue
                self._seen[row["step"]] = row[GOLD]

    def see(self, step: int, rollouts: Rollouts) -> None:
        """Score a step's roll-outs."""
        rewards = rewards_of(self._reward_fn, rollouts.as_responses())
        self._seen[step] = sum(rewards) / len(rewards)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"step": step, GOLD: self._seen[step]}))

    def beside(self, row: Row) -> Row:
        """A row of the log with what was seen at its step."""
        seen = self._seen.get(row["step"])
        return row if seen is None else {**row, GOLD: seen}


def with_gold(row: Row) -> Row:
    """A row of TRL's log, where the second reward has TRL's name for it."""
    name = f"rewards/{GOLD_WORLD}"
    kept = {key: value for key, value in row.items() if not key.startswith(f"{name}/")}
    return {**kept, GOLD: row[f"{name}/mean"]} if f"{name}/mean" in row else kept
