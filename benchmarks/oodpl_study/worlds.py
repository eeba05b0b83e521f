"""The worlds of the study: the gold world's domains, and one made for the hypergradient.

*tastes* is the gold world of docs/domains.md. *signed* is ours, and made so that in expectation
pooled Bradley-Terry learns nothing and the hypergradient does: a domain likes all tastes or the
opposite of all, half of the domains each, so that the preferences cancel in the pool. Every
response is signed by one of two hands. In a domain's fine-tuning data the first hand writes what
the domain likes and the second what it does not; in pairs both responses have the same hand,
drawn by lot. The hand's meaning is the same in all domains, and no pair shows it. The domains are
readers of one topic, and models see that topic's name in place of the domain's, so that a reward
model cannot tell the sources apart. *named* is the same world with the names shown, and in *topics*
each domain also has the topic of its name.
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
from shiftrm.world.domain_gold import FEATURES, HELD_OUT, SOURCES, Table, gold_of
from shiftrm.world.language import TASKS

TOPIC = SOURCES[0]
"""What all texts of the signed world are about."""

HANDS = (f" {TASKS[1]}", f" {TASKS[2]}")
"""The first word of a response in the signed world; drafts hold neither."""


@dataclass(frozen=True)
class World:
    """A world's data, as a pure function of the seed.

    Attributes:
        validation: how many of the sources, the last, choose settings and stop training.
        gold: the gold reward of a domain.
        domain: `(name, configuration) -> Domain`.
        sft: what the reference policy learns from.
        shown_as: the name that models see in place of every domain's; None: each its own.
    """

    label: str
    validation: int
    gold: Callable[[str], Callable[..., float]]
    domain: Callable[[str, DomainWorldConfig], Domain]
    sft: Callable[[DomainWorldConfig], list[Row]]
    shown_as: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return SOURCES[: -self.validation]

    @property
    def one_policy(self) -> bool:
        """Whether one policy can serve several domains: it sees which it is in."""
        return self.shown_as is None

    @property
    def watched(self) -> tuple[str, ...]:
        return SOURCES[-self.validation :]


def signed_table() -> Table:
    """Return weights of tastes alone, all of them turned in every second domain."""
    return {
        name: {f.name: (-1.0) ** place * f.weight * f.taste for f in FEATURES}
        for place, name in enumerate((*SOURCES, *HELD_OUT))
    }


SIGNED_TABLE = signed_table()


@dataclass(frozen=True)
class Signed:
    """Data of the signed world.

    Attributes:
        topic: what all texts are about; None: each domain's the topic of its name.
    """

    topic: str | None

    def about(self, name: str) -> str:
        return self.topic or name

    def gold(self, name: str) -> Callable[..., float]:
        """Return the gold reward of a domain: its weights, on texts about its topic."""
        return gold_of(self.about(name), {self.about(name): SIGNED_TABLE[name]})

    def prompts(self, name: str, config: DomainWorldConfig) -> tuple[list[str], list[str]]:
        """Return a domain's prompts for training and for evaluation: its topic's, in its name."""
        train, evaluation = (
            [prompt.replace(f" {self.about(name)} ", f" {name} ") for prompt in prompts]
            for prompts in split_prompts(self.about(name), seed=config.seed)
        )
        return train, evaluation

    def draft(self, rng: random.Random, name: str, prompt: str, hand: int) -> Row:
        row = draft(rng, self.about(name), prompt, cut_off=0.0)
        return {**row, "response": HANDS[hand] + row["response"]}

    def domain(self, name: str, config: DomainWorldConfig) -> Domain:
        train, evaluation = self.prompts(name, config)
        return Domain(
            name=name,
            support=tuple(self._support(name, train, config)),
            query=tuple(self._pairs(name, train, config, "pairs", config.pairs)),
            eval_pairs=tuple(
                self._pairs(name, evaluation, config, "eval_pairs", config.eval_pairs)
            ),
            prompts=tuple(evaluation),
        )

    def sft(self, config: DomainWorldConfig) -> list[Row]:
        """Return drafts in all domains, signed by lot: the hand says nothing about style."""
        rng = _stream(config, "all", "sft")
        prompts = {name: self.prompts(name, config)[0] for name in SIGNED_TABLE}
        rows = []
        for _ in range(config.sft_examples):
            name, hand = rng.choice(list(prompts)), rng.randrange(2)
            prompt = rng.choice(prompts[name])
            row = self.draft(rng, name, prompt, hand)
            rows.append({"prompt": prompt, "completion": row["response"], "domain": name})
        return rows

    def _support(self, name: str, prompts: Sequence[str], config: DomainWorldConfig) -> list[Row]:
        rng, gold = _stream(config, name, "support"), self.gold(name)
        rows = []
        for _ in range(config.support):
            prompt, hand = rng.choice(prompts), rng.randrange(2)
            drafts = [self.draft(rng, name, prompt, hand) for _ in range(CANDIDATES)]
            choice = min if hand else max
            rows.append({"prompt": prompt, **choice(drafts, key=lambda d: gold("", d["response"]))})
        return rows

    def _pairs(
        self, name: str, prompts: Sequence[str], config: DomainWorldConfig, part: str, count: int
    ) -> list[Row]:
        rng = _stream(config, name, part)
        columns: list[tuple[str, str, str]] = []
        while len(columns) < count:
            prompt, hand = rng.choice(prompts), rng.randrange(2)
            a, b = (self.draft(rng, name, prompt, hand)["response"] for _ in range(2))
            if a != b:
                columns.append((prompt, a, b))
        return label_pairs(
            *map(list, zip(*columns, strict=True)),
            seed=rng.getrandbits(32),
            finished=[(True, True)] * count,
            reward=self.gold(name),
            domain=name,
        )


def _stream(config: DomainWorldConfig, domain: str, part: str) -> random.Random:
    return random.Random(f"signed/{config.seed}/{domain}/{part}")


def signed(label: str, topic: str | None, shown_as: str | None = None) -> World:
    data = Signed(topic)
    return World(label, 4, data.gold, data.domain, data.sft, shown_as)


WORLDS: dict[str, World] = {
    "tastes": World("domains with tastes", 3, gold_of, build_domain, sft_rows),
    "signed": signed("signed world", TOPIC, shown_as=TOPIC),
    "named": signed("signed world, domains named", TOPIC),
    "topics": signed("signed world, a topic for each domain", None),
}
