"""How well rewards tell responses apart: accuracy where labels exist, spread where they do not."""

from collections.abc import Sequence


def pair_accuracy(
    differences: Sequence[float], gold_differences: Sequence[float]
) -> tuple[float | None, int]:
    """Share of pairs that the reward model orders as the gold reward does.

    Pairs that gold holds equal are left out; a pair the reward model holds equal counts one half,
    so that a blind model scores 0.5, not 0.

    Args:
        differences: r(first) - r(second), one a pair.
        gold_differences: the same of the gold reward, or +1 / -1 labels.

    Returns:
        The accuracy (None if no pair is left) and the number of pairs it rests on.
    """
    correct, n = 0.0, 0
    for difference, gold in zip(differences, gold_differences, strict=True):
        if gold == 0:
            continue
        n += 1
        correct += 0.5 if difference == 0 else float((difference > 0) == (gold > 0))
    return (correct / n if n else None), n


def difference_variance(pairs: Sequence[Sequence[float]]) -> float:
    """Variance of r(x, s_1) - r(x, s_2) over prompts (the MetaRM paper's Figure 1).

    The two responses are draws of one policy, so the difference has mean zero and its mean
    square is the unbiased variance.

    Args:
        pairs: two rewards a prompt.
    """
    if not pairs:
        raise ValueError("no pairs")
    return sum((first - second) ** 2 for first, second in pairs) / len(pairs)


def absolute_differences(pairs: Sequence[Sequence[float]]) -> list[float]:
    """|r(x, s_1) - r(x, s_2)|, one a prompt (the paper's Figures 1 and 5)."""
    return [abs(first - second) for first, second in pairs]
