"""Directions that divide a meta step among layers, or keep its length and nothing else.

Imports torch only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftrm.core.meta_direction import global_norm, inner_product

LEAST_WEIGHT = 1e-3
"""The size of an entry that a layer near zero is taken to have (Adafactor's epsilon_2)."""


@torch.no_grad()
def per_layer(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients rescaled so that every parameter tensor moves by an equal share of its size.

    For a tensor with weights w and gradient g, over the n entries where g is not 0,

        g <- max(||w||, 0.001 sqrt(n)) g / ||g||.

    The gradient of a reward objective lies almost wholly in the score head; a step along it changes
    nothing else. After this, the head counts as much as its weights do. Entries without gradient do
    not count: of an embedding table, the words that occur move by their share, not by the table's.

    Args:
        gradients: grad J, one tensor per parameter.
        weights: the parameters.

    Returns:
        One tensor per parameter, in the gradient's type; zero where the gradient is zero.

    Source: the ratio of LARS (You et al., arXiv 1708.03888, Eq. 6), without weight decay. The lower
    limit, without which a layer that starts at zero would never move, is that of Adafactor (Shazeer
    and Stern, arXiv 1804.04235, Algorithm 4). Leaving out entries without gradient is ours.
    """
    ratios = _ratios(gradients, weights)
    return [g * ratio.to(g.dtype) for g, ratio in zip(gradients, ratios, strict=True)]


@torch.no_grad()
def per_layer_vjp(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return `D^T v`, with D the Jacobian of `per_layer` in the gradients.

    Per tensor, `D = ratio (I - u u^T)` with `u = g / ||g||`. The weights' norms are constants.
    """
    result = []
    for g, v, ratio in zip(gradients, vectors, _ratios(gradients, weights), strict=True):
        square = inner_product([g], [g])
        along = torch.where(square > 0, inner_product([g], [v]) / square, 0.0)
        result.append((v - g * along.to(g.dtype)) * ratio.to(v.dtype))
    return result


@torch.no_grad()
def random_directions(directions: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """Return random directions that share everything with the given ones but where they point.

    A control: each tensor is Gaussian noise, with the length of the given direction and zeros where
    that has zeros. The whole step is then as long, and divided among the layers in the same way.

    Args:
        seed: the same on every process.
    """
    result = []
    generators: dict[torch.device, torch.Generator] = {}
    for d in directions:
        if d.device not in generators:
            generators[d.device] = torch.Generator(d.device).manual_seed(seed)
        noise = torch.randn(d.shape, generator=generators[d.device], device=d.device)
        noise = noise * (d != 0)
        length, own = global_norm([d]), global_norm([noise])
        result.append((noise * torch.where(own > 0, length / own, 0.0)).to(d.dtype))
    return result


def _ratios(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return by how much each gradient is multiplied, scalars."""
    ratios = []
    for g, w in zip(gradients, weights, strict=True):
        used = g != 0
        size = global_norm([w.detach() * used])
        least = LEAST_WEIGHT * global_norm([used.to(torch.promote_types(g.dtype, torch.float32))])
        length = global_norm([g])
        ratios.append(torch.where(length > 0, torch.maximum(size, least) / length, 0.0))
    return ratios
