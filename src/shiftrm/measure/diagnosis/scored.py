"""Responses with their rewards, the input of every number of a diagnosis.

Two responses to a prompt with the same tokens get the same reward, so comparing them shows nothing:
they count as duplicates, and differences are over distinct responses.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from shiftrm.core.discrimination import Floats

NOISE = 1e-6  # in fp32, another batch changes rewards by about this much


class ScoredResponse(NamedTuple):
    """A response's reward and length in tokens; `finished` is False where a limit cut it off.

    Responses with equal `key` have equal tokens. None differs from every other key.
    """

    reward: float
    length: int
    finished: bool = True
    key: Hashable = None


class ScoredGroup(NamedTuple):
    """The responses to one prompt; `prompt` only identifies the prompt."""

    prompt: Hashable
    responses: tuple[ScoredResponse, ...]


class ScoredPair(NamedTuple):
    """A labelled pair."""

    prompt: Hashable
    chosen: ScoredResponse
    rejected: ScoredResponse

    def as_group(self) -> ScoredGroup:
        """Return the pair as a group, without its label."""
        return ScoredGroup(self.prompt, (self.chosen, self.rejected))


def distinct(group: ScoredGroup) -> ScoredGroup:
    """Return the group without repeated responses."""
    seen: set[Hashable] = set()
    kept = []
    for response in group.responses:
        if response.key is not None:
            if response.key in seen:
                continue
            seen.add(response.key)
        kept.append(response)
    return group if len(kept) == len(group.responses) else ScoredGroup(group.prompt, tuple(kept))


def differences(groups: Sequence[ScoredGroup]) -> list[Floats]:
    """Return |r_i - r_j| for all i < j, one array per group, in the order of the groups."""
    found: list[Floats] = [np.empty(0)] * len(groups)
    by_size: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        by_size.setdefault(len(group.responses), []).append(index)
    for size, indices in by_size.items():  # groups of one size at once: a loop over pairs is slow
        i, j = np.triu_indices(size, k=1)
        rewards = np.array([[r.reward for r in groups[g].responses] for g in indices])
        for index, row in zip(indices, np.abs(rewards[:, i] - rewards[:, j]), strict=True):
            found[index] = row
    return found
