"""Encode demonstrations and pairs as tokens, with the loss mask.

Tokens equal TRL's (a test compares them), but are made by `shiftrm.models.rendering`, as in
scoring: a chat prompt may have a plain-text answer, a truncated side is not closed, and the loss is
on every assistant answer of a conversation.
"""

from typing import Any

from datasets import Dataset
from trl.data_utils import extract_prompt

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text, encode, encode_prompt, template_options

__all__ = ["drop", "encode_demonstration", "encode_preference"]


def encode_demonstration(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return `input_ids` and `completion_mask` (1 where the loss is).

    Args:
        row: as read by `data.demonstrations`. The loss is on the completion, or on every answer of
            the assistant, its closing token included. If `finished` is false, the last answer was
            cut off and is not closed.
    """
    options, finished = template_options(row), row.get("finished") is not False
    messages = row.get("messages")
    if messages is None:
        ids = encode(
            tokenizer,
            row["prompt"],
            row["completion"],
            finished=finished,
            template_options=options,
        )
        start = _common(_prompt_ids(tokenizer, row["prompt"], options), ids)
        return {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}
    ids = encode(tokenizer, None, messages, finished=finished, template_options=options)
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(tokenizer, messages, turn, ids, options)
            mask[start:end] = [1] * (end - start)
    return {"input_ids": ids, "completion_mask": mask}


def _turn(
    tokenizer: Any, messages: list[Any], turn: int, ids: list[int], options: dict[str, Any]
) -> tuple[int, int]:
    """Return start and end of an answer in the tokens of the whole conversation.

    The range is empty if the template renders the answer differently once it is history (some
    remove earlier reasoning): a policy would not generate those tokens.
    """
    last = turn == len(messages) - 1
    until = ids if last else encode(tokenizer, None, messages[: turn + 1], template_options=options)
    if not last:
        closing = _common(until, ids)
        if closing < len(until):  # the template closed the conversation; not part of the answer
            until = until[:closing]
    start = 0
    if turn:
        prompt = _prompt_ids(tokenizer, messages[:turn], options)
        start = _common(prompt, ids)
        if not last and start < len(prompt):
            return 0, 0
    return (start, len(until)) if start < len(until) else (0, 0)


def encode_preference(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return `prompt_ids`, `chosen_ids` and `rejected_ids` for `trl.DPOTrainer`.

    Args:
        row: as read by `data.pairs`. For messages without a prompt, TRL extracts it; texts without
            one are responses to an empty prompt (a common prefix of characters is not a prompt).
    """
    options = template_options(row)
    if row.get("prompt") is None and isinstance(row["chosen"], str):
        row = {**row, "prompt": ""}
    elif row.get("prompt") is None:
        row = {**row, **extract_prompt({side: row[side] for side in ("chosen", "rejected")})}
    sides = {
        side: encode(
            tokenizer,
            row["prompt"],
            row[side],
            finished=row.get(f"{side}_finished") is not False,
            template_options=options,
        )
        for side in ("chosen", "rejected")
    }
    prompt = _prompt_ids(tokenizer, row["prompt"], options) if row["prompt"] else []
    start = min(_common(prompt, ids) for ids in sides.values())
    return {
        "prompt_ids": prompt[:start],
        **{f"{side}_ids": ids[start:] for side, ids in sides.items()},
    }


def drop(
    dataset: Dataset, name: str, filters: dict[str, Any], *, advice: str
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows that pass all filters, and the number that each dropped.

    Args:
        filters: predicates of rows to keep, by the reason for dropping the others.
        advice: what to do if nothing is left.

    Raises:
        UserError: nothing is left.
    """
    counts = {}
    for reason, keep in filters.items():
        before = len(dataset)
        dataset = dataset.filter(keep, desc=f"Filtering {name}")
        counts[reason] = before - len(dataset)
    if not len(dataset):
        words = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise UserError(f"nothing is left of the {name} after dropping {words}; {advice}")
    return dataset, counts


def _prompt_ids(tokenizer: Any, prompt: Text, options: dict[str, Any]) -> list[int]:
    return encode_prompt(tokenizer, prompt, template_options=options)


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
