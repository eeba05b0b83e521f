"""A Bayesian last layer: how sure preference pairs make a linear reward head.

The reward of a response is `r = w . phi + b` with `phi` [H] the hidden state under the head. The
likelihood of a pair with difference `d = phi_chosen - phi_rejected` is `sigmoid(w . d - m)^c`, as
in training, with its margin m (0) and its weight c (1). The
Laplace approximation of the posterior of `w` is a Gaussian around the trained head with the
precision below (MacKay 1992; for reward models, Yang et al., arXiv 2402.13210, and others).
"""

import torch
from torch import Tensor

__all__ = ["covariance_root", "pair_precision", "posterior_std"]


def pair_precision(
    differences_NH: Tensor,
    head_H: Tensor,
    *,
    margin_N: Tensor | float = 0.0,
    weight_N: Tensor | float = 1.0,
) -> Tensor:
    """Return the Hessian of the pairs' negative log-likelihood in the head, [H, H].

    `sum_n c_n p_n (1 - p_n) d_n d_n^T` with `p_n = sigmoid(w . d_n - m_n)`, m_n the margin and c_n
    the weight of a pair. Without margins it does not depend on the labels.
    """
    p_N = (differences_NH @ head_H - margin_N).sigmoid()
    return differences_NH.T @ (differences_NH * (weight_N * p_N * (1 - p_N))[:, None])


def covariance_root(precision_HH: Tensor, *, prior: float) -> Tensor:
    """Return R with `R^T R = (precision + prior I)^-1`, lower triangular, [H, H].

    Args:
        precision_HH: of the pairs, symmetric and positive semidefinite.
        prior: precision of the Gaussian prior of every weight of the head; above 0.
    """
    H = len(precision_HH)
    identity = torch.eye(H, dtype=precision_HH.dtype, device=precision_HH.device)
    factor = torch.linalg.cholesky(precision_HH + prior * identity)  # A = L L^T, A^-1 = R^T R
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def posterior_std(differences_BH: Tensor, root_HH: Tensor) -> Tensor:
    """Return the posterior standard deviation of `w . d`, `sqrt(d^T Sigma d)`, [B]."""
    return (differences_BH @ root_HH.T).norm(dim=-1)
