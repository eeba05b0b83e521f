"""Active choice of pairs to label: those whose label says most about the reward head."""

import torch
from scipy.special import roots_hermitenorm
from torch import Tensor

__all__ = ["choose_pairs", "information_gain"]

NODES = 64
"""Points of the Gauss-Hermite quadrature."""


def information_gain(means_N: Tensor, variances_N: Tensor) -> Tensor:
    """Return how much a pair's label would say about the head, in nats (BALD), [N].

    Houlsby et al., arXiv 1112.5745, Eq. 2: `I[y; w] = H[E p] - E H[p]` with `p = sigmoid(f)` and
    the reward difference `f ~ N(mean, variance)`. The first term is high where the prediction is
    near 1/2, the second takes away what is noise of the label and not doubt about the head; for
    small variances the gain is `p (1 - p) variance / 2`. Deviation: the expectations are computed
    by quadrature instead of their approximation for the probit. (Melikidze et al.,
    arXiv 2603.09692, instead prefer pairs whose predicted rewards lie far apart.)

    Args:
        means_N: posterior means of the reward differences.
        variances_N: posterior variances; 0 or more.
    """
    points, weights = roots_hermitenorm(NODES)
    nodes_Q = torch.as_tensor(points, dtype=means_N.dtype, device=means_N.device)
    weights_Q = torch.as_tensor(weights / weights.sum(), dtype=means_N.dtype).to(means_N.device)
    f_NQ = means_N[:, None] + variances_N.sqrt()[:, None] * nodes_Q
    p_NQ = f_NQ.sigmoid()
    gain_N = _entropy(p_NQ @ weights_Q) - _entropy(p_NQ) @ weights_Q
    return gain_N.clamp(min=0.0)  # rounding


def choose_pairs(means_N: Tensor, covariance_NN: Tensor, count: int) -> list[int]:
    """Return the pairs to label, the most informative first.

    Greedy: after each choice the posterior is that with the pair's label, so that near copies of a
    chosen pair lose their value. In the Laplace approximation a label adds `p (1 - p) d d^T` to the
    precision, whatever it turns out to be; with `c = Sigma d` (Sherman-Morrison)
    `Sigma <- Sigma - p (1 - p) c c^T / (1 + p (1 - p) d . c)`. The means stay.

    Args:
        means_N: posterior means of the reward differences.
        covariance_NN: posterior covariance of the reward differences, `D Sigma D^T`.
        count: at most N.
    """
    covariance_NN = covariance_NN.clone()
    p_N = means_N.sigmoid()
    certainty_N = p_N * (1 - p_N)
    free_N = torch.ones(len(means_N), dtype=torch.bool, device=means_N.device)
    chosen: list[int] = []
    for _ in range(count):
        gain_N = information_gain(means_N, covariance_NN.diagonal().clamp(min=0.0))
        best = int(gain_N.masked_fill(~free_N, -1.0).argmax())
        chosen.append(best)
        free_N[best] = False
        c_N = covariance_NN[:, best].clone()
        weight = certainty_N[best] / (1 + certainty_N[best] * c_N[best])
        covariance_NN -= weight * torch.outer(c_N, c_N)
    return chosen


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)
