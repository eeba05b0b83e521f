"""The posterior of a linear head, against autograd, NumPy and the inverse written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shiftrm.core.laplace import covariance_root, pair_precision, posterior_std
from shiftrm.core.losses import bradley_terry_loss

torch.manual_seed(0)
CHOSEN, REJECTED = torch.randn(2, 40, 5, dtype=torch.float64)
HEAD = torch.randn(5, dtype=torch.float64)
DIFFERENCES = CHOSEN - REJECTED


def test_the_precision_is_the_hessian_of_the_bradley_terry_loss():
    def loss(w):
        return -F.logsigmoid(CHOSEN @ w - REJECTED @ w).sum()

    hessian = torch.autograd.functional.hessian(loss, HEAD)
    torch.testing.assert_close(pair_precision(DIFFERENCES, HEAD), hessian)


def test_with_margins_and_weights_it_is_the_hessian_of_the_loss_that_is_trained():
    margin, weight = torch.randn(40).double(), torch.rand(40).double() * 3
    weight[:5] = 0.0

    def loss(w):
        chosen, rejected = CHOSEN @ w, REJECTED @ w
        return (weight * bradley_terry_loss(chosen, rejected, margin=margin)).sum()

    found = pair_precision(DIFFERENCES, HEAD, margin_N=margin, weight_N=weight)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, HEAD))


def test_it_is_that_of_logistic_regression_and_needs_no_labels():
    x, w = DIFFERENCES.numpy(), HEAD.numpy()
    p = 1 / (1 + np.exp(-x @ w))
    hessian = x.T @ np.diag(p * (1 - p)) @ x
    np.testing.assert_allclose(pair_precision(DIFFERENCES, HEAD).numpy(), hessian)
    torch.testing.assert_close(
        pair_precision(-DIFFERENCES, HEAD), pair_precision(DIFFERENCES, HEAD)
    )


def test_one_pair_by_hand():
    # w . d = 0, so p (1 - p) = 1/4; with prior 1 the precision is diag(1 + 4/4, 1).
    precision = pair_precision(torch.tensor([[2.0, 0.0]]), torch.zeros(2))
    root = covariance_root(precision, prior=1.0)
    directions = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(
        posterior_std(directions, root), torch.tensor([2 / 2**0.5, 3.0, 0.0])
    )


@pytest.mark.parametrize("prior", [1e-3, 1.0, 50.0])
def test_the_standard_deviation_by_the_inverse(prior):
    precision = pair_precision(DIFFERENCES, HEAD)
    root = covariance_root(precision, prior=prior)
    covariance = torch.linalg.inv(precision + prior * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(root.T @ root, covariance)
    away = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.stack([(d @ covariance @ d).sqrt() for d in away])
    torch.testing.assert_close(posterior_std(away, root), expected)


def test_without_pairs_the_prior_alone_speaks():
    root = covariance_root(torch.zeros(3, 3, dtype=torch.float64), prior=4.0)
    away = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(posterior_std(away, root), torch.tensor([2.5], dtype=torch.float64))
