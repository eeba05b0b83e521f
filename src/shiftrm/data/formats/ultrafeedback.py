"""UltraFeedback, in the schema of openbmb/UltraFeedback and in its binarized one.

openbmb's rows have `instruction` and `completions`, each with `response` and `overall_score`. The
option `pairs` selects the pairs that are made of the (mostly four) completions:

- `best_random` (as the binarized set was made): the best against one of the lower-rated others,
  drawn with the seed;
- `best_worst`; or `all` pairs with different ratings.

Some ratings in that set are known to be wrong, such as an `overall_score` of 10 beside criticism
and low fine-grained ratings, where 1 was meant. A completion is dropped if its overall score (1 to
10) and its mean fine-grained rating (1 to 5) differ by half of their range or more. Binarized rows
are read as `preference` reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from shiftrm.data.formats.preference import MAPPERS
from shiftrm.data.loaded import (
    Broken,
    Options,
    Outcome,
    Outcomes,
    demonstration_of,
    mapped,
    message,
    option,
    pair_of,
    text_of,
    trimmed,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.prompt_keys import hashed_uniform
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row

BINARIZED = "HuggingFaceH4/ultrafeedback_binarized"
ULTRAFEEDBACK = "openbmb/UltraFeedback"


@dataclass(frozen=True)
class UltraFeedbackOptions(Options):
    """Options of UltraFeedback."""

    pairs: str = option(
        "best_random",
        "which of openbmb's completions: best_random (default): best against a random lower-rated "
        "one, best_worst, or all",
        choices=("best_random", "best_worst", "all"),
    )
    seed: int = option(0, "random seed of what is drawn (default: 0)")


def read_ultrafeedback(
    source: str, kind: str, split: str, options: UltraFeedbackOptions
) -> Outcomes:
    """Yield the outcomes of either schema; rows with `completions` are openbmb's."""
    for where, row in iterate_rows(source, split=split):
        if "completions" not in row:
            yield where, mapped(MAPPERS[kind], row, where)
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
    """Yield the outcomes of one of openbmb's rows: its pairs, and completions that are in none.

    Reasons: `no_rating`, `rating_out_of_range`, `contradicting_ratings`, `empty_response`,
    `no_other_completion`, `equal_ratings`, `equal_sides`, `empty_prompt`; `loaded.BROKEN` of the
    row or of one completion.

    Args:
        pairs: "best_random", "best_worst", "all", or "best": the best one as a demonstration.
    """
    asked = mapped(_instruction, row, where)
    if isinstance(asked, str) or not isinstance(row["completions"], list):
        problem = f"{where}: column 'completions' is not a list; expected rated completions"
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
    """Return `{"text", "rating"}` of one completion, or a reason."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: is {item!r:.40}; expected an object with 'response'")
    text = trimmed(text_of(item, "response", where))
    rating, fine = _as_number(item.get("overall_score")), _fine(item)
    if rating is None:
        return "no_rating"
    if not 1 <= rating <= 10:
        return "rating_out_of_range"
    if fine is not None and 1 <= fine <= 5 and abs((rating - 1) / 9 - (fine - 1) / 4) >= 0.5:
        return "contradicting_ratings"
    return {"text": text, "rating": rating} if text else "empty_response"


def _fine(item: Row) -> float | None:
    """Return the mean of the fine-grained ratings, as given or computed from the four aspects."""
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
    """Return a number, which some rows give as text; None for "N/A" and the like."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return None if number is None or number != number else number


FORMATS.register("ultrafeedback")(
    Format(
        about="UltraFeedback: openbmb's rated completions, or binarized",
        hub=(BINARIZED, ULTRAFEEDBACK, "trl-lib/ultrafeedback_binarized"),
        options=UltraFeedbackOptions,
        read=read_ultrafeedback,
        splits={
            BINARIZED: {
                "pairs": "train_prefs",
                "prompts": "train_prefs",
                "demonstrations": "train_sft",
            }
        },
    )
)
