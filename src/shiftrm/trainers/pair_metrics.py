"""What a trainer logs about its pairs, computed once over all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from shiftrm.evaluation.discrimination import auc, calibration_error, correlation


class PairStatistics:
    """Rewards and lengths of the pairs seen since the last log, over all processes.

    Aggregates are taken over pairs, not over batches, so that a last batch of another size, or one
    that processes share unequally, counts for as much as it holds.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(
        self, rewards: Tensor, lengths: Tensor, losses: Tensor, counted: Tensor, gather: Callable
    ) -> None:
        """Add a batch.

        Args:
            rewards: of chosen and rejected, [B, 2].
            lengths: of the sequences in tokens, [B, 2].
            losses: one a pair, [B].
            counted: False where a pair only fills up the batch, [B].
            gather: joins the rows of all processes.
        """
        columns = [rewards, lengths, losses[:, None], counted[:, None]]
        row = torch.cat([column.to(rewards.dtype) for column in columns], dim=1)
        table = gather(row.detach()).to("cpu", torch.float64)
        self._rows.append(table[table[:, -1] > 0, :-1])

    def take(self) -> dict[str, float]:
        """The metrics, empty if there were no pairs; forgets them.

        loss: mean; min_reward, mean_reward, max_reward, accuracy, margin: as TRL names them;
        std_reward; auc: how often a random chosen response has a higher reward than a random
        rejected one; ece: expected calibration error of sigmoid(difference) as a probability;
        length_correlation: of reward and length in tokens.
        """
        if not self._rows:
            return {}
        table = torch.cat(self._rows)
        self._rows = []
        chosen, rejected, *_, losses = table.T
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
        if not torch.isfinite(rewards).all():
            return values
        values["auc"] = auc(chosen.numpy(), rejected.numpy())
        values["ece"] = calibration_error(difference.numpy())
        related = correlation(rewards.numpy(), lengths.numpy())
        if related is not None:
            values["length_correlation"] = related
        return values
