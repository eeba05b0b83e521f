"""Iterative reward-model head: the model's own best and worst of each group become its pairs."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from accelerate import PartialState

from shiftrm.data.loaded import no_text
from shiftrm.data.pairs import COLUMNS
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.score_once import tokens_of
from shiftrm.models.rendering import option_columns
from shiftrm.models.responses import Response, group_responses
from shiftrm.models.rewards import score_head
from shiftrm.models.rope import LengthLimit, length_limit
from shiftrm.models.scoring import Scorer
from shiftrm.progress import task
from shiftrm.trainers.contrast_rows import FitsLimit
from shiftrm.trainers.pair_batches import table, without_added_nulls
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["SelfLabelledConfig", "SelfLabelledTrainer", "best_and_worst"]

logger = logging.getLogger(__name__)

LEARNING_RATE = 1e-6


def best_and_worst(groups: Sequence[Row], rewards: Sequence[Sequence[float | None]]) -> list[Row]:
    """Return a preference row for each group: its response of highest reward over that of lowest.

    Blank responses are left out first. Groups with fewer than two responses left give no row, nor
    do those whose rewards are all equal or whose best and worst have the same text.

    Args:
        groups: `{"prompt", "responses", "finished"?}`; the columns for the chat template are kept.
        rewards: of each group's responses; None for one that is left out.
    """
    found = map(_best_and_worst, groups, rewards)
    return [row for row in found if not isinstance(row, str)]


SMALL, ALIKE, LEVEL = "small", "alike", "level"
"""Why a group gives no pair: fewer than two responses, one text, or equal rewards."""


def _best_and_worst(group: Row, rewards: Sequence[float | None]) -> Row | str:
    """Return the row of a group, or why there is none."""
    kept = [
        (response, reward)
        for response, reward in zip(group_responses(group), rewards, strict=True)
        if reward is not None and not no_text(response.text)
    ]
    if len(kept) < 2:
        return SMALL
    (best, high), (worst, low) = (end(kept, key=itemgetter(1)) for end in (max, min))
    if best.text == worst.text:
        return ALIKE if all(response.text == best.text for response, _ in kept) else LEVEL
    if high == low:
        return LEVEL
    return {
        "prompt": group["prompt"],
        "chosen": best.text,
        "rejected": worst.text,
        "chosen_finished": best.finished,
        "rejected_finished": worst.finished,
        **option_columns(best.template_options),
    }


@dataclass
class SelfLabelledConfig(RewardConfig):
    """`RewardConfig` with the paper's learning rate as the default."""

    learning_rate: float | None = field(
        default=LEARNING_RATE, metadata={"help": "Learning rate of AdamW, for the head alone."}
    )


class SelfLabelledTrainer(RewardTrainer):
    """`RewardTrainer` on pairs that the start model labels itself; only its head is trained.

    This is the baseline "iterative RM head" of arXiv 2601.22664. The labelled pairs are not used.
    Rewards are those of the start, also in a run that is resumed.

    Args:
        model: a reward model (folder or hub name).
        meta_dataset: groups of responses of today's policy.
    """

    def __init__(self, model: Any, args: Any, *, meta_dataset: Any, **keywords: Any) -> None:
        if not isinstance(model, str):
            raise UserError("self_labelled: give the reward model as a folder or hub name")
        if keywords.get("peft_config") is not None:
            raise UserError("self_labelled trains the score head alone; leave out use_peft")
        groups = list(without_added_nulls(meta_dataset))
        pairs = _own_pairs(model, groups, args)
        keywords["train_dataset"] = table("pairs that the model labelled", pairs, COLUMNS)
        super().__init__(model, args, **keywords)
        head = score_head(self.model)
        self.model.requires_grad_(False)
        head.requires_grad_(True)


def _own_pairs(path: str, groups: Sequence[Row], args: Any) -> list[Row]:
    """Return the pairs that the start model labels; say which responses are left out.

    Raises:
        UserError: no group gives a pair; says why.
    """
    with task("loading the reward model", None):
        scorer = Scorer.from_pretrained(path)
        scorer.model.to(PartialState().device)
    fits = FitsLimit(scorer.tokenizer, length_limit(scorer.model.config, args.max_length))
    able = [_able(scorer, row, fits, f"groups, row {n}") for n, row in enumerate(groups)]
    reasons = Counter(one for group in able for one in group if isinstance(one, str))
    left_out = _left_out(reasons, fits.limit)
    if left_out:
        logger.warning("self_labelled: left out %s", left_out)
    rewards = _rewards(scorer, able, args.per_device_eval_batch_size)
    found = list(map(_best_and_worst, groups, rewards))
    pairs = [row for row in found if not isinstance(row, str)]
    if not pairs:
        why = Counter(row for row in found if isinstance(row, str))
        words = {
            SMALL: f"{why[SMALL]} have fewer than two responses left ({left_out} left out)",
            ALIKE: f"{why[ALIKE]} hold equal responses",
            LEVEL: f"in {why[LEVEL]} the reward model sees no difference",
        }
        said = ", ".join(words[name] for name in words if why[name])
        raise UserError(
            f"self_labelled: none of the {len(groups)} groups gives a pair: {said}; give groups of "
            "different responses"
        )
    return pairs


BLANK, LONG = "blank", "long"


def _able(scorer: Scorer, group: Row, fits: FitsLimit, where: str) -> list[Response | str]:
    """Return each response, or in its place why it is left out."""
    found: list[Response | str] = []
    for response in group_responses(group):
        if no_text(response.text):
            found.append(BLANK)
            continue
        # What is scored may be sampled tokens; the trainer reads the text.
        whole = tokens_of(scorer, [response], where) is not None and fits(response)
        found.append(response if whole else LONG)
    return found


def _left_out(reasons: Counter[str], limit: LengthLimit) -> str:
    texts = []
    if reasons[BLANK]:
        texts.append(f"{reasons[BLANK]} blank responses")
    if reasons[LONG]:
        texts.append(f"{reasons[LONG]} responses {limit.reason} with their prompts")
    return " and ".join(texts)


def _rewards(
    scorer: Scorer, groups: Sequence[Sequence[Response | str]], batch_size: int
) -> list[list[float | None]]:
    """Return the rewards of each group's responses, None for one that is left out."""
    kept = [one for group in groups for one in group if not isinstance(one, str)]
    with task("rewards of the groups", None):
        flat = iter(scorer.score(kept, batch_size=batch_size))
    return [[None if isinstance(one, str) else next(flat) for one in group] for group in groups]
