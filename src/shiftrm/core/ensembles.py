"""Several reward models as one: their rewards combined, or their weights averaged."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["KINDS", "Kind", "combined_rewards", "mean_weights"]

Kind = Literal["mean", "min", "variance"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def combined_rewards(
    rewards_EB: Tensor, means_E: Tensor, stds_E: Tensor, *, kind: Kind, penalty: float = 0.0
) -> Tensor:
    """Return one reward per response from those of E reward models.

    Coste et al., arXiv 2310.02743: the mean ("mean"), the worst case ("min"), and the mean minus
    `penalty` times the variance over the models, divided by E ("variance", their
    uncertainty-weighted optimisation).

    Deviation: a Bradley-Terry reward has an arbitrary offset, and models differ in scale, so every
    model is first standardised on the same responses, for the mean, too. The result is multiplied
    by the mean standard deviation, so that differences are about as large as the models' own.

    Args:
        rewards_EB: rewards of E models for B responses.
        means_E, stds_E: each model's mean and standard deviation (above 0) on those responses.
        penalty: weight of the variance of standardised rewards; 0 or more.

    Returns:
        Rewards, [B].
    """
    z_EB = (rewards_EB - means_E[:, None]) / stds_E[:, None]
    if kind == "min":
        found_B = z_EB.amin(0)
    else:
        found_B = z_EB.mean(0)
    if kind == "variance":
        found_B = found_B - penalty * z_EB.var(0, unbiased=False)
    return stds_E.mean() * found_B


def mean_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several models' weights, in their own type (computed in fp64).

    WARM, Rame et al., arXiv 2401.12187: `theta = 1/M sum_m theta_m`.

    Args:
        states: state dicts with the same names and shapes. Tensors that are not floating-point are
            those of the first.
    """
    first = states[0]
    return {
        name: tensor
        if not tensor.is_floating_point()
        else torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        for name, tensor in first.items()
    }
