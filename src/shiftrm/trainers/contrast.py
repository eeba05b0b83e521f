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

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftrm.data.groups import read_groups
from shiftrm.data.matching import Score, check_matching
from shiftrm.data.negatives import NEGATIVES, OTHER_PROMPT, negative_pairs, possible
from shiftrm.data.pairs import COLUMNS, FINISHED, read_pairs
from shiftrm.data.replies import answers_of
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.measure.score_once import score_fitting
from shiftrm.models.responses import Response
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

if TYPE_CHECKING:
    _Base = RewardConfig
else:
    _Base = object

__all__ = ["ContrastConfig", "ContrastMetaConfig", "ContrastMetaTrainer", "ContrastTrainer"]

logger = logging.getLogger(__name__)

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
        for name in self.contrast_negatives:
            NEGATIVES.get(str(name))


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
        pairs = _rows(keywords.pop("train_dataset"), read_pairs)
        if any(pair.get("prompt") is None for pair in pairs):
            raise UserError("contrast needs pairs with a prompt of their own")
        share = args.contrast_share
        count = max(1, round(len(pairs) * share / (1 - share)))
        made = contrast_rows(args, pairs, meta_dataset, reward, count=count)
        if any(pair.get("margin") is not None for pair in pairs):
            made = [{**row, "margin": 0.0} for row in made]
        rows = [{**dict.fromkeys(FINISHED, True), **_given(pair)} for pair in pairs]
        whole = table("pairs and contrast", [*rows, *made], COLUMNS)
        super().__init__(model, args, train_dataset=whole, **keywords)


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
        pairs = _rows(keywords["train_dataset"], read_pairs) if used else []
        made = contrast_rows(args, pairs, meta_dataset, reward, count=args.contrast_groups)
        super().__init__(model, args, meta_dataset=as_groups(made), **keywords)


def contrast_rows(
    args: ContrastSettings,
    pairs: Sequence[Row],
    groups: Any,
    reward: str | Path | None,
    *,
    count: int | None,
) -> list[Row]:
    """Return contrast rows as the settings say, as many of each way and source (give or take one).

    A way that can make nothing worse is left out with a warning, unless all are such.

    Args:
        pairs, groups: the labelled pairs, and the groups of the policy's responses or their file.
        reward: folder of a reward model, for hard.
        count: of rows; None: one for each response of the sources.

    Raises:
        UserError: the source or the reward model is missing, or no way can make anything worse.
    """
    sources = []
    if args.contrast_source != "pairs":
        if groups is None:
            raise UserError(
                f"contrast_source is {args.contrast_source!r}, which needs groups of the policy's "
                "responses; give them, or set contrast_source to pairs"
            )
        sources.append(_rows(groups, read_groups))
    if args.contrast_source != "policy":
        sources.append(as_groups(pairs))
    score = None
    if args.contrast_matching == "hard":
        if reward is None:
            raise UserError(
                "contrast_matching is 'hard', which needs the last round's reward model; use a "
                "method that is given it, such as contrast_hard"
            )
        score = scoring(reward)
    if count is None:
        count = sum(len(answers_of(source)) for source in sources)
    cells = _usable(sources, args.contrast_negatives)
    made: list[Row] = []
    for number, (source, kind) in enumerate(cells):
        part = count // len(cells) + (number < count % len(cells))
        matching, seed = args.contrast_matching, args.seed
        made += negative_pairs(source, kind, part, matching=matching, seed=seed, score=score)
    return made


def _usable(sources: list[list[Row]], kinds: Sequence[str]) -> list[tuple[list[Row], str]]:
    """Return the sources with the ways that can make something worse of them; else the first."""
    found: list[tuple[list[Row], str]] = []
    without: list[tuple[list[Row], str]] = []
    for source in sources:
        for kind in kinds:
            (found if possible(source, kind) else without).append((source, kind))
    for _, kind in without if found else ():
        logger.warning("contrast leaves out %s, which needs %s", kind, NEGATIVES.get(kind).needs)
    return found or without[:1]  # whose error says what is missing


def as_groups(pairs: Iterable[Row]) -> list[Row]:
    """Return pairs as groups of two, the chosen response first."""
    return [
        {
            "prompt": pair.get("prompt"),
            "responses": [pair["chosen"], pair["rejected"]],
            "finished": [True if pair.get(name) is None else pair[name] for name in FINISHED],
        }
        for pair in pairs
    ]


def scoring(reward: str | Path) -> Score:
    """Return the rewards of a checkpoint as a function; text beyond its context gets -inf."""
    scorer = Scorer.from_pretrained(reward).to_accelerator()

    def score(
        prompts: Sequence[Any], responses: Sequence[Any], *, finished: Sequence[bool]
    ) -> list[float]:
        rows = [Response(*row) for row in zip(prompts, responses, finished, strict=True)]
        places = [f"contrast, row {i}" for i in range(len(rows))]
        rewards = score_fitting(scorer, rows, places, name=str(reward))
        return [-math.inf if one is None else one for one in rewards]

    return score


def _rows(source: Any, read: Any) -> list[Row]:
    """Return rows that are given as such or as the name of a file or hub data set."""
    return list(read(source) if isinstance(source, str | Path) else source)


def _given(pair: Row) -> Row:
    return {key: value for key, value in pair.items() if value is not None}
