"""How a trainer computes rows of sequences: with shared prefixes, and packed or padded."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.packed import packing_obstacle
from shiftrm.models.prefix import SharedRows
from shiftrm.models.rewards import group_rewards, model_config
from shiftrm.trainers.first_batch import first_obstacle
from shiftrm.trainers.pair_batches import shared_rows
from shiftrm.trainers.sharding import reset_after_failure

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


def cut_to_budget(lengths: Sequence[int], most: int, *, padded: bool) -> list[list[int]]:
    """Return the rows of each pass, by index, so that no pass holds more tokens than `most`.

    Rows of similar length come together; the order depends on the lengths alone.

    Args:
        lengths: tokens of each row.
        padded: rows of a pass are padded to the longest of them.

    Raises:
        UserError: a row alone has more.
    """
    passes: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n = lengths[row]
        if n > most:
            raise UserError(
                f"max_tokens_per_pass is {most}, and a prompt with its responses has {n} tokens; "
                "raise it, or lower max_length"
            )
        more = lengths[passes[-1][0]] if padded and passes else n
        if not passes or tokens + more > most:
            passes.append([])
            tokens, more = 0, n
        passes[-1].append(row)
        tokens += more
    return [sorted(rows) for rows in passes]


class RowPasses(_Base):
    """A trainer mixin that computes the rewards of rows, as its first batch has shown it may.

    `max_tokens_per_pass` bounds the tokens of a forward and backward pass: a micro-batch is cut
    into passes, and their gradients add up to its own.
    """

    args: Any
    _sharing: bool | None = None
    """Whether prefixes are shared; decided on the first batch."""

    _packed: bool = False
    """Whether rows that share prefixes are one flat row in a pass (`models.packed`)."""

    _never_shares: bool = False
    """Whether training computes every sequence alone, whatever the model."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **keywords: Any
    ) -> Tensor:
        if self._most_tokens() is None:
            return super().training_step(model, inputs, *rest, **keywords)
        # Autocast forgets the weights it has cast at the end of the outermost context, which would
        # be each pass's own; it stays off between passes.
        with torch.autocast(self.args.device.type, enabled=False):
            losses = [
                super(RowPasses, self).training_step(model, part, *rest, **keywords)
                for part in self._passes(model, inputs)
            ]
        total: Tensor = sum(losses[1:], start=losses[0])
        return total

    def _passes(self, model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield the parts of a micro-batch of pairs that are computed one after another."""
        if self._most_tokens() is None or "segment_ids" not in inputs:
            yield inputs
            return
        inputs = self._prepare_inputs(inputs)
        rows = shared_rows(inputs)
        for part in self._cut(model, rows):
            index = torch.tensor(part, device=rows.input_ids.device)
            taken = rows.take(index)._asdict()
            yield taken | {k: v[index] for k, v in inputs.items() if k not in taken}

    def _most_tokens(self) -> int | None:
        return getattr(self.args, "max_tokens_per_pass", None)

    def _cut(self, model: nn.Module, rows: SharedRows) -> list[list[int]]:
        """Return the rows of each pass, by index; all in one where there is no bound."""
        most = self._most_tokens()
        if most is None:
            return [list(range(len(rows.ends)))]
        if self._sharing is None and not self._never_shares:
            with self.compute_loss_context_manager():
                self._sharing = self._decide_sharing(model, rows)
        if self._sharing and not self._never_shares:
            lengths = rows.lengths
        else:  # padded to the longest sequence
            lengths = rows.sequence_lengths.amax(1) * rows.exists.sum(1)
        padded = not (self._sharing and self._packed) or self._never_shares
        return cut_to_budget(lengths.tolist(), most, padded=padded)

    def _require_one_process(self) -> None:
        """Refuse a bound where processes would make different numbers of passes."""
        if self._most_tokens() is not None and self.accelerator.num_processes > 1:
            raise UserError(
                "max_tokens_per_pass: several processes must make the same number of passes; lower "
                "per_device_train_batch_size instead"
            )

    def _group_rewards(self, model: nn.Module, rows: SharedRows) -> Tensor:
        """Return rewards [B, K], with shared prefixes if the model supports them."""
        if self._sharing is None:
            self._sharing = self._decide_sharing(model, rows)
        alone = self.accelerator.num_processes == 1
        return group_rewards(model, rows, shared=self._sharing, split=alone, packed=self._packed)

    def _decide_sharing(self, model: nn.Module, rows: SharedRows) -> bool:
        """Compare sharing with the plain path on the first batch; all processes decide alike."""
        if not getattr(self.args, "shared_prefixes", True):
            return False
        reason = self._reason_not_to_pack(model)
        if reason is None:
            reason = self._found_by_comparison(model, rows, packed=True)
            self._packed = reason is None
        if self._packed:
            logger.info("prefixes are shared, and rows are packed without padding")
            return True
        logger.info("rows are padded, not packed: %s", reason)
        reason = self._found_by_comparison(model, rows, packed=False)
        if reason is None:
            logger.info("prefixes are shared")
            return True
        logger.warning(
            "%s cannot share prefixes: %s. Every sequence is computed alone, which is slower.",
            type(self.accelerator.unwrap_model(model)).__name__,
            reason,
        )
        return False

    def _reason_not_to_pack(self, model: nn.Module) -> str | None:
        if not self.args.disable_dropout:
            return "dropout is on"
        return packing_obstacle(
            model_config(model),
            parameters=sum(p.numel() for p in self.model.parameters()),
            device=self.args.device.type,
        )

    def _found_by_comparison(
        self, model: nn.Module, rows: SharedRows, *, packed: bool
    ) -> str | None:
        """Return why a process cannot share prefixes in this way; None if all can."""
        reason = first_obstacle(model, rows, max_length=self.args.max_length, packed=packed)
        failed = torch.tensor(float(reason is not None), device=rows.input_ids.device)
        if self.accelerator.num_processes > 1:
            failed = self.accelerator.reduce(failed, reduction="sum")
        if not float(failed):
            return None
        reset_after_failure(model)
        return reason or "another process found a difference"
