"""Prepare the models, tokenizers and encoded domains of `OODPLTrainer`."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.trainer_utils import set_seed

from shiftrm.data.domains import DomainSplit
from shiftrm.errors import UserError
from shiftrm.models.loading import load_reward_model
from shiftrm.models.rewards import find_head, model_config
from shiftrm.models.rope import context_limit
from shiftrm.models.sampling import load_policy
from shiftrm.oodpl.batches import EncodedDomain, Encoder, encode_domains
from shiftrm.oodpl.meta_config import OODPLConfig

logger = logging.getLogger(__name__)


def check(args: Any, split: DomainSplit) -> None:
    if not isinstance(args, OODPLConfig):
        raise UserError(f"args is a {type(args).__name__}; OODPLTrainer takes an OODPLConfig")
    if not split.source:
        raise UserError("the split has no source domain to train on")
    if not split.held_out:
        raise UserError("the split has no held-out domain; name at least one")
    if args.mixture > len(split.source):
        raise UserError(
            f"mixture is {args.mixture}, but there are {len(split.source)} source domains"
        )


def reward_model_of(model: Any, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    if isinstance(model, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        set_seed(seed)
        model = load_reward_model(model, seed=seed)
    if tokenizer is None:
        raise UserError("processing_class is missing; give the reward model's tokenizer")
    find_head(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model_config(model).get_text_config()
    if config.pad_token_id is None:  # without one, transformers refuses batches
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def policy_of(policy: Any, tokenizer: Any) -> tuple[Any, Any]:
    if isinstance(policy, str):
        policy, own = load_policy(policy)
        return policy, tokenizer or own
    if tokenizer is None:
        raise UserError("policy_processing_class is missing; give the policy's tokenizer")
    return policy, tokenizer


def length_limit(args: OODPLConfig, *models: Any) -> int | None:
    """Return the smallest of max_length and the models' context lengths."""
    contexts = [context_limit(model_config(m)) for m in models]
    return min((n for n in (args.max_length, *contexts) if n is not None), default=None)


def watched_domains(
    encoder: Encoder, split: DomainSplit, args: OODPLConfig, sources: list[EncodedDomain]
) -> list[EncodedDomain]:
    """Return the validation domains, or else the sources, that have evaluation pairs."""
    if split.validation:
        found = encode_domains(
            encoder, split.validation, support_batch=args.support_batch_size, query_batch=0
        )
    else:
        found = sources
    watched = [
        EncodedDomain(d.name, d.support, eval_pairs=d.eval_pairs[: args.eval_pairs], dropped=0)
        for d in found
        if d.eval_pairs
    ]
    if not watched and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        what = "validation" if split.validation else "source"
        raise UserError(
            f"eval_strategy is set, but no {what} domain has eval_pairs.jsonl; add them or leave "
            "eval_strategy out"
        )
    return watched


def say_dropped(domains: Sequence[EncodedDomain], limit: int | None) -> None:
    for name, count in {d.name: d.dropped for d in domains if d.dropped}.items():
        logger.warning("domain %s: dropped %d rows of more than %d tokens", name, count, limit)


def pad_id(tokenizer: Any) -> int:
    """Return a pad token; any token works, because positions and masks are explicit."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise UserError("a tokenizer has neither a pad nor an EOS token: set tokenizer.eos_token")
    return int(pad)
