"""Least squares within groups: what a reward depends on among the responses to one prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, t_quantile_95

LEAST_PROMPTS = 10
"""A feature that varies within fewer prompts is left out: a single response would decide."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class WithinFit:
    """A linear fit of rewards by features, both less their means over the prompt.

    Attributes:
        coefficients_F: change of the reward, in `scale`s, by one standard deviation of a feature
            within prompts, the other features kept; NaN for features that were left out.
        errors_F: standard errors, clustered by prompt.
        spreads_F: standard deviations of the features within prompts.
        explained: share of the variance of the rewards within prompts (R^2).
        prompts, rows: number of prompts with at least two responses, and their responses.
    """

    coefficients_F: Floats
    errors_F: Floats
    spreads_F: Floats
    explained: float
    prompts: int
    rows: int

    def measured(self, feature: int) -> Measured | None:
        """Return a coefficient with its 95 % t-interval; None for a feature that was left out."""
        value, error = float(self.coefficients_F[feature]), float(self.errors_F[feature])
        if np.isnan(value):
            return None
        half = t_quantile_95(self.prompts - 1) * error
        return Measured(value, value - half, value + half)


def fit_within(
    features_NF: Floats, rewards_N: Floats, prompts: Sequence[Hashable], *, scale: float = 1.0
) -> WithinFit | None:
    """Regress rewards on features within prompts.

    With `x` and `r` less their means over the prompt, and `x` divided by its standard deviation:

        b = (X'X)^+ X'r,   V = G / (G - 1) (X'X)^+ [sum_g X_g' e_g e_g' X_g] (X'X)^+

    for G prompts with residuals `e_g`. The pseudo-inverse gives features that say the same equal
    shares. A feature is left out if it varies within fewer than `LEAST_PROMPTS` prompts. The means
    over the prompts cost no further degrees of freedom, since every prompt lies in one cluster.

    Source: Liang and Zeger 1986; with group means, Arellano 1987.

    Args:
        features_NF: one row per response.
        rewards_N: their rewards.
        prompts: the prompt of every row.
        scale: rewards are divided by it.

    Returns:
        None if no feature is left, the rewards do not vary within prompts, or there are fewer than
        two degrees of freedom for each feature.
    """
    index_N, sizes = _indices(prompts)
    kept_N = sizes[index_N] > 1
    if not kept_N.any():
        return None
    features_NF, rewards_N = features_NF[kept_N], rewards_N[kept_N]
    index_N = np.unique(index_N[kept_N], return_inverse=True)[1]
    groups = int(index_N.max()) + 1
    x_NF, r_N = centred(features_NF, index_N), centred(rewards_N[:, None], index_N)[:, 0] / scale
    freedom = len(r_N) - groups
    spreads_F = np.sqrt((x_NF**2).sum(axis=0) / freedom)
    used_F = _varying_prompts(x_NF, index_N) >= LEAST_PROMPTS
    total = float(r_N @ r_N)
    if not used_F.any() or freedom < 2 * used_F.sum() or total <= _ROUNDING**2 * len(r_N):
        return None
    x_NU = x_NF[:, used_F] / spreads_F[used_F]
    inverse_UU = np.linalg.pinv(x_NU.T @ x_NU, rcond=_ROUNDING, hermitian=True)
    b_U = inverse_UU @ (x_NU.T @ r_N)
    left_N = r_N - x_NU @ b_U
    scores_GU = np.zeros((groups, x_NU.shape[1]))
    np.add.at(scores_GU, index_N, x_NU * left_N[:, None])  # X_g' e_g
    covariance_UU = inverse_UU @ (scores_GU.T @ scores_GU) @ inverse_UU * groups / (groups - 1)
    coefficients_F, errors_F = (np.full(len(used_F), np.nan) for _ in range(2))
    coefficients_F[used_F] = b_U
    errors_F[used_F] = np.sqrt(np.maximum(np.diag(covariance_UU), 0.0))
    explained = 1.0 - float(left_N @ left_N) / total
    return WithinFit(coefficients_F, errors_F, spreads_F, explained, groups, len(r_N))


def spread_within(rewards_N: Floats, prompts: Sequence[Hashable]) -> float:
    """Return the standard deviation within prompts; 0 if no prompt has two rows."""
    index_N, sizes = _indices(prompts)
    freedom = len(index_N) - len(sizes)
    if freedom < 1:
        return 0.0
    r_N = centred(rewards_N[:, None], index_N)
    return float(np.sqrt((r_N**2).sum() / freedom))


def centred(values_NF: Floats, index_N: np.ndarray) -> Floats:
    """Subtract each group's mean, after its first row, so that equal values give exact zeros.

    Args:
        index_N: the group of every row, from 0 without gaps.
    """
    first_G = np.unique(index_N, return_index=True)[1]
    values_NF = values_NF - values_NF[first_G][index_N]
    sums_GF = np.zeros((len(first_G), values_NF.shape[1]))
    np.add.at(sums_GF, index_N, values_NF)
    return values_NF - (sums_GF / np.bincount(index_N)[:, None])[index_N]


def _indices(prompts: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of every row, numbered by first occurrence, and the size of each."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index_N = np.fromiter((number[p] for p in prompts), dtype=np.int64, count=len(prompts))
    return index_N, np.bincount(index_N, minlength=len(number))


def _varying_prompts(x_NF: Floats, index_N: np.ndarray) -> np.ndarray:
    """Return the number of prompts within which each feature varies."""
    varies_GF = np.zeros((int(index_N.max()) + 1, x_NF.shape[1]), dtype=bool)
    np.logical_or.at(varies_GF, index_N, np.abs(x_NF) > _ROUNDING)
    return varies_GF.sum(axis=0)
