"""Judges that score every response: a reward model, and the gold world's true reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shiftrm.errors import UserError
from shiftrm.measure.judges.comparing import Comparison, Outcome, Progress, Verdict
from shiftrm.models.responses import encode_response
from shiftrm.models.rope import context_limit
from shiftrm.world.gold import GoldReward

if TYPE_CHECKING:
    from shiftrm.models.scoring import Scorer

__all__ = ["GoldJudge", "RewardModelJudge"]


class GoldJudge:
    """The gold world's true reward; prompts must be the gold world's.

    Args:
        tie_margin: differences up to this are a tie, in units of the reward.
    """

    def __init__(self, *, tie_margin: float = 0.0) -> None:
        _check_margin(tie_margin)
        self.tie_margin = tie_margin
        self.name = "gold"

    def judge(
        self, comparisons: Sequence[Comparison], *, progress: Progress | None = None
    ) -> list[Verdict]:
        """See `Judge`.

        Raises:
            UserError: texts that are not the gold world's.
        """
        reward, verdicts = GoldReward(), []
        for done, comparison in enumerate(comparisons, start=1):
            prompt, ours, theirs = comparison.prompt, comparison.ours, comparison.theirs
            if not (isinstance(prompt, str) and isinstance(ours, str) and isinstance(theirs, str)):
                raise UserError("the gold judge reads texts of the gold world only, no messages")
            scores = reward(
                [prompt, prompt],
                [ours, theirs],
                [comparison.ours_finished, comparison.theirs_finished],
            )
            verdicts.append(_verdict(comparison, scores[0], scores[1], self.tie_margin))
            if progress is not None:
                progress(done, len(comparisons))
        return verdicts


class RewardModelJudge:
    """A reward model: the response of higher reward wins.

    A comparison with a response that is longer than the model's context has no outcome.

    Args:
        scorer: the model with its tokenizer.
        name: name in reports.
        tie_margin: differences up to this are a tie, in units of the reward.
        batch_size: rows per forward pass.
    """

    def __init__(
        self, scorer: "Scorer", *, name: str, tie_margin: float = 0.0, batch_size: int = 64
    ) -> None:
        _check_margin(tie_margin)
        self.scorer, self.name = scorer, name
        self.tie_margin, self.batch_size = tie_margin, batch_size

    def judge(
        self, comparisons: Sequence[Comparison], *, progress: Progress | None = None
    ) -> list[Verdict]:
        """See `Judge`.

        Raises:
            UserError: text that cannot be rendered, or a reward that is not a number.
        """
        encoded = [self._encode(comparison) for comparison in comparisons]
        fitting = [ids for ids in encoded if ids is not None]
        # Score equal sequences once, so that equal responses tie exactly.
        index = {
            sequence: i for i, sequence in enumerate(dict.fromkeys(s for p in fitting for s in p))
        }
        rewards = self._score(list(index), progress)
        verdicts = []
        for comparison, ids in zip(comparisons, encoded, strict=True):
            if ids is None:
                note = "longer than the model's context"
                verdicts.append(Verdict(comparison, None, note=note))
                continue
            ours, theirs = (rewards[index[sequence]] for sequence in ids)
            verdicts.append(_verdict(comparison, ours, theirs, self.tie_margin))
        return verdicts

    def _encode(self, comparison: Comparison) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        limit = context_limit(self.scorer.model.config)
        tokenizer = self.scorer.tokenizer
        ours, theirs = (
            tuple(encode_response(tokenizer, side, vocabulary=self.scorer.vocabulary))
            for side in comparison.sides
        )
        if not ours or not theirs:
            raise UserError("prompt and response are empty, so there is nothing to score")
        too_long = limit is not None and max(len(ours), len(theirs)) > limit
        return None if too_long else (ours, theirs)

    def _score(self, sequences: list[tuple[int, ...]], progress: Progress | None) -> list[float]:
        rewards = self.scorer.score_ids(sequences, batch_size=self.batch_size, progress=progress)
        if not all(map(math.isfinite, rewards)):
            raise UserError(
                f"{self.name} gives a reward that is not a number; the checkpoint is broken, or "
                "overflows in its precision (try float32)"
            )
        return rewards


def _verdict(comparison: Comparison, ours: float, theirs: float, tie_margin: float) -> Verdict:
    difference = ours - theirs
    outcome: Outcome = "tie"
    if difference > tie_margin:
        outcome = "win"
    elif difference < -tie_margin:
        outcome = "lose"
    note = "identical" if comparison.identical else ""
    return Verdict(comparison, outcome, scores=(ours, theirs), note=note)


def _check_margin(tie_margin: float) -> None:
    if not 0 <= tie_margin < math.inf:
        raise UserError(f"tie_margin is {tie_margin}; it must be at least 0")
