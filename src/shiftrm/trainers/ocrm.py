"""Off-policy corrected reward models: pairs weighted by how likely today's policy writes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from shiftrm.core.losses import effective_sample_size, off_policy_weights
from shiftrm.data.pairs import COLUMNS, WEIGHT, check_pair, check_weight
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.generation import load_policy, padding_token
from shiftrm.models.likelihoods import Tokens, encode_side, log_likelihoods
from shiftrm.models.rendering import pin_template
from shiftrm.models.rope import context_limit
from shiftrm.progress import task
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer, read_dataset

__all__ = ["OCRMConfig", "OCRMTrainer", "pair_weights"]


@dataclass
class OCRMConfig(RewardConfig):
    """`RewardConfig` with the settings of the weights (`core.losses.off_policy_weights`)."""

    ocrm_alpha: float = field(
        default=0.1, metadata={"help": "share of today's policy in the ratio's denominator"}
    )
    ocrm_scale: float = field(
        default=0.01, metadata={"help": "factor of the logarithm of the ratio (0.001 to 0.01)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ocrm_alpha <= 1:
            raise UserError(f"ocrm_alpha is {self.ocrm_alpha}; it must lie in (0, 1]")
        if not 0 <= self.ocrm_scale < float("inf"):
            raise UserError(f"ocrm_scale is {self.ocrm_scale}; it must be at least 0")


class OCRMTrainer(RewardTrainer):
    """`RewardTrainer` on weighted pairs (Ackermann et al., arXiv 2507.15507).

    The log-likelihoods of all responses under both policies are computed once, before training, by
    every process for itself. They are the policies' own, at temperature 1 and without top-p.
    `effective_sample_share` in the log is the effective sample size over the number of pairs.

    Args:
        policy: today's policy, folder or hub name.
        reference: the policy that wrote the pairs' responses, or the nearest to it: the SFT policy.
    """

    def __init__(
        self, model: Any, args: Any, *, policy: str, reference: str, **keywords: Any
    ) -> None:
        pairs = read_dataset(keywords.pop("train_dataset"))
        if not isinstance(pairs, Dataset):
            pairs = table("pairs", list(pairs), COLUMNS)
        weights = pair_weights(
            list(pairs),
            policy,
            reference,
            alpha=args.ocrm_alpha,
            scale=args.ocrm_scale,
            max_length=args.max_length,
            batch_size=args.per_device_eval_batch_size,
        )
        self.effective_share = effective_sample_size(weights) / len(weights)
        given = pairs[WEIGHT] if WEIGHT in pairs.column_names else [None] * len(pairs)
        both = [
            w * check_weight(old, f"row {row}")
            for row, (w, old) in enumerate(zip(weights.tolist(), given, strict=True))
        ]
        kept = [name for name in pairs.column_names if name != WEIGHT]
        weighted = pairs.select_columns(kept).add_column(WEIGHT, both)
        super().__init__(model, args, train_dataset=weighted, **keywords)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs["effective_sample_share"] = self.effective_share
        super().log(logs, start_time)


def pair_weights(
    pairs: Sequence[Row],
    policy: str,
    reference: str,
    *,
    alpha: float,
    scale: float,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Return the weight of each pair, fp64 [B], with mean 1.

    Pairs longer than `max_length`, which training drops, get weight 1 and do not count for the
    mean.

    Args:
        pairs: preference rows; a prompt of its own, or whole conversations.
        alpha, scale: see `core.losses.off_policy_weights`.
        batch_size: responses in one pass.

    Raises:
        UserError: pairs without a prompt; policies with different tokens; a response that is longer
            than a policy's context.
    """
    vocabulary, tokens, found = None, list[Tokens](), list[Tensor]()
    kept = list(range(len(pairs)))
    for path, what in ((policy, "today's policy"), (reference, "the SFT policy")):
        with task(f"loading {what}", None):
            model, tokenizer = load_policy(path)
        pin_template(tokenizer)
        if vocabulary is None:  # both policies read the first one's tokens
            vocabulary = tokenizer.get_vocab()
            sides = [_encode(tokenizer, row, index) for index, row in enumerate(pairs)]
            longest = max_length or max(len(side.ids) for both in sides for side in both)
            kept = [i for i in kept if max(len(side.ids) for side in sides[i]) <= longest]
            tokens = [side for i in kept for side in sides[i]]
            pad = padding_token(tokenizer)
        elif tokenizer.get_vocab() != vocabulary:
            raise UserError(
                f"{policy} and {reference}: their tokenizers differ, so the likelihoods of one "
                "response cannot be compared; give policies with the same tokens"
            )
        _require_room(model, tokens, path)
        model.to(PartialState().device)
        with task(f"likelihoods under {what}", len(tokens)) as advance:
            found.append(
                log_likelihoods(
                    model, tokens, pad_token_id=pad, batch_size=batch_size, progress=advance
                )
            )
        del model
    weights = torch.ones(len(pairs), dtype=torch.float64)
    if kept:
        both = [each.view(-1, 2) for each in found]
        weights[kept] = off_policy_weights(*both, alpha=alpha, scale=scale)
    return weights


def _encode(tokenizer: Any, row: Row, index: int) -> tuple[Tokens, Tokens]:
    """Return the chosen and the rejected response as a policy reads them."""
    check_pair(row, f"row {index}")
    try:
        return encode_side(tokenizer, row, "chosen"), encode_side(tokenizer, row, "rejected")
    except UserError as error:
        raise UserError(f"row {index}: {error}") from None


def _require_room(model: Any, tokens: Sequence[Tokens], path: str) -> None:
    limit = context_limit(model.config)
    longest = max((len(one.ids) for one in tokens), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"{path}: a pair has {longest} tokens, and the policy's context is {limit}; give "
            f"max_length={limit}"
        )
