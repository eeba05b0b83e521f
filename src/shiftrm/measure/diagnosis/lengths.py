"""How length and reward of a response are related, over one file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats, correlation
from shiftrm.measure.diagnosis.scored import NOISE, ScoredGroup, distinct


@dataclass(frozen=True)
class Lengths:
    """Relation of length and reward.

    Attributes:
        length_mean: mean tokens of a response.
        correlation, correlation_within: Pearson's, of reward and length, over all distinct
            responses and after subtracting each prompt's means. None if either is constant (or
            rewards within prompts differ by less than noise).
        longest_best_share: prompts (with responses of different length) whose best response is the
            longest; responses that share the best reward count fractionally.
        longest_best_chance: the same for a random best response.
        truncated_share: responses cut off by a limit.
        truncated_gap: mean reward of cut-off minus finished responses, prompt by prompt, over the
            `truncated_prompts` prompts that have both.
    """

    length_mean: float
    correlation: float | None
    correlation_within: float | None
    longest_best_share: float | None
    longest_best_chance: float | None
    truncated_share: float
    truncated_gap: float | None
    truncated_prompts: int


def lengths(groups: Sequence[ScoredGroup]) -> Lengths:
    """See `Lengths`.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("no groups")
    responses = [response for group in groups for response in group.responses]
    single = [distinct(group) for group in groups]
    tables = [_columns(group) for group in single]  # [2, K] each: rewards and lengths
    together = np.concatenate(tables, axis=1)
    within = np.concatenate([_centred(table) for table in tables], axis=1)
    shares = [_longest_best(table) for table in tables if table[1].min() < table[1].max()]
    gaps = [gap for group in single if (gap := _cut_off_gap(group)) is not None]
    return Lengths(
        length_mean=float(np.mean([response.length for response in responses])),
        correlation=correlation(together[0], together[1]),
        correlation_within=(
            correlation(within[0], within[1]) if np.abs(within[0]).max() > NOISE else None
        ),
        longest_best_share=float(np.mean([best for best, _ in shares])) if shares else None,
        longest_best_chance=float(np.mean([chance for _, chance in shares])) if shares else None,
        truncated_share=float(np.mean([not response.finished for response in responses])),
        truncated_gap=float(np.mean(gaps)) if gaps else None,
        truncated_prompts=len(gaps),
    )


def _columns(group: ScoredGroup) -> Floats:
    """Rewards and lengths, shape [2, K]."""
    return np.array([[r.reward, r.length] for r in group.responses], dtype=np.float64).T


def _centred(table: Floats) -> Floats:
    """Subtract each row's mean, after its first entry, so that equal values give exact zeros."""
    table = table - table[:, :1]
    return table - table.mean(axis=1, keepdims=True)


def _longest_best(table: Floats) -> tuple[float, float]:
    """Return the share of longest responses among the best ones, and among all."""
    rewards, length = table
    longest = length == length.max()
    return float(longest[rewards == rewards.max()].mean()), float(longest.mean())


def _cut_off_gap(group: ScoredGroup) -> float | None:
    cut_off = [r.reward for r in group.responses if not r.finished]
    finished = [r.reward for r in group.responses if r.finished]
    return float(np.mean(cut_off) - np.mean(finished)) if cut_off and finished else None
