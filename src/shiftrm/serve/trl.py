"""The reward server as a function that TRL's command line takes by its dotted name.

`trl grpo --reward_funcs shiftrm.serve.trl.reward_server` asks the server at the address in the
environment variable `SHIFTRM_REWARD_URL`. `SHIFTRM_POLICY` names the policy's folder, for its
tokenizer: see `RewardClient`.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from shiftrm.errors import UserError
from shiftrm.serve.client import RewardClient

__all__ = ["reward_server"]

ADDRESS, POLICY = "SHIFTRM_REWARD_URL", "SHIFTRM_POLICY"


def reward_server(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **others: Any,
) -> list[float]:
    """Return rewards as a reward function of TRL's GRPO and RLOO trainers.

    Raises:
        UserError: `SHIFTRM_REWARD_URL` is not set, or as `RewardClient`.
    """
    return _client()(prompts, completions, completion_ids, **others)


@cache
def _client() -> RewardClient:
    given, policy = os.environ.get(ADDRESS), os.environ.get(POLICY)
    if not given:
        raise UserError(f"{ADDRESS} is not set; give it the address of a `shiftrm serve` server")
    parts, tokenizer = urlsplit(given), None
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if policy:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(policy)
    token = None if parts.password is None else unquote(parts.password)
    return RewardClient(address, token=token, tokenizer=tokenizer)
