"""Preference pairs on their way to the loss: rows to tables, tokens, batches, counts of pairs."""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from shiftrm.data.pairs import WEIGHT, check_margin, check_pair, check_weight
from shiftrm.data.sources import TEXT_COLUMNS, without_nulls
from shiftrm.errors import UserError
from shiftrm.files import Row, encodable
from shiftrm.measure.diagnosis.findings import prompt_key
from shiftrm.models.prefix import SharedRows, pack
from shiftrm.models.rendering import encode, is_conversational, template_options
from shiftrm.models.rope import LengthLimit

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base
else:
    _Base = object

SIDES = ("chosen", "rejected")

ROW = "row_index"
"""The column with the index of the pair's row in the data set, for messages."""

PROMPT = "prompt_number"
"""The column that numbers prompts; values stay below 2^24 so that fp32 holds them exactly."""

COUNTED = "counted"
"""In a training batch: 1 for each pair, 0 for a pair that only pads the batch, [B]."""


def table(source: str, rows: list[Row], columns: Sequence[str]) -> Dataset:
    """Return a table of the columns that training reads; null where a row has no such column.

    Messages, tools and options are stored as JSON and read from it, since Arrow would give each
    object of a column the fields of all others.

    Where some answers to chats are messages and others text, as in pairs beside answers that a
    policy sampled, all become messages: a column of a table holds one of them.

    Args:
        source: for errors.

    Raises:
        UserError: rows whose columns have several types.
    """
    given = [c for c in columns if any(row.get(c) is not None for row in rows)]
    kept = [{c: encodable(row.get(c)) for c in given} for row in rows]
    if len({type(row.get(side)) for row in kept for side in SIDES}) > 1:
        kept = [_answers_as_messages(row) for row in kept]
    values = {c: [row[c] for row in kept] for c in given}
    nested = [c for c in given if any(isinstance(value, list | dict) for value in values[c])]
    try:
        values |= {c: [_as_json(value, c) for value in values[c]] for c in nested}
        made = Dataset.from_dict(values)
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
        words = str(error).partition("\n")[0]
        raise UserError(f"{source}: the rows do not fit one table ({words})") from None
    return _read_through(_from_json, nested, made)


def without_added_nulls(dataset: Any) -> Any:
    """Return a data set without the nulls that Arrow added to messages, tools and options.

    They are those of fields that only other rows have. Anything but a `Dataset` stays as it is, as
    does one with a format of its own.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset
    names = (*TEXT_COLUMNS, "responses", "tools", "chat_template_kwargs")
    nested = [c for c in names if _has_objects(dataset.features.get(c))]
    return _read_through(without_nulls, nested, dataset)


def _has_objects(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(feature, dict) or (inner is not None and _has_objects(inner))


def _read_through(change: Callable[[Any], Any], columns: list[str], dataset: Dataset) -> Dataset:
    """Return a data set that gives `change(value)` for each value of these columns."""
    if not columns:
        return dataset
    return dataset.with_transform(partial(_changed, change=change, columns=columns))


def _changed(
    batch: dict[str, list[Any]], *, change: Callable[[Any], Any], columns: list[str]
) -> dict[str, list[Any]]:
    return {c: list(map(change, part)) if c in columns else part for c, part in batch.items()}


def _as_json(value: Any, column: str) -> str | None:
    if isinstance(value, str) and column != "tools":  # tools may be given as JSON
        raise TypeError(f"column {column!r} holds text beside lists or objects")
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _from_json(value: str | None) -> Any:
    return None if value is None else json.loads(value)


def _answers_as_messages(row: Row) -> Row:
    if not is_conversational(row.get("prompt")):
        return row
    texts = {side: row[side] for side in SIDES if isinstance(row.get(side), str)}
    return row | {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}


def encode_pair(row: dict[str, Any], index: int, tokenizer: Any, name: str) -> dict[str, Any]:
    check_pair(row, f"{name} data, row {index}")
    try:
        sides = {
            f"{side}_ids": encode(
                tokenizer,
                row.get("prompt"),
                row[side],
                finished=row.get(f"{side}_finished") is not False,
                template_options=template_options(row),
            )
            for side in SIDES
        }
    except UserError as error:
        raise UserError(f"{name} data, row {index}: {error}") from None
    for side, ids in sides.items():
        if not ids:
            raise UserError(
                f"{name} data, row {index}: {side.removesuffix('_ids')} has no tokens; remove the "
                "row"
            )
    prompt = zlib.crc32(prompt_key(row).encode(errors="surrogatepass")) % 2**24
    return {**sides, ROW: index, PROMPT: prompt}


def length_filters(limit: LengthLimit) -> dict[str, Any]:
    """Return the conditions for keeping a pair, by the reason for dropping the others."""
    filters = {}
    if (most := limit.tokens) is not None:
        filters[limit.reason] = lambda row: (
            max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= most
        )
    filters["whose two sides are the same tokens"] = lambda row: (
        row["chosen_ids"] != row["rejected_ids"]
    )
    return filters


@dataclass
class PairCollator:
    """Turn the `chosen_ids`, `rejected_ids` (`margin`, `weight`) of several rows into tensors.

    Each row of a tensor belongs to one pair, so batches can be split and gathered by pair. The
    batch has the fields of `SharedRows` (K = 2: the chosen sequence, then the rejected one), and
    `margin` [B], `weight` [B] and row and prompt numbers [B] if the rows have them.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    more: tuple[str, ...] = ()
    """Further columns of whole numbers, [B] each."""

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
        if WEIGHT in examples[0]:
            weights = [check_weight(e.get(WEIGHT), f"row {e.get(ROW, '?')}") for e in examples]
            batch[WEIGHT] = torch.tensor(weights, dtype=torch.float)
        for column in (ROW, PROMPT, *self.more):
            if column in examples[0]:
                batch[column] = torch.tensor([e[column] for e in examples])
        return batch


