"""Spread of the rewards of responses to one prompt. Every prompt has equal weight."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import (
    RESAMPLES,
    Measured,
    measured,
    measured_mean,
    percentile_interval,
    prompt_weights,
    weighted_mean,
)
from shiftrm.measure.diagnosis.scored import NOISE, ScoredGroup, differences, distinct

COIN_BAND = 0.01  # a stated probability within 0.5 +- this counts as a coin toss
SATURATED = 0.99  # pairs with a higher stated probability have hardly any gradient
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Spread:
    """Spread of the rewards of responses to one prompt.

    Attributes:
        prompts, responses: their numbers.
        reward_mean, reward_std: over all responses.
        duplicate_share: share of responses that equal an earlier one to the same prompt.
        collapsed_share: share of prompts whose responses are all the same.
        comparisons: pairs of distinct responses to one prompt, on which the rest is based.
        difference_mean: mean |r_i - r_j|.
        difference_variance: mean (r_i - r_j)^2, the paper's Figure 1. Twice the variance within
            prompts.
        within_std: standard deviation within prompts.
        within_share: share of the rewards' variance that is within prompts, not between them; None
            for one prompt or equal rewards. See `within_share`.
        relative_std: its square root: deviation within prompts over that of all rewards.
        difference_quantiles: of |r_i - r_j|, by probability.
        equal_share, noise_share, coin_share, saturated_share: shares of comparisons with exactly
            equal rewards, |difference| < 1e-6, a stated probability within 0.49 to 0.51, and one
            above 0.99.
        difference_loss: J (Eq. 2) on the groups with duplicates, as in training.
        difference_loss_lowest, difference_loss_highest: (K-1)/(2K) and (K-1)/K.
    """

    prompts: int
    responses: int
    reward_mean: float
    reward_std: float
    duplicate_share: float
    collapsed_share: float
    comparisons: int
    difference_mean: Measured | None
    difference_variance: Measured | None
    within_std: float | None
    within_share: Measured | None
    relative_std: float | None
    difference_quantiles: dict[str, float]
    equal_share: float | None
    noise_share: float | None
    coin_share: float | None
    saturated_share: float | None
    difference_loss: float
    difference_loss_lowest: float
    difference_loss_highest: float


def spread(groups: Sequence[ScoredGroup], *, seed: int = 0, resamples: int = RESAMPLES) -> Spread:
    """Compute the spread of rewards within and between prompts; see `Spread`.

    Raises:
        ValueError: no groups, or one with fewer than two responses.
    """
    if not groups:
        raise ValueError("no groups")
    if any(len(group.responses) < 2 for group in groups):
        raise ValueError("a group needs at least two responses: nothing to tell apart in one")
    single = [distinct(group) for group in groups]
    compared = [group for group in single if len(group.responses) > 1]
    rewards = np.array([r.reward for group in groups for r in group.responses])
    pairs = differences(compared)
    prompts = [group.prompt for group in compared]
    absolute = np.array([d.mean() for d in pairs])
    squared = np.array([np.square(d).mean() for d in pairs])
    share = _within_share(compared, squared, seed=seed, resamples=resamples)
    losses = [
        (_difference_loss(d, K := len(g.responses)), (K - 1) / (2 * K), (K - 1) / K)
        for g, d in zip(groups, differences(groups), strict=True)
    ]
    loss, lowest, highest = np.array(losses).mean(axis=0).tolist()
    return Spread(
        prompts=len({group.prompt for group in groups}),
        responses=rewards.size,
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        duplicate_share=1 - sum(len(group.responses) for group in single) / rewards.size,
        collapsed_share=1 - len(compared) / len(groups),
        comparisons=sum(d.size for d in pairs),
        difference_mean=_mean(absolute, prompts, seed=seed, resamples=resamples),
        difference_variance=_mean(squared, prompts, seed=seed, resamples=resamples),
        within_std=float(np.sqrt(squared.mean() / 2)) if pairs else None,
        within_share=share,
        relative_std=None if share is None else float(np.sqrt(share.value)),
        difference_quantiles=_quantiles(pairs),
        equal_share=_share(pairs, lambda d: d == 0),
        noise_share=_share(pairs, lambda d: d < NOISE),
        coin_share=_share(pairs, lambda d: _stated(d) <= 0.5 + COIN_BAND),
        saturated_share=_share(pairs, lambda d: _stated(d) > SATURATED),
        difference_loss=loss,
        difference_loss_lowest=lowest,
        difference_loss_highest=highest,
    )


def variance_ratio(
    groups: Sequence[ScoredGroup],
    reference: Sequence[ScoredGroup],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Measured | None:
    """Return the variance of reward differences over that of the reference, with an interval.

    The two files are resampled independently. None if the reference's rewards are all equal, or
    a file has no two distinct responses to a prompt.
    """
    (ours, prompts), (theirs, other_prompts) = _squared(groups), _squared(reference)
    if not ours.size or not theirs.size or theirs.mean() == 0:
        return None
    value = float(ours.mean() / theirs.mean())
    if len(set(prompts)) < 2 or len(set(other_prompts)) < 2:
        return Measured(value)
    draws = zip(
        prompt_weights(prompts, seed=seed, resamples=resamples),
        prompt_weights(other_prompts, seed=seed + 1, resamples=resamples),
        strict=True,
    )
    ratios = []
    for w, v in draws:
        below = weighted_mean(theirs, v)
        ratios.append(weighted_mean(ours, w) / below if below > 0 else float("nan"))
    return Measured(value, *percentile_interval(ratios))


def _squared(groups: Sequence[ScoredGroup]) -> tuple[Floats, list[Hashable]]:
    """Return mean (r_i - r_j)^2 and prompt of every group that has distinct responses."""
    compared = [group for group in map(distinct, groups) if len(group.responses) > 1]
    squared = np.array([np.square(d).mean() for d in differences(compared)])
    return squared, [group.prompt for group in compared]


def _within_share(
    groups: Sequence[ScoredGroup], squared: Floats, *, seed: int, resamples: int
) -> Measured | None:
    """Return the share of variance within prompts, from a one-way random-effects model.

    Within: w = mean of the unbiased variances. Between: b = variance of the prompts' means minus
    mean(w_g / K_g), or 0 if that is negative. Share: w / (w + b), which is 1
    minus the intraclass correlation.
    """
    prompts = [group.prompt for group in groups]
    rewards = [response.reward for group in groups for response in group.responses]
    if len(set(prompts)) < 2 or min(rewards) == max(rewards):
        return None
    sizes = np.array([len(group.responses) for group in groups])
    means = np.array([np.mean([r.reward for r in group.responses]) for group in groups])
    within = squared / 2  # mean (r_i - r_j)^2 is twice the unbiased variance

    def share(weights: Floats) -> float:
        total = weights.sum()
        centred = means - weighted_mean(means, weights)
        if total < 2:
            return float("nan")
        of_means = float((weights * centred * centred).sum() / (total - 1))
        inside = weighted_mean(within, weights)
        between = max(0.0, of_means - weighted_mean(within / sizes, weights))
        return inside / (inside + between) if inside + between > 0 else float("nan")

    return measured(share, prompts, seed=seed, resamples=resamples)


def _mean(
    values: Floats, prompts: Sequence[Hashable], *, seed: int, resamples: int
) -> Measured | None:
    return measured_mean(values, prompts, seed=seed, resamples=resamples) if values.size else None


def _stated(difference: Floats) -> Floats:
    """Return the Bradley-Terry probability of a difference >= 0."""
    return 1.0 / (1.0 + np.exp(-difference))


def _difference_loss(difference: Floats, size: int) -> float:
    return float(2.0 / size**2 * _stated(difference).sum())  # Eq. 2


def _share(pairs: list[Floats], condition: Callable[[Floats], NDArray[np.bool_]]) -> float | None:
    return float(np.mean([condition(d).mean() for d in pairs])) if pairs else None


def _quantiles(pairs: list[Floats]) -> dict[str, float]:
    """Return quantiles of all differences, by probability."""
    if not pairs:
        return {}
    together = np.concatenate(pairs)
    return {
        str(q): float(v) for q, v in zip(QUANTILES, np.quantile(together, QUANTILES), strict=True)
    }
