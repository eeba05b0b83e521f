"""Split token sequences of any requests into passes: shared prefixes first, then rows by length."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from shiftrm.models.prefix import pack
from shiftrm.models.rewards import group_rewards
from shiftrm.models.scoring import Scorer

__all__ = ["Row", "common_length", "compute", "passes_of", "rows_of"]

Ids = Sequence[int]

LEAST_SAVED = 0.1
"""Share of the tokens that a longer row must save; otherwise a row of its own is cheaper."""


class Row(NamedTuple):
    """Sequences that are computed as one row.

    Attributes:
        length: tokens of the row, the common prefix counted once.
        members: indices of its sequences.
    """

    length: int
    members: list[int]


def common_length(a: Ids, b: Ids) -> int:
    """Return the length of the common prefix of two sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is faster than a loop over tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def rows_of(sequences: Sequence[Ids], *, shared: bool, budget: int) -> list[Row]:
    """Return rows of sequences that are computed as one, by their common prefix.

    In lexicographic order the neighbours of a sequence share most with it, whichever requests they
    come from. A row grows while it saves tokens and its attention, L^2 of the row, costs no more
    than that of its sequences alone.

    Args:
        sequences: token ids, none empty.
        shared: False for a model that cannot share prefixes; every sequence is then its own row.
        budget: maximum tokens of a row of several sequences.

    Returns:
        Rows in which each sequence is once.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    if not shared:
        return [Row(len(sequences[i]), [i]) for i in order]
    rows: list[Row] = []
    total = area = shortest = 0  # of the last row: tokens, squared lengths, shortest sequence
    for i in order:
        own = len(sequences[i])
        if rows:
            length, members = rows[-1]
            least = min(shortest, own)
            prefix = min(common_length(sequences[members[0]], sequences[i]), least - 1)
            longer = total + own - len(members) * prefix
            saves = longer <= (1 - LEAST_SAVED) * (length + own)
            if saves and longer <= budget and longer**2 <= area + own**2:
                rows[-1] = Row(longer, [*members, i])
                total, area, shortest = total + own, area + own**2, least
                continue
        rows.append(Row(own, [i]))
        total, area, shortest = own, own**2, own
    return rows


def passes_of(sequences: Sequence[Ids], *, shared: bool, budget: int) -> Iterator[list[Row]]:
    """Yield passes, each rows of similar length (`rows_of`), the short ones first.

    Args:
        budget: maximum tokens of a pass, padding included; a longer row is a pass of its own.
    """
    rows = sorted(rows_of(sequences, shared=shared, budget=budget))
    alone = [row for row in rows if len(row.members) == 1]  # they need no block mask
    for some in (alone, [row for row in rows if len(row.members) > 1]):
        chunk: list[Row] = []
        for row in some:
            if chunk and (len(chunk) + 1) * row.length > budget:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk


@torch.no_grad()
def compute(scorer: Scorer, sequences: Sequence[Ids], rows: Sequence[Row]) -> dict[int, float]:
    """Return the rewards of a pass, by index of the sequence."""
    members = [i for row in rows for i in row.members]
    if len(members) == len(rows):
        found = scorer.score_ids([sequences[i] for i in members], batch_size=len(members))
        return dict(zip(members, found, strict=True))
    groups = [[sequences[i] for i in row.members] for row in rows]
    packed = pack(groups, pad_token_id=scorer.pad_token_id)
    device = next(scorer.model.parameters()).device
    packed = type(packed)(*(tensor.to(device) for tensor in packed))
    rewards_BK = group_rewards(scorer.model, packed, shared=True, split=False)
    return dict(zip(members, rewards_BK[packed.exists].tolist(), strict=True))
