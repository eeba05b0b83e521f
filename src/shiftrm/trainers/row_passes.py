"""How a trainer computes rows of sequences: with shared prefixes, and packed or padded."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shiftrm.models.packed import packing_obstacle
from shiftrm.models.prefix import SharedRows
from shiftrm.models.rewards import group_rewards, model_config
from shiftrm.trainers.first_batch import first_obstacle
from shiftrm.trainers.sharding import reset_after_failure

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class RowPasses(_Base):
    """A trainer mixin that computes the rewards of rows, as its first batch has shown it may."""

    args: Any
    _sharing: bool | None = None
    """Whether prefixes are shared; decided on the first batch."""

    _packed: bool = False
    """Whether rows that share prefixes are one flat row in a pass (`models.packed`)."""

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
