"""Preference data in TRL's columns, and UltraFeedback in both of its schemas.

*preference*: `prompt`, `chosen`, `rejected`, text or chat messages. The prompt may be part of the
messages of both sides (TRL's implicit prompt), or stand beside them once more as text, as in
HuggingFaceH4/ultrafeedback_binarized: then it is what both sides begin with. `score_chosen` and
`score_rejected`, where given, drop equal ratings and rejected sides that are rated higher. As
prompts and demonstrations also `{"prompt", "completion"}` and `{"messages"}`.

*UltraFeedback* (openbmb/UltraFeedback): `instruction` and `completions`, each with `response` and
`overall_score`; which pairs are made of (mostly) four completions is an option:

- `best_random` (as the binarized set was made): the best against one of the others, drawn by the
  seed among those that are rated lower;
- `best_worst`; or `all` pairs of different ratings.

Ratings that contradict each other are known of that set: an `overall_score` of 10 where 1 was meant
stands beside criticism and low fine-grained ratings. A completion whose overall score (1 to 10) and
mean fine-grained rating (1 to 5) lie half of their range apart, or more, is dropped.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from shiftrm.data.dialogues import alternating, last_answer, parted
from shiftrm.data.domains import hashed_uniform
from shiftrm.data.loaded import (
    Broken,
    Outcome,
    Outcomes,
    demonstration_of,
    demonstrations_of,
    each,
    mapped,
    message,
    option,
    pair_of,
    spoken,
    text_of,
    trimmed,
)
from shiftrm.data.pairs import COLUMNS as PAIR_COLUMNS
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import Text, check_text, is_conversational

__all__ = [
    "PreferenceOptions",
    "UltraFeedbackOptions",
    "demonstration",
    "preference",
    "rated_completions",
    "read_preferences",
    "read_ultrafeedback",
]

BINARIZED = "HuggingFaceH4/ultrafeedback_binarized"
ULTRAFEEDBACK = "openbmb/UltraFeedback"

SCORES = ("score_chosen", "score_rejected")

CARRIED = tuple(c for c in PAIR_COLUMNS if c not in ("prompt", "chosen", "rejected"))
"""Columns that training reads besides: they stay."""


@dataclass(frozen=True)
class PreferenceOptions:
    """There are none."""


@dataclass(frozen=True)
class UltraFeedbackOptions:
    """Options of `read_ultrafeedback`.

    Raises:
        UserError: a value that there is not, on construction.
    """

    pairs: str = option(
        "best_random",
        "of openbmb's completions: best_random (default): best against a drawn lower one, "
        "best_worst, or all",
    )
    seed: int = option(0, "of what is drawn (default: 0)")

    def __post_init__(self) -> None:
        known = ("best_random", "best_worst", "all")
        if self.pairs not in known:
            raise UserError(f"pairs is {self.pairs!r}; give {', '.join(known[:2])} or all")


# -- TRL's columns ---------------------------------------------------------------------------


def preference(row: Row, where: str, *, rated: bool = True) -> Outcome:
    """Map one row to a preference row whose prompt stands apart, or say why not.

    Reasons: `equal_ratings`, `rating_against_choice`, those of `dialogues` and of `pair_of`.

    Args:
        rated: whether ratings, where there are any, must agree with the choice.

    Raises:
        UserError: a missing column, a value of the wrong type, or text without a prompt.
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

    Raises:
        UserError: no such columns, or a value of the wrong type.
    """
    if "completion" in row:
        require_columns(row, ("prompt",), where)
        for column in ("prompt", "completion"):
            check_text(row[column] or "", f"{where}: column {column!r}")
        return demonstration_of(*(spoken(row[c]) for c in ("prompt", "completion")))
    if "messages" in row:
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


def read_preferences(source: str, kind: str, split: str, options: PreferenceOptions) -> Outcomes:
    """Outcomes of rows in TRL's columns."""
    return each(_MAPPERS[kind], iterate_rows(source, split=split))


def _prompt(row: Row, where: str) -> Outcome:
    if "chosen" in row:
        outcome = preference(row, where, rated=False)
        return outcome if isinstance(outcome, str) else {"prompt": outcome["prompt"]}
    if "prompt" in row:
        prompt = row["prompt"] or ""
        check_text(prompt, f"{where}: column 'prompt'")
        return {"prompt": spoken(prompt)} if _says(prompt) else "empty_prompt"
    outcome = demonstration(row, where)
    return outcome if isinstance(outcome, str) else {"prompt": outcome["messages"][:-1]}


