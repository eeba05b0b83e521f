"""Splits rows into training and evaluation without shared prompts, and removes duplicates.

Functions here move rows from `Loaded.rows` to `Loaded.dropped` or to another `Loaded`; no row is
lost. A row's unit is what must not appear on both sides: its column `tree` if it has one (OASST1),
otherwise its prompt as normalised by `prompt_keys.prompt_key`; of a dialogue, the messages up to
the user's first. HH-RLHF's dialogues continue one another: an evaluation prompt with its answer may
be the beginning of a longer prompt.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256

from shiftrm.data.loaded import Loaded
from shiftrm.data.prompt_keys import hashed_uniform, prompt_key
from shiftrm.data.sources import read_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text

TREE = "tree"

LEAST_HELD_OUT = 2
"""Minimum number of held-out prompts: one prompt shows no variation between prompts."""


def opening_of(prompt: Text) -> Text:
    """Return text unchanged; of a dialogue, the messages up to the user's first."""
    if isinstance(prompt, str):
        return prompt
    users = [n for n, item in enumerate(prompt, start=1) if item.get("role") == "user"]
    return prompt[: users[0]] if users else prompt


def prompt_of(row: Row) -> Text:
    """Return the prompt of a row; of `messages`, all but the last one."""
    if "prompt" in row:
        return row["prompt"]
    return row["messages"][:-1]


def unit_of(row: Row) -> str:
    """Return the key that must not appear in both training and evaluation."""
    if TREE in row:
        return f"{TREE} {row[TREE]}"
    return prompt_key(opening_of(prompt_of(row)))


def split_by_prompt(loaded: Loaded, *, share: float, seed: int = 0) -> tuple[Loaded, Loaded]:
    """Split rows into training and evaluation; a hash of seed and unit decides the side.

    A unit's side depends neither on the order of the rows nor on the other rows, so rows that are
    added later do not move any. Dropped rows are listed with the training rows.

    Args:
        share: approximate fraction of units to evaluate on.

    Raises:
        UserError: a share outside (0, 1), or a side without rows.
    """
    if not (math.isfinite(share) and 0 < share < 1):
        raise UserError(f"the share to evaluate on is {share:g}; give one between 0 and 1, as 0.1")
    train, evaluation = Loaded(dropped=list(loaded.dropped)), Loaded()
    for row, place in zip(loaded.rows, loaded.places, strict=True):
        side = evaluation if hashed_uniform(seed, "evaluation", unit_of(row)) < share else train
        side.rows.append(row)
        side.places.append(place)
    for side, name in ((train, "train"), (evaluation, "evaluate")):
        if not side.rows:
            raise UserError(
                f"of {len(loaded.rows)} rows none is left to {name} on with a share of {share:g}; "
                "give more rows or another share"
            )
    return train, evaluation


def without_evaluated(train: Loaded, *evaluation: Iterable[Row]) -> Loaded:
    """Drop training rows that share a unit with the evaluation rows: `in_evaluation`.

    A dialogue's opening counts as evaluated in whichever tree it appears.
    """
    units = {unit for rows in evaluation for row in rows for unit in _units(row)}
    return _keep(train, lambda row: not units.intersection(_units(row)), "in_evaluation")


def deduplicated(loaded: Loaded) -> Loaded:
    """Drop rows that equal an earlier one in every column: `duplicate`."""
    seen: set[str] = set()

    def is_new(row: Row) -> bool:
        key = json.dumps(row, sort_keys=True)
        known = key in seen
        seen.add(key)
        return not known

    return _keep(loaded, is_new, "duplicate")


def limited(loaded: Loaded, *, limit: int, seed: int = 0) -> Loaded:
    """Keep at most `limit` rows, drawn by a hash of seed and row, in order: `over_limit`.

    Raises:
        UserError: a limit below one.
    """
    if limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    draws = [hashed_uniform(seed, "limit", json.dumps(r, sort_keys=True)) for r in loaded.rows]
    chosen = set(sorted(range(len(draws)), key=draws.__getitem__)[:limit])
    numbers = iter(range(len(draws)))
    return _keep(loaded, lambda _row: next(numbers) in chosen, "over_limit")


def held_out(keys: Iterable[str], *, share: float, seed: int, source: str) -> set[str]:
    """Return the prompts to hold out of `adapt`'s groups, all groups of one prompt together.

    The choice depends only on seed and prompts, not on their order.

    Args:
        keys: the prompt of every group, equal for equal prompts.
        share: fraction of the distinct prompts, rounded to a whole number of prompts.
        source: name of the groups in errors.

    Raises:
        UserError: a share outside (0, 1), fewer than two prompts held out, or none left.
    """
    if not (math.isfinite(share) and 0 < share < 1):
        raise UserError(f"--holdout is {share:g}; it must lie between 0 and 1, as 0.2")
    prompts = sorted(set(keys), key=lambda key: sha256(f"{seed}/{key}".encode()).digest())
    count = round(share * len(prompts))
    if count < LEAST_HELD_OUT or count == len(prompts):
        raise UserError(
            f"{source}: --holdout {share:g} of {len(prompts)} prompts holds out {count} and leaves "
            f"{len(prompts) - count}; at least {LEAST_HELD_OUT} and 1 are needed: give more "
            "groups, another --holdout, or other groups to measure on as --eval-groups"
        )
    return set(prompts[:count])


def read_rows_with_prompts(source: str) -> list[Row]:
    """Read rows of which only the prompt is used.

    Raises:
        UserError: an unreadable source, no rows, or a row without prompt and messages.
    """

    def check(row: Row, where: str) -> None:
        if not row.get("prompt") and not row.get("messages"):
            raise UserError(f"{where}: no prompt; give rows with a column 'prompt' or 'messages'")

    return read_rows(source, check, what="rows")


def _units(row: Row) -> set[str]:
    return {unit_of(row), prompt_key(opening_of(prompt_of(row)))}


def _keep(loaded: Loaded, wanted: Callable[[Row], bool], reason: str) -> Loaded:
    kept = replace(loaded, rows=[], places=[], dropped=list(loaded.dropped))
    for row, place in zip(loaded.rows, loaded.places, strict=True):
        if wanted(row):
            kept.rows.append(row)
            kept.places.append(place)
        else:
            kept.drop(place, reason)
    return kept
