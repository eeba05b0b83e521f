"""Judges that score every response: a reward model, and a gold world's true reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shiftrm.errors import UserError
from shiftrm.measure.judges.comparing import Comparison, Outcome, Verdict
from shiftrm.measure.score_once import score_once, tokens_of
from shiftrm.progress import Advance
from shiftrm.world.world import GoldReward, World

if TYPE_CHECKING:
    from shiftrm.models.scoring import Scorer


class GoldJudge:
    """A gold world's true reward; prompts must be the world's.

    Args:
        world: by default `DEFAULT_WORLD`.
        tie_margin: differences up to this are a tie, in units of the reward.
    """

    def __init__(self, world: World | None = None, *, tie_margin: float = 0.0) -> None:
        _check_margin(tie_margin)
        self.world, self.tie_margin = world, tie_margin
        self.name = "gold"

    def judge(
        self, comparisons: Sequence[Comparison], *, progress: Advance | None = None
    ) -> list[Verdict]:
        """See `Judge`.

        Raises:
            UserError: texts that are not the gold world's.
        """
        reward, verdicts = GoldReward(self.world), []
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
        self, comparisons: Sequence[Comparison], *, progress: Advance | None = None
    ) -> list[Verdict]:
        """See `Judge`.

        Raises:
            UserError: text that cannot be rendered, or a reward that is not a number.
        """
        found = [
            tokens_of(self.scorer, comparison.sides, f"comparison {number}")
            for number, comparison in enumerate(comparisons, start=1)
        ]
        places = {
            tokens: f"comparison {number}"
            for number, pair in enumerate(found, start=1)
            for tokens in pair or ()
        }
        rewards = score_once(
            self.scorer, places, name=self.name, batch_size=self.batch_size, progress=progress
        )
        return [
            Verdict(comparison, None, note="longer than the model's context")
            if pair is None
            else _verdict(comparison, rewards[pair[0]], rewards[pair[1]], self.tie_margin)
            for comparison, pair in zip(comparisons, found, strict=True)
        ]


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
