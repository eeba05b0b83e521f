"""Preference data in TRL's columns: `prompt`, `chosen`, `rejected`, as text or chat messages.

The prompt may be part of the messages of both sides (TRL's implicit prompt), or also be given as
text, as in HuggingFaceH4/ultrafeedback_binarized: then the prompt is what both sides begin with.
Where `score_chosen` and `score_rejected` are given, rows with equal ratings and rows whose rejected
side is rated higher are dropped. Prompts and demonstrations may also be given as
`{"prompt", "completion"}` and `{"messages"}`.
"""

from collections.abc import Callable
from typing import Any

from shiftrm.data.dialogues import alternating, last_answer, parted
from shiftrm.data.loaded import (
    Outcome,
    demonstration_of,
    demonstrations_of,
    message,
    number_of,
    pair_of,
    spoken,
    text_of,
    trimmed,
    wrong,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.pairs import COLUMNS as PAIR_COLUMNS
from shiftrm.errors import UserError
from shiftrm.files import Row, is_number, require_columns
from shiftrm.models.rendering import Text, check_text, is_conversational

SCORES = ("score_chosen", "score_rejected")

CARRIED = tuple(c for c in PAIR_COLUMNS if c not in ("prompt", "chosen", "rejected"))
"""Further columns that training reads; they are kept."""


def preference(row: Row, where: str, *, rated: bool = True) -> Outcome:
    """Map one row to a preference row with a separate prompt.

    Reasons: `equal_ratings`, `rating_against_choice`, those of `dialogues` and of `pair_of`.

    Args:
        rated: whether ratings, if given, must agree with the choice.
    """
    require_columns(row, ("chosen", "rejected"), where)
    for column in ("chosen", "rejected"):
        check_text(row[column] or "", f"{where}: column {column!r}")
    reason = _ratings(row, where) if rated else None
    if reason is not None:
        return reason
    chosen, rejected = (spoken(row[column]) for column in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if is_conversational(chosen) != is_conversational(rejected):
        raise UserError(f"{where}: one side is text and the other is messages; write both alike")
    if prompt:
        check_text(prompt, f"{where}: column 'prompt'")
        prompt = spoken(prompt)
    if is_conversational(chosen):
        pair = _chat_pair(prompt or [], chosen, rejected)
    elif isinstance(prompt, list):
        texts: list[Any] = [chosen, rejected]
        sides = [[message("assistant", side)] if side else [] for side in texts]
        pair = pair_of(prompt, *sides)
    else:
        pair = pair_of(text_of(row, "prompt", where), chosen, rejected)
    if isinstance(pair, str):
        return pair
    return pair | {column: row[column] for column in CARRIED if row.get(column) is not None}


def demonstration(row: Row, where: str) -> Outcome:
    """Map one row to a demonstration: `{"messages"}`, prompt and completion, or a pair's chosen.

    Reasons: `empty_prompt`, `empty_response`, `ends_with_human`, those of `dialogues`.
    """
    if "completion" in row:
        require_columns(row, ("prompt",), where)
        for column in ("prompt", "completion"):
            check_text(row[column] or "", f"{where}: column {column!r}")
        return demonstration_of(*(spoken(row[c]) for c in ("prompt", "completion")))
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise wrong(row, "messages", where, "a list of messages")
        check_text(row["messages"], f"{where}: column 'messages'")
        messages = _plain(spoken(row["messages"]))
        outcome = messages if isinstance(messages, str) else last_answer(messages)
        return outcome if isinstance(outcome, str) else {"messages": messages}
    if "chosen" not in row:
        has = ", ".join(map(repr, row))
        raise UserError(
            f"{where}: no demonstration; expected 'messages', 'prompt' and 'completion', or "
            f"preference pairs, found {has}"
        )
    return next(demonstrations_of([(where, preference(row, where))]))[1]


def prompt_only(row: Row, where: str) -> Outcome:
    """Map one row of any of these columns to a prompt."""
    if "chosen" in row:
        outcome = preference(row, where, rated=False)
        return outcome if isinstance(outcome, str) else {"prompt": outcome["prompt"]}
    if "prompt" in row:
        prompt = row["prompt"] or ""
        check_text(prompt, f"{where}: column 'prompt'")
        return {"prompt": spoken(prompt)} if _says(prompt) else "empty_prompt"
    outcome = demonstration(row, where)
    return outcome if isinstance(outcome, str) else {"prompt": outcome["messages"][:-1]}


MAPPERS: dict[str, Callable[[Row, str], Outcome]] = {
    "pairs": preference,
    "demonstrations": demonstration,
    "prompts": prompt_only,
}


def _chat_pair(prompt: Text, chosen: Any, rejected: Any) -> Outcome:
    if is_conversational(prompt) and prompt:
        n = len(prompt)
        if chosen[:n] == rejected[:n] == prompt and min(len(chosen), len(rejected)) > n:
            chosen, rejected = chosen[n:], rejected[n:]
        return pair_of(prompt, chosen, rejected)
    if chosen and rejected and chosen[0].get("role") == rejected[0].get("role") == "assistant":
        if not isinstance(prompt, str):
            return "no_shared_prompt"
        text = trimmed(prompt)
        return pair_of([message("user", text)] if text else [], chosen, rejected)
    sides = [_plain(side) for side in (chosen, rejected)]
    for side in sides:
        if isinstance(side, str):
            return side
        if side[-1]["role"] != "assistant":
            return "ends_with_human"
    return parted(*sides)


def _plain(messages: Any) -> Any:
    """Return alternating messages of text; dialogues with tool calls or parts are not changed."""
    simple = all(
        item["role"] in ("system", "user", "assistant") and isinstance(item.get("content"), str)
        for item in messages
    )
    if not simple:
        return messages
    return alternating([message(item["role"], item["content"]) for item in messages])


def _ratings(row: Row, where: str) -> str | None:
    """Return why two ratings teach nothing; None if there are none or they agree."""
    if row.get(SCORES[0]) is None or row.get(SCORES[1]) is None:
        return None
    chosen, rejected = (number_of(row, column, where) for column in SCORES)
    for column in SCORES:
        if not is_number(row[column]):
            raise wrong(row, column, where, "a number")
    if chosen == rejected:
        return "equal_ratings"
    return "rating_against_choice" if chosen < rejected else None


def _says(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


FORMATS.register("preference")(
    Format(
        about="any data in TRL's columns: prompt, chosen, rejected; prompt, completion; messages",
        mappers={
            "pairs": lambda row, where, _: preference(row, where),
            "demonstrations": lambda row, where, _: demonstration(row, where),
            "prompts": lambda row, where, _: prompt_only(row, where),
        },
    )
)
