"""Functions that reward responses: a `Scorer`, a client of a server, or a user's own."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from shiftrm.errors import UserError
from shiftrm.models.responses import Response

__all__ = ["TokenReward", "rewards_of"]


@runtime_checkable
class TokenReward(Protocol):
    """A reward function that reads sampled tokens where possible, such as a `Scorer`."""

    def score(self, responses: Sequence[Response], /) -> list[float]: ...


def rewards_of(
    reward_fn: Callable[..., Sequence[float]] | TokenReward, responses: Sequence[Response]
) -> list[float]:
    """Return rewards of responses, from their tokens for a `TokenReward`, else from their text.

    Raises:
        UserError: the number of rewards differs from the number of responses.
    """
    if isinstance(reward_fn, TokenReward):
        return reward_fn.score(responses)
    given = reward_fn(
        [r.prompt for r in responses],
        [r.text for r in responses],
        finished=[r.finished for r in responses],
    )
    rewards = [float(reward) for reward in given]
    if len(rewards) != len(responses):
        raise UserError(
            f"reward_fn gave {len(rewards)} rewards for {len(responses)} responses; "
            "it must give one each"
        )
    return rewards
