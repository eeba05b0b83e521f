"""Tokens and rewards of responses for every evaluation; equal tokens are scored once."""

import math
from collections.abc import Mapping, Sequence

from shiftrm.errors import UserError
from shiftrm.models.responses import Response, encode_response
from shiftrm.models.rope import context_limit
from shiftrm.models.scoring import Scorer
from shiftrm.progress import Advance

Tokens = tuple[int, ...]


def tokens_of(scorer: Scorer, responses: Sequence[Response], where: str) -> list[Tokens] | None:
    """Return the tokens of a row's responses; None if one exceeds the model's context.

    Args:
        where: location of the row, for errors.

    Raises:
        UserError: text that cannot be rendered, or without tokens.
    """
    try:
        found = [
            tuple(encode_response(scorer.tokenizer, response, vocabulary=scorer.vocabulary))
            for response in responses
        ]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    limit = context_limit(scorer.model.config)
    longest = max(map(len, require_tokens(found, where)))
    return found if limit is None or longest <= limit else None


def require_tokens(sequences: list[Tokens], where: str) -> list[Tokens]:
    """Return the sequences; raise UserError if one is empty."""
    if not all(sequences):
        raise UserError(f"{where}: prompt and response are empty, so there is nothing to score")
    return sequences


def score_once(
    scorer: Scorer,
    places: Mapping[Tokens, str],
    *,
    name: str,
    batch_size: int = 64,
    progress: Advance | None = None,
) -> dict[Tokens, float]:
    """Return the reward of every sequence, so that equal responses get equal rewards.

    Args:
        places: sequences, each with the location of a row it occurs in, for errors.
        name: the model's, for errors.
        batch_size: rows per forward pass.
        progress: counts sequences.

    Raises:
        UserError: a reward that is not finite.
    """
    rewards = scorer.score_ids(list(places), batch_size=batch_size, progress=progress)
    for where, reward in zip(places.values(), rewards, strict=True):
        if not math.isfinite(reward):
            raise UserError(
                f"{where}: {name} gives a reward that is not a number; the checkpoint is broken, "
                "or overflows in its precision (try float32)"
            )
    return dict(zip(places, rewards, strict=True))


def score_fitting(
    scorer: Scorer,
    responses: Sequence[Response],
    places: Sequence[str],
    *,
    name: str,
    batch_size: int = 64,
    progress: Advance | None = None,
) -> list[float | None]:
    """Return the reward of every response, None for one that exceeds the model's context.

    Args:
        places: location of each response, for errors; see `score_once` for the others.

    Raises:
        UserError: as `tokens_of` and `score_once`.
    """
    located = list(zip(responses, places, strict=True))
    found = [tokens_of(scorer, [response], where) for response, where in located]
    read = {
        tokens[0]: where for tokens, where in zip(found, places, strict=True) if tokens is not None
    }
    rewards = score_once(scorer, read, name=name, batch_size=batch_size, progress=progress)
    return [None if tokens is None else rewards[tokens[0]] for tokens in found]