_MAPPERS: dict[str, Callable[[Row, str], Outcome]] = {
    "pairs": preference,
    "demonstrations": demonstration,
    "prompts": _prompt,
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
    """Alternating messages of text; a dialogue with tool calls or parts stays as it is."""
    simple = all(
        item["role"] in ("system", "user", "assistant") and isinstance(item.get("content"), str)
        for item in messages
    )
    if not simple:
        return messages
    return alternating([message(item["role"], item["content"]) for item in messages])


def _ratings(row: Row, where: str) -> str | None:
    """Why two ratings teach nothing; None if there are none or they agree with the choice."""
    if row.get(SCORES[0]) is None or row.get(SCORES[1]) is None:
        return None
    chosen, rejected = (_number(row[column], column, where) for column in SCORES)
    if chosen == rejected:
        return "equal_ratings"
    return "rating_against_choice" if chosen < rejected else None


def _number(value: Any, column: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected a number")
    return float(value)


def _says(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


# -- UltraFeedback ---------------------------------------------------------------------------


def read_ultrafeedback(
    source: str, kind: str, split: str, options: UltraFeedbackOptions
) -> Outcomes:
    """Outcomes of either schema; rows with `completions` are openbmb's."""
    for where, row in iterate_rows(source, split=split):
        if "completions" not in row:
            yield where, mapped(_MAPPERS[kind], row, where)
        elif kind == "prompts":
            yield where, mapped(_instruction, row, where)
        else:
            how = "best" if kind == "demonstrations" else options.pairs
            yield from rated_completions(row, where, pairs=how, seed=options.seed)


def _instruction(row: Row, where: str) -> Outcome:
    prompt = trimmed(text_of(row, "instruction", where))
    return {"prompt": [message("user", prompt)]} if prompt else "empty_prompt"


def rated_completions(
    row: Row, where: str, *, pairs: str, seed: int = 0
) -> Iterator[tuple[str, Outcome]]:
    """Outcomes of one of openbmb's rows: of each pair, and of each completion that is in none.

    Reasons: `no_rating`, `rating_out_of_range`, `contradicting_ratings`, `empty_response`,
    `no_other_completion`, `equal_ratings`, `equal_sides`, `empty_prompt`; `loaded.BROKEN` of the
    row or of one completion.

    Args:
        pairs: "best_random", "best_worst", "all", or "best": the best one as a demonstration.
    """
    asked = mapped(_instruction, row, where)
    if isinstance(asked, str) or not isinstance(row["completions"], list):
        problem = f"{where}: column 'completions' is no list; expected rated completions"
        yield where, asked if isinstance(asked, str) else Broken(problem)
        return
    ask = asked["prompt"]
    prompt = ask[0]["content"]
    rated: list[tuple[float, str, str]] = []
    for number, item in enumerate(row["completions"], start=1):
        place = f"{where}, completion {number}"
        found = mapped(_completion, item, place)
        if isinstance(found, str):
            yield place, found
        else:
            rated.append((found["rating"], found["text"], place))
    ordered = sorted(rated, key=lambda one: -one[0])  # stable: of equal ones the first is the best
    if pairs == "best":
        outcome = demonstration_of(ask, [message("assistant", ordered[0][1])]) if ordered else None
        yield where, outcome or "no_rating"
        return
    if len(ordered) < 2:
        yield where, "no_other_completion"
        return
    for better, worse in _choose(ordered, pairs, seed, prompt):
        if worse is None or better[0] == worse[0]:
            yield better[2], "equal_ratings"
        else:
            sides = [[message("assistant", one[1])] for one in (better, worse)]
            yield better[2], pair_of(ask, *sides)


def _choose(ordered: list[Any], pairs: str, seed: int, prompt: str) -> list[tuple[Any, Any]]:
    if pairs == "all":
        return list(combinations(ordered, 2))
    if pairs == "best_worst":
        return [(ordered[0], ordered[-1])]
    lower = [one for one in ordered if one[0] < ordered[0][0]]
    if not lower:
        return [(ordered[0], None)]
    drawn = int(hashed_uniform(seed, "rejected", prompt) * len(lower))
    return [(ordered[0], lower[drawn])]


def _completion(item: Row, where: str) -> Outcome:
    """`{"text", "rating"}` of one completion, or why it cannot be used."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: is {item!r:.40}; expected an object with 'response'")
    text, rating, fine = trimmed(text_of(item, "response", where)), _overall(item), _fine(item)
    if rating is None:
        return "no_rating"
    if not 1 <= rating <= 10:
        return "rating_out_of_range"
    if fine is not None and 1 <= fine <= 5 and abs((rating - 1) / 9 - (fine - 1) / 4) >= 0.5:
        return "contradicting_ratings"
    return {"text": text, "rating": rating} if text else "empty_response"


def _overall(item: Row) -> float | None:
    return _as_number(item.get("overall_score"))


def _fine(item: Row) -> float | None:
    """The mean of the fine-grained ratings: as it stands, or of the four aspects."""
    mean = _as_number(item.get("fine-grained_score"))
    if mean is not None:
        return mean
    aspects = item.get("annotations")
    found = [
        rating
        for aspect in (aspects.values() if isinstance(aspects, dict) else ())
        if isinstance(aspect, dict) and (rating := _as_number(aspect.get("Rating"))) is not None
    ]
    return sum(found) / len(found) if found else None


def _as_number(value: Any) -> float | None:
    """A number, which some rows spell as text or as "N/A"."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return None if number is None or number != number else number
