"""Contrast: a response must be worth more than one that is presumably worse.

The worse responses are made without labels (`data.negatives`): a response to another prompt, or the
response with a fault. The rows hold whatever the labels say. `ContrastTrainer` adds them to the
labelled pairs (for responses of the training pairs to other prompts, that is RRM's augmentation:
Liu et al., arXiv 2409.13156). `ContrastMetaTrainer` leaves the pairs as they are and uses the rows
as the groups of a meta step (arXiv 2405.00438, Algorithm 1) in place of unlabelled groups:

    theta' = theta + eta * grad_theta sum log sigmoid(r(x, y) - r(x, y'))

Only theta' takes a step along that gradient. Theta descends L(theta'), to first order
`L + eta <grad L, grad J>`, which does not raise the contrast at theta itself.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from shiftrm.data.matching import check_matching
from shiftrm.data.negatives import NEGATIVES, OTHER_PROMPT
from shiftrm.data.pairs import COLUMNS, WEIGHT, read_pairs
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.trainers.contrast_rows import FitsLimit, as_groups, contrast_rows, rows_of
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.pair_batches import PROMPT, ROW, encode_pair, length_filters, table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

if TYPE_CHECKING:
    _Base = RewardConfig
else:
    _Base = object

__all__ = ["ContrastConfig", "ContrastMetaConfig", "ContrastMetaTrainer", "ContrastTrainer"]

SOURCES = ("policy", "pairs", "both")


@dataclass
class ContrastSettings(_Base):
    """A mixin of `RewardConfig`: which worse responses are made, and from what."""

    contrast_source: str = field(
        default="policy",
        metadata={
            "help": "whose responses are contrasted: policy (the groups), pairs (both sides of the "
            "labelled pairs) or both (half each; never one with the other)"
        },
    )
    contrast_matching: str = field(
        default="random",
        metadata={
            "help": "which of 16 worse responses is taken: random (one is drawn), length or style "
            "(the most similar in it), or hard (the one that the last round's reward model likes "
            "best; needs a method that is given that model, such as contrast_hard)"
        },
    )
    contrast_negatives: str | list[str] = field(
        default=OTHER_PROMPT,
        metadata={
            "help": "ways to make a worse response, as a list: other_prompt, repeated, cut, "
            "shuffled, language, or package.module:attribute; each makes as many"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast_source not in SOURCES:
            near = suggest(self.contrast_source, list(SOURCES))
            raise UserError(f"contrast_source is {self.contrast_source!r}{near}")
        check_matching(self.contrast_matching, setting="contrast_matching")
        names = self.contrast_negatives
        self.contrast_negatives = [names] if isinstance(names, str) else list(names)
        if not self.contrast_negatives:
            raise UserError("contrast_negatives is empty; name at least one, such as other_prompt")
        names = [str(name) for name in self.contrast_negatives]
        if len(set(names)) < len(names):
            raise UserError(
                f"contrast_negatives is [{', '.join(names)}]; name each once (each makes as many)"
            )
        matched = [NEGATIVES.get(name).matched for name in names]
        if self.contrast_matching != "random" and not any(matched):
            raise UserError(
                f"contrast_matching is {self.contrast_matching!r}, but {', '.join(names)} is made "
                "without a choice among several; add another to contrast_negatives, or set "
                "contrast_matching to random (with a method such as contrast)"
            )


@dataclass
class ContrastConfig(ContrastSettings, RewardConfig):
    """`RewardConfig` with the settings of the contrast."""

    contrast_share: float = field(
        default=0.25, metadata={"help": "share of the training pairs that are made by contrast"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.contrast_share < 1:
            raise UserError(f"contrast_share is {self.contrast_share}; it must lie in (0, 1)")


class ContrastTrainer(RewardTrainer):
    """`RewardTrainer` on the labelled pairs and on contrast pairs.

    Args:
        meta_dataset: groups of the policy's responses, or a file of them; not needed if
            `contrast_source` is pairs.
        reward: folder of the reward model that chooses hard negatives.
    """

    def __init__(
        self,
        model: Any,
        args: ContrastConfig,
        *,
        meta_dataset: Any = None,
        reward: str | Path | None = None,
        **keywords: Any,
    ) -> None:
        pairs = rows_of(keywords.pop("train_dataset"), read_pairs)
        if any(pair.get("prompt") is None for pair in pairs):
            raise UserError("contrast needs pairs with a prompt of their own")
        self._contrast: _Contrast | None = _Contrast(pairs, meta_dataset, reward)
        super().__init__(model, args, train_dataset=table("pairs", pairs, COLUMNS), **keywords)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Also make the contrast pairs, as many as the share of the pairs that are kept asks."""
        found = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        given, self._contrast = self._contrast, None
        if given is None:  # the training pairs come first
            return found
        count = max(1, round(len(found) * args.contrast_share / (1 - args.contrast_share)))
        fits = FitsLimit(processing_class, self._limit)
        made = contrast_rows(args, *given, count=count, fits=fits)
        encoded = [encode_pair(row, n, processing_class, "contrast") for n, row in enumerate(made)]
        kept, counts = encoded, {}
        for reason, keep in length_filters(self._limit).items():
            before, kept = len(kept), [row for row in kept if keep(row)]
            counts[reason] = before - len(kept)
        if any(counts.values()):
            self._report_dropped("contrast", counts, len(kept))
        more = [{**row, ROW: len(dataset) + row[ROW], "margin": 0, WEIGHT: 1} for row in kept]
        columns = ("chosen_ids", "rejected_ids", ROW, PROMPT, "margin", WEIGHT)
        found = found.select_columns([name for name in columns if name in found.column_names])
        of_contrast = Dataset.from_list(
            [{name: row[name] for name in found.column_names} for row in more],
            features=found.features,
        )
        self._require_known_ids(of_contrast, "contrast", in_memory=True)
        return concatenate_datasets([found, of_contrast])


