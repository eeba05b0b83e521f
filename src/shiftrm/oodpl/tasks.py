"""Draw the tasks of the bilevel method: the domains and rows of each outer step.

A task is one domain (the paper) or a mixture of several (ours): D support batches for the inner
steps and one query batch. It is a pure function of (seed, step, index), so a run that is resumed or
split over processes sees the same tasks.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from shiftrm.core.hypergradient import OuterBatch
from shiftrm.core.inner_loop import InnerBatch
from shiftrm.oodpl.batches import EncodedDomain, Example, inner_batch, outer_batch

__all__ = ["Task", "TaskPlan", "draw_rows"]


class Task(NamedTuple):
    """The data of one hypergradient.

    Attributes:
        domains: their names, one or several.
        inner_batches, outer_batch: as `hypergradient` takes them.
        rows: domain and file row of every example of every inner batch, for messages.
    """

    domains: tuple[str, ...]
    inner_batches: list[InnerBatch]
    outer_batch: OuterBatch
    rows: list[list[tuple[str, int]]]


class TaskPlan(NamedTuple):
    """How tasks are drawn.

    Attributes:
        seed: of all draws.
        inner_steps: D.
        support_batch, query_batch: rows of an inner batch, pairs of the outer one.
        mixture: number of domains per task; their rows alternate, in equal shares.
        policy_pad_id, reward_pad_id: tokens to pad with.
    """

    seed: int
    inner_steps: int
    support_batch: int
    query_batch: int
    mixture: int
    policy_pad_id: int
    reward_pad_id: int

    def draw(self, domains: Sequence[EncodedDomain], *, step: int, index: int) -> Task:
        """Return task `index` of outer step `step`.

        The domains of one step are drawn without repetition until all have been drawn.
        """
        deck = random.Random(f"oodpl/{self.seed}/{step}").sample(range(len(domains)), len(domains))
        first = index * self.mixture
        chosen = [domains[deck[(first + j) % len(deck)]] for j in range(self.mixture)]
        rng = random.Random(f"oodpl/{self.seed}/{step}/{index}")
        examples = draw_rows(
            rng, [d.support for d in chosen], steps=self.inner_steps, batch=self.support_batch
        )
        (pairs,) = draw_rows(rng, [d.query for d in chosen], steps=1, batch=self.query_batch)
        return Task(
            domains=tuple(d.name for d in chosen),
            inner_batches=[self.batch([e for _, e in batch]) for batch in examples],
            outer_batch=outer_batch([p for _, p in pairs], policy_pad_id=self.policy_pad_id),
            rows=[[(chosen[k].name, e.row) for k, e in batch] for batch in examples],
        )

    def support_of(
        self, domain: EncodedDomain, *, role: str
    ) -> tuple[list[InnerBatch], list[list[tuple[str, int]]]]:
        """Return D support batches of one domain, for evaluation after adapting, and their rows."""
        rng = random.Random(f"oodpl/{self.seed}/{role}/{domain.name}")
        drawn = draw_rows(rng, [domain.support], steps=self.inner_steps, batch=self.support_batch)
        return (
            [self.batch([e for _, e in batch]) for batch in drawn],
            [[(domain.name, e.row) for _, e in batch] for batch in drawn],
        )

    def batch(self, examples: Sequence[Example]) -> InnerBatch:
        return inner_batch(
            examples, policy_pad_id=self.policy_pad_id, reward_pad_id=self.reward_pad_id
        )


def draw_rows(
    rng: random.Random, parts: Sequence[Sequence[Any]], *, steps: int, batch: int
) -> list[list[tuple[int, Any]]]:
    """Return `steps` batches of rows, each row with the number of its part.

    Row i of a batch is from part `i % len(parts)`. No row is repeated within a batch, nor in the
    whole draw if a part has enough rows.
    """
    shares = [len(range(k, batch, len(parts))) for k in range(len(parts))]
    streams: list[list[Any]] = []
    for rows, share in zip(parts, shares, strict=True):
        whole = share * steps
        if len(rows) >= whole:
            streams.append(rng.sample(rows, whole))
        else:
            streams.append([row for _ in range(steps) for row in rng.sample(rows, share)])
    return [
        [
            (i % len(parts), streams[i % len(parts)][t * shares[i % len(parts)] + i // len(parts)])
            for i in range(batch)
        ]
        for t in range(steps)
    ]
