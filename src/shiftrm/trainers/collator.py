"""Collate preference pairs into batches of rows with a shared prefix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftrm.data.pairs import check_margin
from shiftrm.models.prefix import SharedRows, pack

ROW = "row_index"
"""The column with the index of the pair's row in the data set, for messages."""

PROMPT = "prompt_number"
"""The column that numbers prompts; values stay below 2^24 so that fp32 holds them exactly."""

COUNTED = "counted"
"""In a training batch: 1 for each pair, 0 for a pair that only pads the batch, [B]."""


@dataclass
class PairCollator:
    """Turn the `chosen_ids`, `rejected_ids` (and `margin`) of several rows into tensors.

    Each row of a tensor belongs to one pair, so batches can be split and gathered by pair. The
    batch has the fields of `SharedRows` (K = 2: the chosen sequence, then the rejected one), and
    `margin` [B] and row and prompt numbers [B] if the rows have them.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = pack(
            [[example["chosen_ids"], example["rejected_ids"]] for example in examples],
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        batch = rows._asdict()
        if "margin" in examples[0]:
            margins = [check_margin(e.get("margin"), f"row {e.get(ROW, '?')}") for e in examples]
            batch["margin"] = torch.tensor(margins, dtype=torch.float)
        for column in (ROW, PROMPT):
            if column in examples[0]:
                batch[column] = torch.tensor([e[column] for e in examples])
        return batch


def shared_rows(batch: Mapping[str, Tensor]) -> SharedRows:
    """Return the rows of a collated batch."""
    return SharedRows(*(batch[name] for name in SharedRows._fields))