@dataclass
class ContrastMetaConfig(ContrastSettings, MetaRMConfig):
    """`MetaRMConfig` with the settings of the contrast; J is `ordered` by default."""

    meta_objective: str = field(
        default="ordered",
        metadata={
            "help": "J of a group of two, the better response first: ordered (mean log sigmoid of "
            "the difference), another name in shiftrm.core.objectives, or package.module:function."
        },
    )
    contrast_groups: int | None = field(
        default=None,
        metadata={"help": "contrast rows for the meta step. Default: one per response."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast_groups is not None and self.contrast_groups < 1:
            raise UserError(f"contrast_groups is {self.contrast_groups}; give at least 1")
        if self.meta_objective == "difference":
            raise UserError(
                "meta_objective is 'difference', which does not read which response is the better "
                "one; give ordered or ordered_difference, or method metarm"
            )


class ContrastMetaTrainer(MetaRMTrainer):
    """`MetaRMTrainer` whose groups are contrast rows, the better response first.

    Args:
        meta_dataset, reward: as in `ContrastTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: ContrastMetaConfig,
        *,
        meta_dataset: Any = None,
        reward: str | Path | None = None,
        **keywords: Any,
    ) -> None:
        used = args.contrast_source != "policy"  # a stream of pairs can be read only once
        pairs = rows_of(keywords["train_dataset"], read_pairs) if used else []
        self._contrast = _Contrast(pairs, meta_dataset, reward)
        super().__init__(model, args, meta_dataset=meta_dataset, **keywords)

    def _groups_to_read(self, meta_dataset: Any) -> list[Row]:
        fits = FitsLimit(self.processing_class, self._limit)
        count = self.args.contrast_groups
        return as_groups(contrast_rows(self.args, *self._contrast, count=count, fits=fits))


class _Contrast(NamedTuple):
    """What the contrast is made from: pairs, groups or their file, and a reward model."""

    pairs: list[Row]
    groups: Any
    reward: str | Path | None
