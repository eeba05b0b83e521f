"""How far a trained policy is from its reference, on fresh samples of it."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shiftrm.models.rendering import Text, encode_prompt
from shiftrm.models.sampling import SamplingConfig, generate
from shiftrm.policies.ppo_math import exact_token_kl
from shiftrm.progress import task

__all__ = ["MeasuredKL", "measure_kl"]


@dataclass(frozen=True)
class MeasuredKL:
    """Sequence KL of a policy to its reference.

    Attributes:
        kl: nats a response, mean over the samples.
        standard_error: of that mean.
        samples: how many.
    """

    kl: float
    standard_error: float
    samples: int


@task("measuring the KL", None)
def measure_kl(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> MeasuredKL | None:
    """`ppo_math.exact_token_kl` of responses of the unmodified policy (temperature 1, top-p 1).

    Args:
        prompts: drawn with replacement, from those that leave room for a response.
        samples: responses, one a prompt.
        batch_size: responses at once; other sizes are other draws.

    Returns:
        None where no prompt leaves room in the context.
    """
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = math.inf if limit is None else limit - max_new_tokens
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    fitting = [ids for ids in encoded if 0 < len(ids) <= longest]
    if not fitting or samples < 1:
        return None
    rng = random.Random(f"kl/{seed}")
    drawn = [rng.choice(fitting) for _ in range(samples)]
    found = []
    for start in range(0, samples, batch_size):
        rows = generate(
            policy,
            tokenizer,
            drawn[start : start + batch_size],
            config=SamplingConfig(max_new_tokens=max_new_tokens),
            seed=rng.getrandbits(31),
        )
        found.append(exact_token_kl(policy, reference, rows, batch_size=batch_size))
    kl_B = torch.cat(found).double()
    spread = float(kl_B.std()) if len(kl_B) > 1 else 0.0
    return MeasuredKL(float(kl_B.mean()), spread / len(kl_B) ** 0.5, len(kl_B))
