"""Iterative reward-model head: the model's own best and worst of each group become its pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState

from shiftrm.data.loaded import no_text
from shiftrm.data.pairs import COLUMNS
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.responses import group_responses
from shiftrm.models.rewards import score_head
from shiftrm.models.scoring import Scorer
from shiftrm.progress import task
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["SelfLabelledConfig", "SelfLabelledTrainer", "best_and_worst"]

LEARNING_RATE = 1e-6


def best_and_worst(groups: Sequence[Row], rewards: Sequence[Sequence[float]]) -> list[Row]:
    """Return a preference row for each group: its response of highest reward over that of lowest.

    Groups whose rewards are all equal give none, nor do those whose two texts are equal or one of
    them empty.

    Args:
        groups: `{"prompt", "responses", "finished"?}`.
        rewards: of each group's responses.
    """
    rows = []
    for group, found in zip(groups, rewards, strict=True):
        responses = group_responses(group)
        best, worst = (responses[found.index(end(found))] for end in (max, min))
        if max(found) == min(found) or best.text == worst.text:
            continue
        if no_text(best.text) or no_text(worst.text):
            continue
        rows.append(
            {
                "prompt": group["prompt"],
                "chosen": best.text,
                "rejected": worst.text,
                "chosen_finished": best.finished,
                "rejected_finished": worst.finished,
            }
        )
    return rows


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
        groups = list(meta_dataset)
        pairs = best_and_worst(groups, _rewards(model, groups, args.per_device_eval_batch_size))
        if not pairs:
            raise UserError(
                "self_labelled: the reward model sees no difference within any group; give groups "
                "of different responses"
            )
        keywords["train_dataset"] = table("pairs that the model labelled", pairs, COLUMNS)
        super().__init__(model, args, **keywords)
        head = score_head(self.model)
        self.model.requires_grad_(False)
        head.requires_grad_(True)


def _rewards(path: str, groups: Sequence[Row], batch_size: int) -> list[list[float]]:
    """Return the rewards of each group's responses."""
    with task("loading the reward model", None):
        scorer = Scorer.from_pretrained(path)
        scorer.model.to(PartialState().device)
    responses = [group_responses(group) for group in groups]
    with task("rewards of the groups", None):
        flat = iter(scorer.score([r for group in responses for r in group], batch_size=batch_size))
    return [[next(flat) for _ in group] for group in responses]
