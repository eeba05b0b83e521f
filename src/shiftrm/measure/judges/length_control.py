"""Win rate at equal lengths of both responses."""

from collections.abc import Hashable, Sequence

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import RESAMPLES, Measured, measured

RIDGE = 0.1
"""Ridge on the slope: a normal prior of deviation 3.2. Without it, the slope is infinite if length
alone decides; at 1 (sklearn's default), the length effect of a hundred prompts is not fully removed
(simulated rate: 0.62 instead of 0.5, but 0.55 at 0.1)."""

_STEPS = 100  # Newton's method needs about ten
_SATURATED = 0.02  # deviation of tanh(d / s) below which length and quality cannot be told apart


def length_controlled_rate(
    scores: Sequence[float],
    length_differences: Sequence[float],
    prompts: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Measured | None:
    """Return the win rate (ties count 1/2) that a logistic fit predicts at equal lengths.

    AlpacaEval 2's idea (Dubois et al., arXiv 2404.04475, Eq. 1 and 2), in its minimal form:

        P(we win) = sigmoid(theta + phi * tanh(d / s)),   rate = sigmoid(theta)

    with d the length of our response minus theirs and s the standard deviation of d. theta is
    our advantage, phi the judge's preference for length. s is the same in all bootstrap samples.

    Deviations from AlpacaEval: there is no term for the difficulty of the instruction, which is
    fitted over a leaderboard of models; the ridge is fixed and on phi only (theirs is on all and
    chosen by cross-validation), so that the rate is the raw one without an effect of length; and
    the fit is to outcomes 1, 1/2 and 0 (theirs is to a judge's probabilities).

    Args:
        scores: 1 where we win, 1/2 at a tie, 0 where we lose. Shape [N].
        length_differences: d, in any unit. Shape [N].
        prompts: see `intervals.measured`.

    Returns:
        None if length and quality cannot be told apart: all differences are (nearly) the same
        and not 0.

    Raises:
        ValueError: no prompts, or sequences of different length.
    """
    if not len(scores) == len(length_differences) == len(prompts) or not len(scores):
        raise ValueError(
            f"{len(scores)} scores, {len(length_differences)} length differences and "
            f"{len(prompts)} prompts; they must be as many, and at least one"
        )
    y = np.asarray(scores, dtype=np.float64)
    d = np.asarray(length_differences, dtype=np.float64)
    if not d.any():
        x = np.zeros_like(d)  # every length is equal already
    else:
        scale = d.std()
        x = np.tanh(d / scale) if scale > 0 else np.ones_like(d)
        if x.std() < _SATURATED:
            return None
    return measured(
        lambda w: _sigmoid(fit_logistic(y, x, w)[0]), prompts, seed=seed, resamples=resamples
    )


def fit_logistic(
    y: Floats, x: Floats, weights: Floats, *, ridge: float = RIDGE
) -> tuple[float, float]:
    """Fit theta and phi of `P = sigmoid(theta + phi * x)` by Newton's method in float64.

    Minimises  -sum_i w_i (y_i log p_i + (1 - y_i) log(1 - p_i)) + ridge / 2 * phi^2.

    Args:
        y: targets in [0, 1]. Shape [N].
        x, weights: shape [N].

    Returns:
        theta and phi; theta is infinite if all weighted targets are 0 or 1, NaN without weights.
    """
    total = weights.sum()
    if total == 0:
        return float("nan"), 0.0
    mean = float((weights * y).sum() / total)
    if mean in (0.0, 1.0):
        return (float("inf") if mean else float("-inf")), 0.0
    # Start from the raw rate at phi = 0, which needs few steps.
    b = np.array([np.log(mean / (1 - mean)), 0.0])
    design = np.stack([np.ones_like(x), x])  # [2, N]
    penalty = np.diag([0.0, ridge])

    def loss(at: Floats) -> float:
        z = at @ design
        return float((weights * (np.logaddexp(0.0, z) - y * z)).sum() + at @ penalty @ at / 2)

    now = loss(b)
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-(b @ design)))
        gradient = design @ (weights * (p - y)) + penalty @ b
        hessian = (design * (weights * p * (1 - p))) @ design.T + penalty
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (after := loss(b - size * step)) > now and size > 1e-6:
            size /= 2
        b, before, now = b - size * step, now, after
        if before - now <= 1e-12 * max(1.0, abs(now)):
            break
    return float(b[0]), float(b[1])


def _sigmoid(z: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -z)))
