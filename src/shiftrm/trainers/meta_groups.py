"""Encode the unlabelled groups of a MetaRM run and draw them by step."""

import functools
import logging
import random
from collections.abc import Iterable
from typing import Any

from shiftrm.data.groups import check_group
from shiftrm.errors import UserError
from shiftrm.models.responses import encode_response, group_responses
from shiftrm.models.rope import LengthLimit

logger = logging.getLogger(__name__)

TokenGroup = list[list[int]]
"""The token ids of every response of one group, prompt included."""


class MetaGroups:
    """Encoded groups; the draw depends only on seed and step.

    A resumed run draws the same groups, and the global random state is not touched. Every group
    is drawn once before any is drawn twice.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]] | None,
        tokenizer: Any,
        *,
        limit: LengthLimit,
        seed: int,
        vocabulary: int | None = None,
    ) -> None:
        if groups is None:
            raise UserError("meta_dataset is None; MetaRM needs groups of unlabelled responses")
        self.groups = _encode_groups(groups, tokenizer, limit, vocabulary)
        self._seed = seed

    def batch(self, step: int, size: int) -> list[TokenGroup]:
        """Return the `size` groups of an optimizer step, for all processes together."""
        n = len(self.groups)
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, n)
            chosen.append(self.groups[_permutation(n, self._seed, epoch)[place]])
        return chosen


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _encode_groups(
    groups: Iterable[dict[str, Any]],
    tokenizer: Any,
    limit: LengthLimit,
    vocabulary: int | None,
) -> list[TokenGroup]:
    """Return the token ids of every response of every group.

    Drops and counts over-long responses, groups left with fewer than two, and groups whose
    responses are all the same tokens. J is constant on the last kind; its gradient is pure
    rounding error, which a normalised step would amplify (the paper does not mention them).
    """
    encoded: list[TokenGroup] = []
    long = small = alike = 0
    for index, row in enumerate(groups):
        check_group(row, f"meta_dataset, row {index}")
        try:
            sequences = [
                encode_response(tokenizer, r, vocabulary=vocabulary) for r in group_responses(row)
            ]
        except UserError as error:
            raise UserError(f"meta_dataset, row {index}: {error}") from None
        if not all(sequences):
            raise UserError(f"meta_dataset, row {index}: a response has no tokens; remove it")
        kept = [s for s in sequences if limit.tokens is None or len(s) <= limit.tokens]
        long += len(sequences) - len(kept)
        if len(kept) < 2:
            small += 1
        elif all(s == kept[0] for s in kept):
            alike += 1
        else:
            encoded.append(kept)
    if long or alike:
        logger.warning(
            "meta data: dropped %d responses %s, %d groups left with fewer than two, and %d groups "
            "of equal responses; %d groups left",
            long,
            limit.reason,
            small,
            alike,
            len(encoded),
        )
    if not encoded:
        raise UserError(
            f"meta_dataset has no group of two different responses that are not {limit.reason}: "
            f"{small} groups were left with fewer than two, {alike} hold equal ones"
        )
    return encoded
