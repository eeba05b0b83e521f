"""Prepare the models, tokenizers and encoded domains of `OODPLTrainer`."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.trainer_utils import set_seed

from shiftrm.data.domains import EVAL_PAIRS, Domain, DomainSplit
from shiftrm.errors import UserError
from shiftrm.models.combined import refuse_combined
from shiftrm.models.finite import require_finite_weights
from shiftrm.models.loading import (
    check_vocabulary,
    explain_loading,
    load_reward_model,
    refuse_adapter,
)
from shiftrm.models.rewards import find_head, model_config
from shiftrm.models.rope import context_limit
from shiftrm.models.sampling import load_policy
from shiftrm.oodpl.batches import EncodedDomain, Encoder, encode_domains
from shiftrm.oodpl.meta_config import OODPLConfig

logger = logging.getLogger(__name__)

MEANS = ("accuracy", "loss", "reference_accuracy", "effective_sample_share")
"""The metrics of an evaluation, as means over the watched domains."""


def domain_metrics(name: str) -> tuple[str, str]:
    """Return the names of a watched domain's two metrics: adapted, and of the reference."""
    return f"{name}_accuracy", f"{name}_reference_accuracy"


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
    _refuse_shared_metrics([d.name for d in split.validation or split.source if d.eval_pairs])


def _refuse_shared_metrics(names: Sequence[str]) -> None:
    """Refuse watched domains of which one's metric would overwrite another number."""
    known = dict.fromkeys(MEANS, "the mean over domains")
    for name in names:
        for metric in domain_metrics(name):
            if metric in known:
                raise UserError(
                    f"domain {name!r}: its metric 'eval_{metric}' would be that of {known[metric]}"
                    ", too; rename the domain's folder"
                )
            known[metric] = f"domain {name!r}"


def _refuse_parts(path: str) -> None:
    """Refuse a folder that is not one whole model: more than one, or an adapter.

    Raises:
        UserError: says what to give instead.
    """
    refuse_combined(path)
    refuse_adapter(path)


def reward_model_of(model: Any, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    if isinstance(model, str):
        model, tokenizer = _load_reward_model(model, tokenizer, seed)
    if tokenizer is None:
        raise UserError("processing_class is missing; give the reward model's tokenizer")
    find_head(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model_config(model).get_text_config()
    if config.pad_token_id is None:  # without one, transformers refuses batches
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_reward_model(path: str, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    _refuse_parts(path)
    with explain_loading(path, "a reward model or a policy, with its tokenizer"):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
        set_seed(seed)
        try:
            model = load_reward_model(path, seed=seed)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise UserError(
                f"{path}: its weights do not fit a reward model of one label; give a policy, or a "
                "checkpoint with num_labels=1"
            ) from None
    check_vocabulary(model, tokenizer, path)
    require_finite_weights(model, path)
    return model, tokenizer


def policy_of(policy: Any, tokenizer: Any) -> tuple[Any, Any]:
    if isinstance(policy, str):
        path = policy
        _refuse_parts(path)
        policy, own = load_policy(path)
        require_finite_weights(policy, path)
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
    """Return the validation domains, or else the sources, that have evaluation pairs.

    Says which validation domains are left out, and why.
    """
    found = sources
    if split.validation:
        found = encode_domains(
            encoder, split.validation, support_batch=args.support_batch_size, query_batch=0
        )
    watched = [
        EncodedDomain(d.name, d.support, eval_pairs=d.eval_pairs[: args.eval_pairs])
        for d in found
        if d.eval_pairs
    ]
    if not watched and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        what = "validation" if split.validation else "source"
        if any(d.eval_pairs for d in split.validation or split.source):
            raise UserError(
                f"eval_strategy is set, but no evaluation pair of a {what} domain has at most "
                f"{encoder.max_length} tokens; give shorter ones, raise max_length where the "
                "models read more, or leave eval_strategy out"
            )
        raise UserError(
            f"eval_strategy is set, but no {what} domain has {EVAL_PAIRS}; add them or leave "
            "eval_strategy out"
        )
    if split.validation:
        say_dropped(found, encoder.max_length)
        _say_unwatched(split.validation, found)
    return watched


def _say_unwatched(domains: Sequence[Domain], found: Sequence[EncodedDomain]) -> None:
    for domain, encoded in zip(domains, found, strict=True):
        if not encoded.eval_pairs:
            why = (
                f"no pair of {EVAL_PAIRS} fits" if domain.eval_pairs else f"it has no {EVAL_PAIRS}"
            )
            logger.warning("validation domain %s: not measured, because %s", domain.name, why)


def say_dropped(domains: Sequence[EncodedDomain], limit: int | None) -> None:
    for name, count in {d.name: d.dropped for d in domains if d.dropped}.items():
        logger.warning("domain %s: dropped %d rows of more than %d tokens", name, count, limit)


def pad_id(tokenizer: Any) -> int:
    """Return a pad token; any token works, because positions and masks are explicit."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise UserError("a tokenizer has neither a pad nor an EOS token: set tokenizer.eos_token")
    return int(pad)
