"""How long a meta step must be to have a set effect on the rewards.

A fixed length means another thing on every model: 0.5 is little for one and destroys another. Here
the length rho of a step along a direction d is chosen at each step, so that the reward differences
within the groups of the meta batch grow by a set factor, and the loss on pairs rises by at most a
set share. Both are measured at theta + rho d, by forward passes. If all rewards are multiplied by a
constant, the factor is the same.

Ours; imports torch only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shiftrm.core.objectives import Objective, pair_differences


class StepEffect(NamedTuple):
    """What a step of some length does.

    Attributes:
        growth: the factor by which the reward differences grow.
        loss_rise: the rise of the loss on pairs, as a share of the loss at theta.
    """

    growth: float
    loss_rise: float


@dataclass(frozen=True)
class ChosenLength:
    """A length, what a step of that length does, and how many lengths were tried."""

    length: float
    effect: StepEffect
    trials: int


def squared_differences(before_BK: Tensor, after_BK: Tensor, *, mask: Tensor) -> Tensor:
    """Return mean squared reward differences of the pairs within each group.

    Args:
        before_BK, after_BK: rewards of the same responses at theta and theta'.
        mask: True where a response exists, [B, K].

    Returns:
        Shape [3, B]: of the differences before, of those after, and of their change.
    """
    before, exists, _ = pair_differences(before_BK, mask)
    after, _, _ = pair_differences(after_BK, mask)
    squares = torch.stack([before, after, after - before]).square() * exists
    return squares.sum(dim=2) / exists.sum(dim=1)


def growth(squares: Tensor, *, by_change: bool = False) -> float:
    """Return the factor by which reward differences grew.

    It is `rms(after) / rms(before)`; with `by_change`, `1 + rms(after - before) / rms(before)`. The
    latter is never smaller, and equal if all differences were multiplied by one number above 1. An
    objective that knows the right order first shrinks the differences that are wrong, so only
    their change says how far the step went.

    Args:
        squares: mean squared differences before, after, and of the change, [3], over all groups.

    Returns:
        Infinity if all differences were zero and some no longer are; 1 if they still are.
    """
    before, after, change = squares.tolist()
    if not before:
        return math.inf if change else 1.0
    return 1.0 + math.sqrt(change / before) if by_change else math.sqrt(after / before)


def scaling_derivative(objective: Objective, rewards_BK: Tensor, *, mask: Tensor) -> float:
    """Return `d/ds J(s r)` at s = 1, summed over groups: what larger differences are worth to J."""
    with torch.enable_grad():
        scale = torch.ones((), dtype=rewards_BK.dtype, device=rewards_BK.device).requires_grad_()
        rewards_BK = rewards_BK.detach().masked_fill(~mask, 0.0)
        [derivative] = torch.autograd.grad(objective(scale * rewards_BK, mask=mask).sum(), scale)
    return float(derivative)


def first_length(scaling: float, gradient_norm: float, *, target: float, otherwise: float) -> float:
    """Return the length at which J rises, to first order, as much as larger differences would do.

    The directional derivative of J along `grad J / ||grad J||` is `||grad J||`. If all differences
    grew by the factor `target`, J would rise by `(target - 1) d/ds J(s r)`. Equating the two,

        rho = (target - 1) |d/ds J(s r)| / ||grad J||.

    Args:
        scaling: `scaling_derivative`, divided by the number of groups as J is.
        gradient_norm: `||grad J||`.
        otherwise: returned where the formula says nothing, as for an objective that larger
            differences neither raise nor lower.
    """
    found = (target - 1.0) * abs(scaling) / gradient_norm if gradient_norm > 0 else 0.0
    return found if found > 0 and math.isfinite(found) else otherwise


def length_by_effect(
    effect: Callable[[float], StepEffect],
    *,
    guess: float,
    target: float,
    loss_rise: float,
    tolerance: float = 0.1,
    most_trials: int = 8,
) -> ChosenLength:
    """Return the length at which one of two limits is reached and neither is exceeded.

    The share of the allowance that a length uses is

        used = max((growth - 1) / (target - 1), (1 + tolerance) rise / loss_rise),

    and lengths with `|used - 1| <= tolerance` are accepted. So `growth - 1` is at most `tolerance`
    beyond its target, and the loss rises by no more than `loss_rise`. Lengths are tried as if
    `used` was a power of the length: the first power from one point, an interpolation from two.

    Args:
        effect: measures a step of this length; called at most `most_trials` times.
        guess: the first length to try, above 0.
        target: the factor above 1 by which differences should grow.
        loss_rise: the largest rise of the loss, as a share of it, above 0.

    Returns:
        The accepted length; if none was found, the longest tried one within the limits. It is 0 if
        there was none, or if even that one did next to nothing (`NOTHING`): then no length helps.
    """
    low, high = _Tried(0.0, 0.0, StepEffect(1.0, 0.0)), None
    length = guess
    for trial in range(1, most_trials + 1):
        found = effect(length)
        by_growth = (found.growth - 1.0) / (target - 1.0)
        by_loss = (1.0 + tolerance) * found.loss_rise / loss_rise
        finite = math.isfinite(by_growth) and math.isfinite(by_loss)
        used = max(by_growth, by_loss) if finite else math.inf
        if abs(used - 1.0) <= tolerance:
            return ChosenLength(length, found, trial)
        if used < 1.0:
            low = _Tried(length, used, found)
        else:
            high = _Tried(length, used, found)
        length = _next_length(low, high)
    if low.used <= NOTHING:
        low = _Tried(0.0, 0.0, StepEffect(1.0, 0.0))
    return ChosenLength(low.length, low.effect, most_trials)


class _Tried(NamedTuple):
    length: float
    used: float
    effect: StepEffect


NOTHING = 1e-3
"""A step that uses no more than this share of its allowance after all trials is not taken. With
equal rewards, or rewards so far apart that grad J is 0 in fp32, differences answer to no length."""

LONGER, SHORTER = 4.0, 100.0
"""By how much one trial may at most differ from the last, where nothing bounds it."""


def _next_length(low: _Tried, high: _Tried | None) -> float:
    """Return the next length to try, from the longest that is too short and the last too long."""
    if high is None:
        return low.length * min(1.0 / low.used if low.used > 0 else LONGER, LONGER)
    if low.length == 0:
        return high.length / min(high.used, SHORTER)
    span, share = math.log(high.length / low.length), 0.5
    if low.used > 0 and math.isfinite(high.used):
        share = -math.log(low.used) / math.log(high.used / low.used)
    elif low.used > 0:
        share = min(-math.log(low.used) / span, 0.5)
    return low.length * math.exp(span * min(max(share, 0.1), 0.9))
