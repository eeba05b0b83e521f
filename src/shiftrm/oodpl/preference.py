"""Measure a policy's accuracy on preference pairs and its KL to the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shiftrm.core.hypergradient import preference_margins
from shiftrm.core.losses import TokenReduction
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rope import context_limit
from shiftrm.models.sampling import Sample
from shiftrm.oodpl.batches import Encoder, Pair, outer_batch
from shiftrm.policies.ppo_math import exact_token_kl

__all__ = ["PreferenceAccuracy", "preference_accuracy", "sampled_kl"]


@dataclass(frozen=True)
class PreferenceAccuracy:
    """A_PL of a policy.

    Attributes:
        accuracy: share of pairs with log pi(y|x) > log pi(y'|x); a tie is not a preference.
        loss: mean of l_PL = -log sigmoid(log pi(y|x) - log pi(y'|x)).
        pairs: number of pairs.
    """

    accuracy: float
    loss: float
    pairs: int


def preference_accuracy(
    policy: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Row] | Sequence[Pair],
    *,
    reduction: TokenReduction = "sum",
    batch_size: int = 128,
) -> PreferenceAccuracy:
    """Return a policy's A_PL, the preference-learning accuracy of the OODPL paper.

    Args:
        pairs: `{"prompt", "chosen", "rejected"}`, with `chosen_finished` and `rejected_finished`
            if a side was cut off; or the same as tokens.
        reduction: see `losses.response_log_likelihood`; the paper's text implies "sum".
        batch_size: pairs in one pass; changes memory, not the result.

    Raises:
        UserError: no pairs, a row that is not a pair or is longer than the policy's context, or
            log-likelihoods that are not finite; names the pair by its number.

    Source: Jia, arXiv 2402.14760.
    """
    if not pairs:
        raise UserError("there are no preference pairs to measure the policy on")
    tokens = _tokens(policy, tokenizer, pairs)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    margins = torch.cat(
        [
            preference_margins(
                policy,
                outer_batch(tokens[start : start + batch_size], policy_pad_id=pad),
                reduction=reduction,
            )
            for start in range(0, len(tokens), batch_size)
        ]
    )
    finite = torch.isfinite(margins)
    if not bool(finite.all()):
        raise UserError(
            f"preference pair {int((~finite).nonzero()[0]) + 1}: the policy's log-likelihoods are "
            "not finite, so it prefers neither side; the training that made it failed: lower its "
            "learning rate, or use an earlier checkpoint"
        )
    return PreferenceAccuracy(
        accuracy=float((margins > 0).double().mean()),
        loss=float(torch.nn.functional.softplus(-margins).mean()),
        pairs=len(tokens),
    )


def _tokens(policy: Any, tokenizer: Any, pairs: Sequence[Row] | Sequence[Pair]) -> list[Pair]:
    """Return the pairs as the policy reads them."""
    encoder = Encoder(tokenizer, max_length=context_limit(policy.config))

    def read(pair: Any, index: int) -> Pair | None:
        return pair if isinstance(pair, Pair) else encoder.pair(pair, index)

    return encoder.every(read, pairs, "preference pair")


def sampled_kl(policy: Any, reference: Any, samples: Sequence[Sample]) -> float:
    """Return the policy's mean sequence KL to the reference in nats, over samples of the policy.

    See `ppo_math.exact_token_kl` for its meaning if sampling modifies the policy.
    """
    if not samples:
        raise UserError("there are no samples to estimate the KL on")
    return float(exact_token_kl(policy, reference, samples).mean())
