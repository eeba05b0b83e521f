"""Demonstrations and pairs as tokens, and which of them the loss is on.

TRL's rows get TRL's tokens (tests hold the two together), but through
`shiftrm.models.rendering`, which scoring uses too: a chat prompt may have a plain answer, a side
that was cut off is left open, and of a conversation every answer of the assistant is learnt.
"""

from typing import Any

from datasets import Dataset
from trl.data_utils import extract_prompt

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text, encode, encode_prompt, template_options

__all__ = ["drop", "encode_demonstration", "encode_preference"]


def encode_demonstration(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """`input_ids`, and `completion_mask`: 1 where the loss is.

    Args:
        row: as `data.demonstrations` reads it. The loss is on the completion, or on every answer of
            the assistant, its closing token included.
    """
    options = template_options(row)
    messages = row.get("messages")
    if messages is None:
        ids = encode(tokenizer, row["prompt"], row["completion"], template_options=options)
        start = _common(_prompt_ids(tokenizer, row["prompt"], options), ids)
        return {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}
    ids = encode(tokenizer, None, messages, template_options=options)
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(tokenizer, messages, turn, ids, options)
            mask[start:end] = [1] * (end - start)
    return {"input_ids": ids, "completion_mask": mask}


def _turn(
    tokenizer: Any, messages: list[Any], turn: int, ids: list[int], options: dict[str, Any]
) -> tuple[int, int]:
    """Where an answer begins and ends in the tokens of the whole conversation.

    Nothing of it is learnt where the template writes it otherwise once it is history (as those do
    that leave out earlier reasoning): those are not the tokens a policy would have to say.
    """
    last = turn == len(messages) - 1
    until = ids if last else encode(tokenizer, None, messages[: turn + 1], template_options=options)
    if not last:
        closing = _common(until, ids)
        if closing < len(until):  # the template closed the conversation: not counted as the answer
            until = until[:closing]
    start = 0
    if turn:
        prompt = _prompt_ids(tokenizer, messages[:turn], options)
        start = _common(prompt, ids)
        if not last and start < len(prompt):
            return 0, 0
    return (start, len(until)) if start < len(until) else (0, 0)


def encode_preference(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`, as `trl.DPOTrainer` takes them.

    Args:
        row: as `data.pairs` reads it. In messages without a prompt it is found by TRL; texts
            without one are whole responses to an empty prompt (a common beginning of letters is no
            prompt).
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
            finished=row.get(f"{side}_finished", True),
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
    """Rows that pass all filters, and how many each of them dropped.

    Args:
        filters: what stays, by the reason for dropping the others.
        advice: what to do where nothing is left.

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
    """How many tokens two sequences begin with in common."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
