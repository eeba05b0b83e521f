"""Prompt contrast: a response must suit its prompt better than a response to another prompt.

The trainer adds pairs made from the policy's unlabelled responses to the labelled pairs: the
response to a prompt is chosen over a response to another prompt, both under the first prompt. This
holds whatever the labels say, so it needs none. The negatives are the "non-contextual" ones of RRM
(Liu et al., arXiv 2409.13156); they draw them from the training pairs, we from today's policy.
"""

from dataclasses import dataclass, field
from typing import Any

from shiftrm.data.matching import check_matching
from shiftrm.data.negatives import OTHER_PROMPT, negative_pairs
from shiftrm.data.pairs import COLUMNS
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["ContrastConfig", "ContrastTrainer"]


@dataclass
class ContrastConfig(RewardConfig):
    """`RewardConfig` with the settings of the contrast."""

    contrast_share: float = field(
        default=0.25, metadata={"help": "share of the training pairs that contrast prompts"}
    )
    contrast_matching: str = field(
        default="random", metadata={"help": "how the other response is chosen: random or length"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.contrast_share < 1:
            raise UserError(f"contrast_share is {self.contrast_share}; it must lie in (0, 1)")
        check_matching(self.contrast_matching, setting="contrast_matching")


class ContrastTrainer(RewardTrainer):
    """`RewardTrainer` on the pairs and on contrast pairs from `meta_dataset`."""

    def __init__(self, model: Any, args: Any, *, meta_dataset: Any, **keywords: Any) -> None:
        pairs = list(keywords.pop("train_dataset"))
        if any(pair.get("prompt") is None for pair in pairs):
            raise UserError("contrast needs pairs with a prompt of their own")
        share = args.contrast_share
        made = negative_pairs(
            list(meta_dataset),
            OTHER_PROMPT,
            max(1, round(len(pairs) * share / (1 - share))),
            matching=args.contrast_matching,
            seed=args.seed,
        )
        flags = ("chosen_finished", "rejected_finished")
        rows = [{**dict.fromkeys(flags, True), **_given(pair)} for pair in pairs]
        whole = table("pairs and contrast", [*rows, *made], COLUMNS)
        super().__init__(model, args, train_dataset=whole, **keywords)


def _given(pair: Row) -> Row:
    return {key: value for key, value in pair.items() if value is not None}
