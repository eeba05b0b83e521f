"""Log-likelihoods of responses under a policy: rows to tokens, tokens to batches, and sums."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shiftrm.core.likelihood import Passes, Sequences, without_dropout
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text, encode, encode_prompt, template_options
from shiftrm.models.rewards import pad_right

__all__ = ["Tokens", "encode_for_policy", "encode_side", "log_likelihoods", "sequences"]


class Tokens(NamedTuple):
    """A prompt with a response, whose tokens begin at `start`."""

    ids: list[int]
    start: int


def encode_for_policy(
    tokenizer: Any,
    prompt: Text,
    response: Text,
    *,
    finished: bool = True,
    options: dict[str, Any] | None = None,
) -> Tokens:
    """Return the token ids of a prompt with its response, and where the response begins.

    The response begins where the tokens first differ from those of the prompt alone. If a token
    joins the prompt's end and the response's beginning, it counts as part of the response.

    Args:
        finished: as in `rendering.encode`.
        options: its `template_options`.

    Raises:
        UserError: no response token is left, or as `rendering.encode`.
    """
    ids = encode(tokenizer, prompt, response, finished=finished, template_options=options)
    opening = encode_prompt(tokenizer, prompt, template_options=options)
    shared = [a == b for a, b in zip(ids, opening, strict=False)]
    start = shared.index(False) if False in shared else len(shared)
    if len(ids) - max(start, 1) < 1:  # nothing predicts token 0
        raise UserError("the response has no token of its own; remove the row")
    return Tokens(ids, start)


def encode_side(tokenizer: Any, row: Row, side: str) -> Tokens:
    """Return a side of a preference row, "chosen" or "rejected", as a policy reads it.

    Raises:
        UserError: the row has no prompt and its sides are strings, or as `encode_for_policy`.
    """
    prompt, response = row.get("prompt"), row[side]
    if not prompt and isinstance(response, list) and len(response) > 1:
        prompt, response = response[:-1], response[-1:]  # a whole conversation
    if prompt is None or prompt == []:
        raise UserError(
            "has no prompt, so it is not known which tokens are the response; give the pairs a "
            "column 'prompt'"
        )
    return encode_for_policy(
        tokenizer,
        prompt,
        response,
        finished=row.get(f"{side}_finished") is not False,
        options=template_options(row),
    )


def sequences(rows: Sequence[Tokens], *, pad_token_id: int) -> Sequences:
    """Return rows as one batch [B, T], padded on the right."""
    ids, mask = pad_right([row.ids for row in rows], pad_token_id=pad_token_id)
    starts = torch.tensor([row.start for row in rows])
    response = (torch.arange(ids.shape[1])[None] >= starts[:, None]) & mask.bool()
    return Sequences(ids, mask, response.long())


@torch.no_grad()
def log_likelihoods(
    policy: nn.Module,
    rows: Sequence[Tokens],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """Return log pi(y|x) of each row in nats, the sum over its response's tokens, [N] in fp64.

    Args:
        policy: a causal language model; dropout is off.
        batch_size: rows in one pass, of similar length; changes memory, not the result.
        progress: called with the number of rows done, and of all.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = torch.zeros(len(rows), dtype=torch.float64)
    passes = Passes.of(policy, reduction="sum")
    with without_dropout(policy):
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            batch = sequences([rows[i] for i in part], pad_token_id=pad_token_id)
            found[part] = passes(batch).to("cpu", torch.float64)
            progress(min(first + batch_size, len(order)), len(order))
    return found
