"""What a PPO step measures on its samples before the update, without gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_math import kl_and_entropy
from shiftrm.policies.ppo_passes import Predictions, vocabulary_of
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.ppo_update import activity, autocast, reference_of


class Before(NamedTuple):
    """Quantities before the update, [B, A] each, 0 where there is no response token.

    Attributes:
        logprobs, reference: of the sampled tokens, under the policy and under the reference.
        values: of the state before each token.
        kl, entropy: at that state; see `kl_and_entropy`.
    """

    logprobs: Tensor
    reference: Tensor
    values: Tensor
    kl: Tensor
    entropy: Tensor


@torch.no_grad()
def measure_before(
    policy: Any, reference: Any, critic: Any, rows: Rows, config: PPOConfig
) -> Before:
    """Measure rows, which may be none, in portions.

    Args:
        reference: None for the policy without its adapter.
    """
    size, vocabulary = config.forward_batch_size, vocabulary_of(policy)
    device, found = rows.input_ids.device, []
    for part in rows.portions(size, vocabulary):
        with autocast(config, device):
            logits = part.logits(policy)
        with reference_of(policy, reference) as beside, autocast(config, device):
            theirs = part.logits(beside)
        both = (Predictions(given, vocabulary) for given in (logits, theirs))
        numbers = [predictions.logprobs(part.tokens) for predictions in both]
        numbers += kl_and_entropy(logits, theirs)
        found.append([part.spread(number) for number in numbers])
    values = []
    with activity(critic):
        for part in rows.portions(size):
            with autocast(config, device):
                values.append(part.values(critic))
    if not found:  # more processes than rows
        return Before(*[rows.response_mask.float()] * 5)
    logprobs, theirs, kl, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Before(logprobs, theirs, torch.cat(values), kl, entropy)
