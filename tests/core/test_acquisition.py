"""Active choice of pairs: the information by integration, and the choice by refitting."""

import math

import pytest
import torch
from scipy import integrate
from scipy.special import expit
from scipy.stats import norm

from shiftrm.core.acquisition import choose_pairs, information_gain


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def entropy(p):
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


@pytest.mark.parametrize("mean", [0.0, 0.7, -2.5])
@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
def test_the_gain_by_integration(mean, variance):
    def expected(function):
        density = norm(mean, variance**0.5).pdf
        span = (mean - 12 * variance**0.5, mean + 12 * variance**0.5)
        return integrate.quad(lambda f: density(f) * function(expit(f)), *span, limit=200)[0]

    gain = entropy(expected(lambda p: p)) - expected(entropy)
    assert float(information_gain(double(mean), double(variance))[0]) == pytest.approx(
        gain, abs=1e-6
    )


def test_small_variances_by_hand():
    """`p (1 - p) variance / 2`: at p = 1/2 an eighth of the variance."""
    assert float(information_gain(double(0.0), double(1e-4))[0]) == pytest.approx(
        1e-4 / 8, rel=1e-3
    )
    assert float(information_gain(double(math.log(3)), double(1e-4))[0]) == pytest.approx(
        3 / 16 * 1e-4 / 2, rel=1e-3
    )


def test_it_is_doubt_about_the_head_and_not_noise_of_the_label():
    certain, sure, unsure = information_gain(double(0.0, 6.0, 0.0), double(0.0, 1.0, 1.0))
    assert float(certain) == 0.0  # a coin, and known to be one
    assert float(sure) < 0.1 * float(unsure)
    assert float(unsure) < math.log(2)


def test_more_doubt_is_more_information():
    gains = information_gain(torch.zeros(20).double(), torch.linspace(0, 30, 20).double())
    assert bool((gains.diff() > 0).all())


def test_a_copy_of_a_chosen_pair_comes_last():
    # The first two pairs are equal; the third is unrelated and less unsure.
    covariance = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.6]]).double()
    assert choose_pairs(torch.zeros(3).double(), covariance, 3) == [0, 2, 1]


def test_the_choice_equals_refitting_the_posterior():
    torch.manual_seed(1)
    differences, head = torch.randn(12, 4).double() * 2, torch.randn(4).double()
    precision = torch.eye(4).double()
    means = differences @ head
    covariance = differences @ torch.linalg.inv(precision) @ differences.T
    expected: list[int] = []
    for _ in range(12):
        now = torch.linalg.inv(precision)
        variances = torch.einsum("ni,ij,nj->n", differences, now, differences)
        gains = information_gain(means, variances)
        best = max((i for i in range(12) if i not in expected), key=lambda i: float(gains[i]))
        expected.append(best)
        p = torch.sigmoid(means[best])
        precision = precision + p * (1 - p) * torch.outer(differences[best], differences[best])
    assert choose_pairs(means, covariance, 12) == expected
    assert choose_pairs(means, covariance, 5) == expected[:5]
