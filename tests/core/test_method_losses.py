"""Losses of other methods against numbers worked out by hand and plain autograd in fp64."""

import math

import pytest
import torch

from shiftrm.core.losses import (
    effective_sample_size,
    off_policy_weights,
    sum_to_zero_penalty,
    text_regularisation,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_off_policy_weights_by_hand():
    policy, reference = f64([-1.0, -2.0], [-4.0, -3.0]), f64([-2.0, -2.0], [-3.0, -5.0])
    a, m = 0.1, 0.5

    def u(p, r):
        return math.log(math.exp(p) / (a * math.exp(p) + (1 - a) * math.exp(r)))

    raw = [
        math.exp(m * (u(-1, -2) + u(-2, -2))),
        math.exp(m * (u(-4, -3) + u(-3, -5))),
    ]
    expected = [2 * w / sum(raw) for w in raw]
    found = off_policy_weights(policy, reference, alpha=a, scale=m)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert u(-2, -2) == pytest.approx(0.0)


def test_off_policy_weights_are_one_for_the_same_policy_and_do_not_overflow():
    same = -300.0 * torch.rand(5, 2, dtype=torch.float64)
    assert torch.allclose(
        off_policy_weights(same, same, alpha=0.1, scale=3.0), torch.ones(5).double()
    )
    # u is at most log(1/a), however far the policies are apart.
    far = off_policy_weights(same, same - 5000.0, alpha=0.1, scale=1.0)
    assert torch.allclose(far, torch.ones(5).double())
    apart = off_policy_weights(f64([-1.0, -1.0], [-2000.0, -1.0]), f64([-9.0, -9.0], [-1.0, -1.0]),
                               alpha=0.1, scale=0.01)  # fmt: skip
    # The second: u = -1999 - log 0.9 for the chosen response, 0 for the other.
    ratio = math.exp(
        0.01 * (-1999 - math.log(0.9)) - 0.01 * 2 * -math.log(0.1 + 0.9 * math.exp(-8))
    )
    assert float(apart[1] / apart[0]) == pytest.approx(ratio, rel=1e-9)
    assert float(apart.mean()) == pytest.approx(1.0)


def test_scale_and_alpha_bound_the_weights():
    policy, reference = -10 * torch.rand(50, 2).double(), -10 * torch.rand(50, 2).double()
    assert torch.allclose(
        off_policy_weights(policy, reference, alpha=1.0, scale=1.0), torch.ones(50).double()
    )
    sizes = [
        effective_sample_size(off_policy_weights(policy, reference, alpha=0.1, scale=m))
        for m in (0.0, 0.01, 0.1, 1.0)
    ]
    assert sizes[0] == pytest.approx(50)
    assert sizes == sorted(sizes, reverse=True)
    for bad in ({"alpha": 0.0, "scale": 1.0}, {"alpha": 0.1, "scale": -1.0}):
        with pytest.raises(ValueError, match="is"):
            off_policy_weights(policy, reference, **bad)
    with pytest.raises(ValueError, match="shapes differ"):
        off_policy_weights(policy, reference[:3], alpha=0.1, scale=1.0)


def test_sum_to_zero_penalty_has_value_and_gradient_of_the_square():
    rewards = (3 * torch.randn(7, 2, dtype=torch.float64) + 1).requires_grad_()
    whole = 1e-3 * 7 * rewards.mean() ** 2
    [expected] = torch.autograd.grad(whole, rewards)
    mean = rewards.detach().mean()
    for parts in ([7], [4, 3], [1] * 7):
        shares = torch.cat(
            [
                sum_to_zero_penalty(part, mean=mean, pairs=7, coefficient=1e-3)
                for part in rewards.split(parts)
            ]
        )
        assert shares.mean().item() == pytest.approx(whole.item(), rel=1e-12)
        [found] = torch.autograd.grad(shares.mean(), rewards)
        torch.testing.assert_close(found, expected)
    by_hand = sum_to_zero_penalty(f64([3.0, 1.0], [0.0, 2.0]), mean=1.5, pairs=2, coefficient=0.1)
    # 0.1 * 2 * (2 * 1.5 * s - 2.25) with s = 2 and 1
    assert by_hand.tolist() == pytest.approx([0.75, 0.15])
    assert float(by_hand.mean()) == pytest.approx(0.1 * 2 * 1.5**2)


def test_a_pair_of_weight_2_is_in_the_penalty_twice():
    once, twice = f64([3.0, 1.0], [0.0, 2.0], [5.0, 5.0]), f64([3.0, 1.0], [3.0, 1.0], [0.0, 2.0])
    weight, mean = f64(2.0, 1.0, 0.0), 5 / 3
    weighted = sum_to_zero_penalty(once, mean=mean, pairs=3, coefficient=0.1, weight=weight)
    repeated = sum_to_zero_penalty(twice, mean=mean, pairs=3, coefficient=0.1)
    assert float(weighted.mean()) == pytest.approx(0.1 * 3 * mean**2)
    assert float(weighted.sum()) == pytest.approx(float(repeated.sum()))


def test_text_regularisation_by_hand():
    found = text_regularisation(f64(0.5, 2.0), f64(-10.0, 0.0), alpha=0.25, beta=0.1)
    text = [math.log(1 + math.exp(1.0)), math.log(2)]
    assert found.tolist() == pytest.approx([0.375 + 0.25 * text[0], 1.5 + 0.25 * text[1]])
    weight = f64(0.0, 3.0)
    weighted = text_regularisation(
        f64(0.5, 2.0) * weight, f64(-10.0, 0.0), alpha=0.25, beta=0.1, weight=weight
    )
    assert weighted.tolist() == pytest.approx((found * weight).tolist())
    likelihood = f64(-3.0).requires_grad_()
    loss = text_regularisation(f64(0.0), likelihood, alpha=0.01, beta=0.1)
    [slope] = torch.autograd.grad(loss.sum(), likelihood)
    assert slope.item() == pytest.approx(-0.01 * 0.1 / (1 + math.exp(-0.3)))
