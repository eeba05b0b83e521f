"""Bootstrap intervals over prompts: all responses to a prompt are drawn together."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from shiftrm.core.discrimination import Floats

LEVEL = 0.05
"""Significance level of `sign_test`; a p-value at or above it is not clear."""

RESAMPLES = 1000  # enough for stable second digits of the 2.5 % quantiles


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval; the ends are None with fewer than two prompts."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """`0.71 [0.66, 0.76]`, or `0.71` without an interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def prompt_weights(
    prompts: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> Iterator[Floats]:
    """Yield how often each row is drawn when prompts are resampled with replacement.

    Args:
        prompts: the prompt of every row; rows with equal prompts are drawn together.
        seed: equal prompts and seed give equal weights, so differences of two models on one file
            are paired.

    Yields:
        `resamples` arrays of integer weights, one entry per row.
    """
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    of_row = np.fromiter((index[prompt] for prompt in prompts), dtype=np.int64, count=len(prompts))
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(0, len(index), len(index)), minlength=len(index))
        yield drawn[of_row].astype(np.float64)


def percentile_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the 2.5 % and 97.5 % percentiles of resampled values, ignoring NaN."""
    finite = [value for value in values if not np.isnan(value)]
    if not finite:
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def measured(
    statistic: Callable[[Floats], float],
    prompts: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Measured | None:
    """Compute a weighted statistic with its percentile interval over prompts.

    Args:
        statistic: maps weights (one per row) to a number; NaN if undefined, such as when all
            weights are zero.
        prompts, seed, resamples: as in `prompt_weights`.

    Returns:
        None if the statistic of all rows is NaN.
    """
    value = statistic(np.ones(len(prompts)))
    if np.isnan(value):
        return None
    if len(set(prompts)) < 2:
        return Measured(float(value))
    draws = prompt_weights(prompts, seed=seed, resamples=resamples)
    return Measured(float(value), *percentile_interval([statistic(w) for w in draws]))


def measured_mean(
    values: Floats, prompts: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> Measured:
    """Compute the mean of finite values with its interval, as `measured`.

    Raises:
        ValueError: no values.
    """
    found = measured(
        lambda weights: weighted_mean(values, weights), prompts, seed=seed, resamples=resamples
    )
    if found is None:
        raise ValueError("no finite values")
    return found


def weighted_mean(values: Floats, weights: Floats) -> float:
    """Return the weighted mean; NaN if all weights are 0."""
    total = weights.sum()
    return float((values * weights).sum() / total) if total > 0 else float("nan")


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the split, under equal chances to win or lose; without ties.

    Unlike a normal approximation, it is valid for a handful of prompts.
    """
    from scipy import stats  # takes most of a second to import

    decided = wins + losses
    return float(stats.binomtest(wins, decided).pvalue) if decided else 1.0


def t_quantile_95(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, for two-sided 95 % intervals.

    Raises:
        ValueError: below one degree of freedom.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"a t-interval needs at least two values, got {degrees_of_freedom + 1}")
    return float(special.stdtrit(degrees_of_freedom, 0.975))
