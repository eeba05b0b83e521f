"""Win, tie and lose rates between two sets of responses to the same prompts."""

from collections.abc import Sequence


def win_tie_lose(
    ours: Sequence[float], theirs: Sequence[float], *, tie_margin: float
) -> tuple[float, float, float]:
    """Shares of prompts where our response is better, about equal, or worse.

    Args:
        ours, theirs: judged values of the two responses to each prompt, in the same order.
        tie_margin: differences up to this count as a tie, in units of the values.

    Raises:
        ValueError: no prompts, or lists of different length.
    """
    if not ours:
        raise ValueError("no prompts to compare on")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    wins = sum(d > tie_margin for d in differences) / n
    losses = sum(d < -tie_margin for d in differences) / n
    return wins, 1.0 - wins - losses, losses
