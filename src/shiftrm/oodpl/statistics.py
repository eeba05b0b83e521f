"""Sum the measurements of one outer step over tasks and processes."""

import math

import torch
from torch import Tensor

from shiftrm.core.hypergradient import Hypergradient

__all__ = ["StepStatistics"]

_NAMES = (
    "tasks",
    "loss",
    "accuracy",
    "effective_sample_share",
    "inner_loss",
    "examples",
    "reward",
    "squared_reward",
    "cosines",
    "cosine",
)


class StepStatistics:
    """Sums of a step; those of several processes are added as one tensor.

    Args:
        sums: initial sums, for instance those of all processes together.
    """

    def __init__(self, sums: Tensor | None = None) -> None:
        self.sums = torch.zeros(len(_NAMES), dtype=torch.float64) if sums is None else sums

    def add(self, found: Hypergradient) -> None:
        """Add the numbers of one task."""
        rewards = torch.cat(found.rewards).double()
        shares = [
            size / len(weights)
            for size, weights in zip(found.effective_sample_size, found.weights, strict=True)
        ]
        self._add(
            tasks=1,
            loss=found.outer_loss,
            accuracy=found.accuracy,
            effective_sample_share=sum(shares) / len(shares),
            inner_loss=found.inner_losses[0],
            examples=len(rewards),
            reward=float(rewards.sum()),
            squared_reward=float(rewards.pow(2).sum()),
        )

    def add_cosine(self, cosine: float) -> None:
        """Add a cosine, unless a gradient is zero and has no direction."""
        if math.isfinite(cosine):
            self._add(cosines=1, cosine=cosine)

    def means(self) -> dict[str, float]:
        """Return means over tasks, and the reward's mean and standard deviation over examples."""
        total = dict(zip(_NAMES, self.sums.tolist(), strict=True))
        by_task = ("loss", "accuracy", "effective_sample_share", "inner_loss")
        found = {name: total[name] / total["tasks"] for name in by_task}
        mean = total["reward"] / total["examples"]
        variance = total["squared_reward"] / total["examples"] - mean**2
        found |= {"reward_mean": mean, "reward_std": max(0.0, variance) ** 0.5}
        if total["cosines"]:
            found["hypergradient_cosine"] = total["cosine"] / total["cosines"]
        return found

    def _add(self, **numbers: float) -> None:
        for name, value in numbers.items():
            self.sums[_NAMES.index(name)] += value
