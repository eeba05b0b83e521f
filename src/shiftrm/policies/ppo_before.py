"""What a PPO step measures on its samples before the update, without gradient."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftrm.core.likelihood import unwrapped
from shiftrm.models.probes import sharing_obstacle
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_math import kl_and_entropy
from shiftrm.policies.ppo_passes import Predictions, vocabulary_of
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.ppo_update import activity, autocast, reference_of

logger = logging.getLogger(__name__)


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


def can_share(policy: Any, reference: Any, critic: Any, rows: Rows, config: PPOConfig) -> bool:
    """Whether the models compute the roll-outs of a prompt behind it as they compute them alone.

    The critic is compared on a few rows; the others must be of its architecture.

    Args:
        reference: None for the policy without its adapter.
    """
    inner: list[Any] = [unwrapped(model) for model in (policy, reference) if model is not None]
    kinds = {(type(m.config), m.config._attn_implementation) for m in (*inner, critic)}
    with autocast(config, rows.input_ids.device), activity(critic):
        reason = (
            sharing_obstacle(critic, rows.example(prompts=2, rows=2))
            if len(kinds) == 1
            else "policy, reference and critic are of different architectures"
        )
    if reason is not None:
        logger.warning(
            "%s: the roll-outs of a prompt cannot share it: %s. Each is computed alone, which is "
            "slower.",
            type(inner[0]).__name__,
            reason,
        )
    return reason is None