def shared_rows(batch: Mapping[str, Tensor]) -> SharedRows:
    """Return the rows of a collated batch."""
    return SharedRows(*(batch[name] for name in SharedRows._fields))


class CountsPairs(_Base):
    """A trainer mixin that takes the gradient of the mean loss over all pairs of a step.

    A pair in a short last micro-batch weighs as much as any other. Pairs that accelerate adds to
    pad the last batch of several processes do not count, unless the data set is a stream without
    length, where they cannot be identified.
    """

    _pairs_in_step = 0.0
    _pairs_waiting = 0.0
    """Pairs whose gradient is in `.grad` but has not been used by an optimizer step."""

    loss_is_scaled_for_ga = True
    """Stops the Trainer from dividing by the number of micro-batches."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and its pair count over all processes.

        Each batch marks which of its pairs count; accelerate pads the last batch.
        """
        samples = []
        for batch in itertools.islice(epoch_iterator, num_batches):
            batch[COUNTED] = self._counted(batch).to(device)
            samples.append(batch)
        own = sum(float(batch[COUNTED].sum()) for batch in samples)
        pairs = self.accelerator.reduce(torch.tensor(own, device=device), reduction="sum")
        self._join_waiting(float(pairs))
        return samples, pairs

    def _counted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for each pair of the batch just fetched, 0 for padding, [B]."""
        rows = len(batch["input_ids"])
        pairs = rows if "segment_ids" in batch else rows // 2
        state = self.accelerator.gradient_state
        real = pairs
        if state.end_of_dataloader and state.remainder > 0:  # processes in order, then padding
            real = state.remainder - self.accelerator.process_index * pairs
        return (torch.arange(pairs) < real).float()

    def _join_waiting(self, pairs: float) -> None:
        """Include in this step the pairs whose gradient has not been used yet.

        A streamed epoch can end in the middle of a step; the next epoch then completes the step.
        """
        waiting = [p.grad for p in self.model.parameters() if p.grad is not None]
        before = self._pairs_waiting if waiting else 0.0
        self._pairs_in_step = self._pairs_waiting = before + pairs
        if before:
            for gradient in waiting:
                gradient.mul_(before / self._pairs_in_step)

    def _share_of_step(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return these pairs' share of the step's mean loss; averaging over processes sums them."""
        if COUNTED not in inputs:
            return losses.mean()
        share = self.accelerator.num_processes / self._pairs_in_step
        return (losses * inputs[COUNTED]).sum() * share

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before every optimizer step."""
        self._pairs_waiting = 0.0
        return super()._get_grad_norm(model, grad_norm=grad_norm)
