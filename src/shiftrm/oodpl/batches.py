"""A domain's rows as tokens, and tokens as the batches that `hypergradient` takes.

The policy reads a prompt with a response in its own tokens and says log pi(y|x) of the response's;
the reward model reads the same text in the tokens of its tokenizer, which may be another one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from shiftrm.core.hypergradient import OuterBatch
from shiftrm.core.inner_loop import InnerBatch
from shiftrm.core.likelihood import Sequences
from shiftrm.data.domains import Domain
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text, encode, encode_prompt
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


class Tokens(NamedTuple):
    """A prompt with a response: the response's tokens are those from `start` on."""

    ids: list[int]
    start: int


class Example(NamedTuple):
    """A support row; `row` is its place in the domain's file, for messages."""

    policy: Tokens
    reward_ids: list[int]
    row: int


class Pair(NamedTuple):
    """A preference pair as the policy reads it."""

    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True)
class EncodedDomain:
    """A domain's rows in tokens; `dropped` counts those that were too long."""

    name: str
    support: list[Example]
    query: list[Pair] = field(default_factory=list)
    eval_pairs: list[Pair] = field(default_factory=list)
    dropped: int = 0


def encode_for_policy(
    tokenizer: Any, prompt: Text, response: Text, *, finished: bool = True
) -> Tokens:
    """Token ids of a prompt with its response, and where the response begins.

    It begins where the tokens leave those of the prompt alone: a tokenizer may join the prompt's
    end and the response's beginning in one token, which then counts as the response's.

    Raises:
        UserError: no response token is left, or as `rendering.encode`.
    """
    ids = encode(tokenizer, prompt, response, finished=finished)
    opening = encode_prompt(tokenizer, prompt)
    shared = [a == b for a, b in zip(ids, opening, strict=False)]
    start = shared.index(False) if False in shared else len(shared)
    if len(ids) - max(start, 1) < 1:  # token 0 has nothing before it that could predict it
        raise UserError("the response has no token of its own; remove the row")
    return Tokens(ids, start)


@dataclass(frozen=True)
class Encoder:
    """Tokenizers of policy and reward model, and the longest sequence that both may read.

    Attributes:
        reward_tokenizer: None where only the policy reads.
        max_length: tokens of prompt and response; longer rows are dropped. None: no limit.
    """

    policy_tokenizer: Any
    reward_tokenizer: Any = None
    max_length: int | None = None

    def example(self, row: Row, index: int) -> Example | None:
        """A support row; None if it is too long."""
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
        """A preference pair; None if a side is too long."""
        sides = [
            encode_for_policy(
                self.policy_tokenizer,
                row["prompt"],
                row[side],
                finished=row.get(f"{side}_finished", True),
            )
            for side in ("chosen", "rejected")
        ]
        return Pair(*sides) if all(self._fits(side.ids) for side in sides) else None

    def domain(self, domain: Domain, *, query: bool, eval_pairs: bool) -> EncodedDomain:
        """Support rows, and the pairs that are asked for.

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
    """Domains in tokens, those with a query batch refused where too little is left of them.

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


def sequences(rows: Sequence[Tokens], *, pad_token_id: int) -> Sequences:
    """Rows as one batch, padded on the right; shape [B, T]."""
    ids, mask = pad_right([row.ids for row in rows], pad_token_id=pad_token_id)
    starts = torch.tensor([row.start for row in rows])
    response = (torch.arange(ids.shape[1])[None] >= starts[:, None]) & mask.bool()
    return Sequences(ids, mask, response.long())


def inner_batch(
    examples: Sequence[Example], *, policy_pad_id: int, reward_pad_id: int
) -> InnerBatch:
    """Support rows of one inner step."""
    policy = sequences([e.policy for e in examples], pad_token_id=policy_pad_id)
    ids, mask = pad_right([e.reward_ids for e in examples], pad_token_id=reward_pad_id)
    return InnerBatch(policy, ids, mask)


def outer_batch(pairs: Sequence[Pair], *, policy_pad_id: int) -> OuterBatch:
    """Preference pairs of one outer step."""
    return OuterBatch(
        sequences([p.chosen for p in pairs], pad_token_id=policy_pad_id),
        sequences([p.rejected for p in pairs], pad_token_id=policy_pad_id),
    )
