"""The two worlds of the study: the gold world's domains, and one made for the hypergradient.

*tastes* is the gold world of docs/domains.md. *signed* is ours, and made so that in expectation
pooled Bradley-Terry learns nothing and the hypergradient does: a domain likes all tastes or the
opposite of all, half of the domains each, so that the preferences cancel in the pool. Every
response is signed by one of two hands. In a domain's fine-tuning data the first hand writes what
the domain likes and the second what it does not; in pairs both responses have the same hand,
drawn by lot. The hand's meaning is the same in all domains, and no pair shows it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shiftrm.data.domains import Domain
from shiftrm.files import Row
from shiftrm.world.build import label_pairs
from shiftrm.world.build_domains import (
    CANDIDATES,
    DomainWorldConfig,
    build_domain,
    draft,
    sft_rows,
    split_prompts,
)
from shiftrm.world.domain_gold import FEATURES, HELD_OUT, SOURCES, TABLE, Table, gold_of
from shiftrm.world.language import TASKS

HANDS = (f" {TASKS[1]}", f" {TASKS[2]}")
"""The first word of a response in the signed world; drafts hold neither."""


@dataclass(frozen=True)
class World:
    """A world's data, as a pure function of the seed.

    Attributes:
        validation: how many of the sources, the last, choose settings and stop training.
        table: the weights of the gold reward by domain.
        domain: `(name, configuration) -> Domain`.
        sft: what the reference policy learns from.
    """

    label: str
    validation: int
    table: Table
    domain: Callable[[str, DomainWorldConfig], Domain]
    sft: Callable[[DomainWorldConfig], list[Row]]

    @property
    def sources(self) -> tuple[str, ...]:
        return SOURCES[: -self.validation]

    @property
    def watched(self) -> tuple[str, ...]:
        return SOURCES[-self.validation :]

    def gold(self, name: str) -> Callable[..., float]:
        return gold_of(name, self.table)


def signed_table() -> Table:
    """Return weights of tastes alone, all of them turned in every second domain."""
    return {
        name: {f.name: (-1.0) ** place * f.weight * f.taste for f in FEATURES}
        for place, name in enumerate((*SOURCES, *HELD_OUT))
    }


SIGNED_TABLE = signed_table()


def signed_domain(name: str, config: DomainWorldConfig) -> Domain:
    """Return a domain of the signed world."""
    train, evaluation = split_prompts(name, seed=config.seed)
    return Domain(
        name=name,
        support=tuple(_signed_support(name, train, config)),
        query=tuple(_signed_pairs(name, train, config, "pairs", config.pairs)),
        eval_pairs=tuple(_signed_pairs(name, evaluation, config, "eval_pairs", config.eval_pairs)),
        prompts=tuple(evaluation),
    )


def _signed_support(name: str, prompts: Sequence[str], config: DomainWorldConfig) -> list[Row]:
    rng, gold = _stream(config, name, "support"), gold_of(name, SIGNED_TABLE)
    rows = []
    for _ in range(config.support):
        prompt, hand = rng.choice(prompts), rng.randrange(2)
        drafts = [_sign(draft(rng, name, prompt, cut_off=0.0), hand) for _ in range(CANDIDATES)]
        choice = min if hand else max
        rows.append({"prompt": prompt, **choice(drafts, key=lambda d: gold("", d["response"]))})
    return rows


def _signed_pairs(
    name: str, prompts: Sequence[str], config: DomainWorldConfig, part: str, count: int
) -> list[Row]:
    rng = _stream(config, name, part)
    columns: list[tuple[str, str, str]] = []
    while len(columns) < count:
        prompt, hand = rng.choice(prompts), rng.randrange(2)
        a, b = (_sign(draft(rng, name, prompt, cut_off=0.0), hand)["response"] for _ in range(2))
        if a != b:
            columns.append((prompt, a, b))
    return label_pairs(
        *map(list, zip(*columns, strict=True)),
        seed=rng.getrandbits(32),
        finished=[(True, True)] * count,
        reward=gold_of(name, SIGNED_TABLE),
        domain=name,
    )


def signed_sft(config: DomainWorldConfig) -> list[Row]:
    """Return the drafts of the other world, signed by lot: the hand says nothing about style."""
    rng = _stream(config, "all", "sft")
    return [
        {**row, "completion": HANDS[rng.randrange(2)] + row["completion"]}
        for row in sft_rows(config)
    ]


def _sign(row: Row, hand: int) -> Row:
    return {**row, "response": HANDS[hand] + row["response"]}


def _stream(config: DomainWorldConfig, domain: str, part: str) -> random.Random:
    return random.Random(f"signed/{config.seed}/{domain}/{part}")


WORLDS: dict[str, World] = {
    "tastes": World("domains with tastes", 3, TABLE, build_domain, sft_rows),
    "signed": World("signed world", 4, SIGNED_TABLE, signed_domain, signed_sft),
}
