"""Encode a domain's rows as tokens and collate them into the batches of `hypergradient`.

The policy reads prompt and response in its own tokens and returns log pi(y|x); the reward model
reads the same text in the tokens of its own tokenizer, which may differ.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from shiftrm.core.hypergradient import OuterBatch
from shiftrm.core.inner_loop import InnerBatch
from shiftrm.data.domains import Domain
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.likelihoods import Tokens, encode_for_policy, sequences
from shiftrm.models.rendering import encode, template_options
from shiftrm.models.rewards import pad_right

__all__ = [
    "EncodedDomain",
    "Encoder",
    "Example",
    "Pair",
    "Tokens",
    "encode_domains",
    "encode_for_policy",
    "inner_batch",
    "outer_batch",
    "sequences",
]


class Example(NamedTuple):
    """A support row; `row` is its index in the domain's file, for messages."""

    policy: Tokens
    reward_ids: list[int]
    row: int


class Pair(NamedTuple):
    """A preference pair as the policy reads it."""

    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True)
class EncodedDomain:
    """A domain's rows as tokens; `dropped` counts rows that were too long."""

    name: str
    support: list[Example]
    query: list[Pair] = field(default_factory=list)
    eval_pairs: list[Pair] = field(default_factory=list)
    dropped: int = 0


Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoder:
    """The tokenizers of policy and reward model, and the maximum length for both.

    Attributes:
        reward_tokenizer: None if only the policy reads.
        max_length: tokens of prompt and response; longer rows are dropped. None: no limit.
    """

    policy_tokenizer: Any
    reward_tokenizer: Any = None
    max_length: int | None = None

    def example(self, row: Row, index: int) -> Example | None:
        """Return a support row, or None if it is too long."""
        finished = row.get("finished", True)
        tokens = encode_for_policy(
            self.policy_tokenizer, row["prompt"], row["response"], finished=finished
        )
        reward_ids = tokens.ids
        if self.reward_tokenizer not in (None, self.policy_tokenizer):
            reward_ids = encode(
                self.reward_tokenizer, row["prompt"], row["response"], finished=finished
            )
        fits = self._fits(tokens.ids) and self._fits(reward_ids)
        return Example(tokens, reward_ids, index) if fits else None

    def pair(self, row: Row, index: int) -> Pair | None:
        """Return a preference pair, or None if a side is too long.

        `margin` and `weight` are not read: the outer loss counts every pair alike.
        """
        sides = [
            encode_for_policy(
                self.policy_tokenizer,
                row["prompt"],
                row[side],
                finished=row.get(f"{side}_finished", True),
                options=template_options(row),
            )
            for side in ("chosen", "rejected")
        ]
        return Pair(*sides) if all(self._fits(side.ids) for side in sides) else None

    def every(
        self, read: Callable[[Any, int], Item | None], rows: Sequence[Any], what: str
    ) -> list[Item]:
        """Return what `read` makes of all rows; none may be too long.

        Args:
            read: `example` or `pair`.
            what: a row, in messages.

        Raises:
            UserError: a row that is too long or that `read` refuses; names it by its number.
        """
        found = []
        for index, row in enumerate(rows):
            try:
                item = read(row, index)
            except UserError as error:
                raise UserError(f"{what} {index + 1}: {error}") from None
            if item is None:
                raise UserError(
                    f"{what} {index + 1}: prompt and response have more tokens than the policy's "
                    f"context of {self.max_length}; shorten or remove the {what.split()[-1]}"
                )
            found.append(item)
        return found

    def domain(self, domain: Domain, *, query: bool, eval_pairs: bool) -> EncodedDomain:
        """Return the support rows and the requested pairs.

        Raises:
            UserError: a row without text or response tokens; names domain, file and row.
        """
        dropped: Counter[str] = Counter()

        def encoded(what: str, rows: Sequence[Row], one: Any) -> list[Any]:
            found = []
            for index, row in enumerate(rows):
                try:
                    tokens = one(row, index)
                except UserError as error:
                    where = f"domain {domain.name!r}: {what}, row {index + 1}"
                    raise UserError(f"{where}: {error}") from None
                if tokens is None:
                    dropped[what] += 1
                else:
                    found.append(tokens)
            return found

        return EncodedDomain(
            name=domain.name,
            support=encoded("finetune.jsonl", domain.support, self.example),
            query=encoded("pairs.jsonl", domain.query if query else (), self.pair),
            eval_pairs=encoded(
                "eval_pairs.jsonl", domain.eval_pairs if eval_pairs else (), self.pair
            ),
            dropped=dropped.total(),
        )

    def _fits(self, ids: Sequence[int]) -> bool:
        return self.max_length is None or len(ids) <= self.max_length


def encode_domains(
    encoder: Encoder, domains: Sequence[Domain], *, support_batch: int, query_batch: int
) -> list[EncodedDomain]:
    """Return domains as tokens; with a query batch, refuse domains with too few rows left.

    Args:
        support_batch, query_batch: rows that one step takes; a query_batch of 0 encodes no query.

    Raises:
        UserError: a domain with fewer rows than a batch, after dropping those that are too long.
    """
    found = []
    for domain in domains:
        one = encoder.domain(domain, query=query_batch > 0, eval_pairs=True)
        for what, rows, least in (
            ("fine-tuning rows", one.support, support_batch),
            ("preference pairs", one.query, query_batch),
        ):
            if len(rows) < least:
                left = f" of at most {encoder.max_length} tokens" if one.dropped else ""
                raise UserError(
                    f"domain {domain.name!r}: {len(rows)} {what}{left}, but a batch takes {least}; "
                    "add rows, lower the batch or leave the domain out"
                )
        found.append(one)
    return found


def inner_batch(
    examples: Sequence[Example], *, policy_pad_id: int, reward_pad_id: int
) -> InnerBatch:
    """Return the support rows of one inner step as a batch."""
    policy = sequences([e.policy for e in examples], pad_token_id=policy_pad_id)
    ids, mask = pad_right([e.reward_ids for e in examples], pad_token_id=reward_pad_id)
    return InnerBatch(policy, ids, mask)


def outer_batch(pairs: Sequence[Pair], *, policy_pad_id: int) -> OuterBatch:
    """Return the preference pairs of one outer step as a batch."""
    return OuterBatch(
        sequences([p.chosen for p in pairs], pad_token_id=policy_pad_id),
        sequences([p.rejected for p in pairs], pad_token_id=policy_pad_id),
    )
