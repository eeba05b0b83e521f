"""Chooses the groups that are held out of training, to measure a model before and after."""

import hashlib
import math
from collections.abc import Iterable, Sequence

from shiftrm.errors import UserError

LEAST = 2
"""Minimum number of held-out prompts: one prompt shows no variation between prompts."""


def held_out(keys: Iterable[str], *, share: float, seed: int, source: str) -> set[str]:
    """Return the prompts to hold out, all groups of one prompt together.

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
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    count = round(share * len(prompts))
    if count < LEAST or count == len(prompts):
        raise UserError(
            f"{source}: --holdout {share:g} of {len(prompts)} prompts holds out {count} and leaves "
            f"{len(prompts) - count}; at least {LEAST} and 1 are needed: give more groups, another "
            "--holdout, or other groups to measure on as --eval-groups"
        )
    return set(prompts[:count])


def overlap(keys: Sequence[str], others: Iterable[str]) -> int:
    """Count the distinct prompts that are also among the others."""
    return len(set(keys) & set(others))
