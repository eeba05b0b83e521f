"""Metrics that a trainer logs about its pairs, computed over all of them at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from shiftrm.core.discrimination import auc, calibration_error, correlation
from shiftrm.core.intervals import measured_mean


def like_trl(
    compute_metrics: Callable[..., dict[str, float]], block: int
) -> Callable[..., dict[str, float]]:
    """Wrap a user's `compute_metrics` so that it gets the same input as from TRL's reward trainer.

    Predictions of P pairs have shape [2P, 1]: for each batch the chosen rewards, then the rejected
    ones. (TRL 1.16 omits part of a short last batch; we do not.)

    Args:
        compute_metrics: as `Trainer` takes it.
        block: pairs per batch of one process.
    """

    def compute(prediction: EvalPrediction, **options: Any) -> dict[str, float]:
        rewards = prediction.predictions
        parts = rewards if isinstance(rewards, list) else [rewards]  # a list: by batch, as asked
        flat = [np.concatenate(_sides(_numpy(part), block)) for part in parts]
        predictions: Any = flat if isinstance(rewards, list) else flat[0]
        if isinstance(rewards, torch.Tensor):  # batch_eval_metrics
            predictions = torch.as_tensor(predictions, device=rewards.device)
        given = EvalPrediction(
            predictions, prediction.label_ids, prediction.inputs, prediction.losses
        )
        return compute_metrics(given, **options)

    return compute


def _numpy(rewards: Any) -> np.ndarray:
    return rewards.cpu().numpy() if isinstance(rewards, torch.Tensor) else rewards


def _sides(rewards: np.ndarray, block: int) -> list[np.ndarray]:
    """Split [P, 2] into columns [b, 1]: for each block the chosen, then the rejected rewards."""
    starts = range(0, len(rewards), block)
    return [rewards[i : i + block, side, None] for i in starts for side in (0, 1)]


def _interval(right: np.ndarray, prompts: list[float]) -> dict[str, float]:
    known = [(i, -1.0) if prompt < 0 else (-1, prompt) for i, prompt in enumerate(prompts)]
    accuracy = measured_mean(right, known, seed=0)
    found = {"prompts": float(len(set(known)))}
    if accuracy.low is not None and accuracy.high is not None:
        found |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
    return found


class PairStatistics:
    """Rewards and lengths of the pairs seen since the last log, over all processes.

    Aggregates are over pairs, not over batches, so uneven batches are weighted correctly.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(
        self,
        rewards: Tensor,
        lengths: Tensor,
        losses: Tensor,
        prompts: Tensor,
        counted: Tensor,
        gather: Callable,
    ) -> None:
        """Add a batch.

        Args:
            rewards: rewards of chosen and rejected, [B, 2].
            lengths: lengths of the sequences in tokens, [B, 2].
            losses: loss of each pair, [B].
            prompts: prompt numbers, -1 if unknown, [B].
            counted: False for pairs that only pad the batch, [B].
            gather: joins the rows of all processes.
        """
        columns = [rewards, lengths, losses[:, None], prompts[:, None], counted[:, None]]
        row = torch.cat([column.to(rewards.dtype) for column in columns], dim=1)
        table = gather(row.detach()).to("cpu", torch.float64)
        self._rows.append(table[table[:, -1] > 0, :-1])

    def take(self, *, intervals: bool = False) -> dict[str, float]:
        """Return the metrics (empty if there were no pairs) and reset the statistics.

        loss: mean; min_reward, mean_reward, max_reward, accuracy, margin: as TRL names them;
        std_reward; auc: how often a random chosen response has a higher reward than a random
        rejected one; ece: expected calibration error of sigmoid(difference) as a probability;
        length_correlation: of reward and length in tokens.

        Args:
            intervals: also return accuracy_low and accuracy_high, the 95 % interval of the accuracy
                (prompts resampled), and the number of prompts.
        """
        if not self._rows:
            return {}
        table = torch.cat(self._rows)
        self._rows = []
        chosen, rejected, *_, losses, prompts = table.T
        rewards, lengths = table[:, :2].flatten(), table[:, 2:4].flatten()
        difference = chosen - rejected
        metrics = {
            "loss": losses.mean(),
            "min_reward": rewards.min(),
            "mean_reward": rewards.mean(),
            "max_reward": rewards.max(),
            "std_reward": rewards.std(unbiased=False),
            "accuracy": (difference > 0).double().mean(),
            "margin": difference.mean(),
        }
        values = {name: float(value) for name, value in metrics.items()}
        if intervals:
            values |= _interval((difference > 0).double().numpy(), prompts.tolist())
        if not torch.isfinite(rewards).all():
            return values
        values["auc"] = auc(chosen.numpy(), rejected.numpy())
        values["ece"] = calibration_error(difference.numpy())
        related = correlation(rewards.numpy(), lengths.numpy())
        if related is not None:
            values["length_correlation"] = related
        return values
