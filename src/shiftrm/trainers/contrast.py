"""Prompt contrast: a response must suit its prompt better than a response to another prompt.

The trainer adds pairs made from the policy's unlabelled responses to the labelled pairs: the
response to a prompt is chosen over a response to another prompt, both under the first prompt. This
holds whatever the labels say, so it needs none. The negatives are the "non-contextual" ones of RRM
(Liu et al., arXiv 2409.13156); they draw them from the training pairs, we from today's policy.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shiftrm.data.domains import prompt_key
from shiftrm.data.loaded import no_text
from shiftrm.data.pairs import COLUMNS
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.models.responses import group_responses
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["ContrastConfig", "ContrastTrainer", "contrast_pairs"]

MATCHINGS = ("random", "length")
CANDIDATES = 16
"""Responses to other prompts, of which matching by length takes the one of nearest length."""


def contrast_pairs(
    groups: Sequence[Row], count: int, *, matching: str = "random", seed: int = 0
) -> list[Row]:
    """Return `count` pairs of a response to its own prompt and a response to another prompt.

    Args:
        groups: `{"prompt", "responses", "finished"?}`; prompts may repeat.
        matching: "random" draws the other response; "length" takes, of `CANDIDATES` drawn ones,
            the one of nearest length in characters, so that length says nothing about the pair.

    Raises:
        UserError: all responses are to one prompt, or are equal.
    """
    everything = [
        (prompt_key(row["prompt"]), row["prompt"], response.text, response.finished)
        for row in groups
        for response in group_responses(row)
    ]
    everything = [found for found in everything if not no_text(found[2])]
    keys, texts = {key for key, *_ in everything}, {str(text) for _, _, text, _ in everything}
    if len(keys) < 2 or len(texts) < 2:
        raise UserError("contrast needs responses to at least two prompts, and not all equal")
    rng = random.Random(f"contrast/{seed}")
    size = 1 if matching == "random" else CANDIDATES
    pairs: list[Row] = []
    while len(pairs) < count:
        key, prompt, text, finished = rng.choice(everything)
        drawn = [rng.choice(everything) for _ in range(size)]
        others = [other for other in drawn if other[0] != key and other[2] != text]
        if not others:
            continue
        length = len(str(text))
        _, _, other, ended = min(others, key=lambda found: abs(len(str(found[2])) - length))
        pairs.append(
            {
                "prompt": prompt,
                "chosen": text,
                "rejected": other,
                "chosen_finished": finished,
                "rejected_finished": ended,
            }
        )
    return pairs


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
        if self.contrast_matching not in MATCHINGS:
            near = suggest(self.contrast_matching, list(MATCHINGS))
            raise UserError(f"contrast_matching is {self.contrast_matching!r}{near}")


class ContrastTrainer(RewardTrainer):
    """`RewardTrainer` on the pairs and on contrast pairs from `meta_dataset`."""

    def __init__(self, model: Any, args: Any, *, meta_dataset: Any, **keywords: Any) -> None:
        pairs = list(keywords.pop("train_dataset"))
        if any(pair.get("prompt") is None for pair in pairs):
            raise UserError("contrast needs pairs with a prompt of their own")
        share = args.contrast_share
        made = contrast_pairs(
            list(meta_dataset),
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
