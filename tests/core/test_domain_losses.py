"""The losses that OODPL is compared with, by hand."""

import math

import pytest
import torch

from shiftrm.core.domain_losses import (
    direct_preference_loss,
    domain_means,
    group_dro_weights,
    likelihood_and_preference_loss,
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_likelihood_and_preference_by_hand():
    chosen, rejected = torch.tensor([-6.0, -2.0]), torch.tensor([-5.0, -9.0])
    loss = likelihood_and_preference_loss(chosen, rejected, torch.tensor([3, 4]), alpha=0.1)
    # -log pi / |y| + 0.1 log(1 + exp(-(chosen - rejected)))
    expected = [2.0 + 0.1 * softplus(1.0), 0.5 + 0.1 * softplus(-7.0)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    alone = likelihood_and_preference_loss(chosen, rejected, torch.tensor([3, 4]), alpha=0.0)
    assert alone.tolist() == pytest.approx([2.0, 0.5])


def test_its_gradient_by_hand():
    chosen = torch.tensor([-6.0], requires_grad=True)
    rejected = torch.tensor([-5.0], requires_grad=True)
    likelihood_and_preference_loss(chosen, rejected, torch.tensor([3])).sum().backward()
    slope = 0.1 / (1 + math.exp(-1.0))  # 0.1 sigmoid(rejected - chosen)
    assert chosen.grad.item() == pytest.approx(-1 / 3 - slope, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(slope, abs=1e-6)


def test_dpo_by_hand():
    policy, reference = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -3.0]])
    # u = (1, -1): -log sigmoid(0.5 * 2)
    loss = direct_preference_loss(policy, reference, beta=0.5)
    assert loss.tolist() == pytest.approx([softplus(-1.0)], abs=1e-6)
    still = direct_preference_loss(reference, reference, beta=0.5)
    assert still.tolist() == pytest.approx([math.log(2)])


def test_means_of_domains():
    losses = torch.tensor([1.0, 2.0, 6.0])
    means = domain_means(losses, torch.tensor([0, 2, 0]), count=3)
    assert means[[0, 2]].tolist() == [3.5, 2.0]
    assert means[1].isnan()


def test_weights_of_domains_by_hand():
    found = group_dro_weights(
        torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, math.log(2), math.log(4)]), step_size=1
    )
    # 0.5 : 0.25 * 2 : 0.25 * 4
    assert found.tolist() == pytest.approx([0.25, 0.25, 0.5])
    absent = group_dro_weights(
        torch.tensor([0.5, 0.5]), torch.tensor([float("nan"), math.log(3)]), step_size=1
    )
    assert absent.tolist() == pytest.approx([0.25, 0.75])


def test_the_weights_go_to_the_worst_domain_and_balance_the_saddle_point():
    """Two domains want x at 0 and at 1, the second twice as much: the worst is least in between.

    `max(x^2, 2 (1 - x)^2)` is least where `x = sqrt(2) (1 - x)`.
    """
    x, q = torch.tensor(0.0, requires_grad=True), torch.tensor([0.5, 0.5])
    trail = []
    for _ in range(4000):
        losses = torch.stack([x**2, 2 * (1 - x) ** 2])
        q = group_dro_weights(q, losses, step_size=0.05)
        (slope,) = torch.autograd.grad((q * losses).sum(), x)
        x = (x - 0.02 * slope).detach().requires_grad_()
        trail.append(x.item())
    assert not q.requires_grad
    assert sum(trail[-1000:]) / 1000 == pytest.approx(math.sqrt(2) / (1 + math.sqrt(2)), abs=5e-3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: likelihood_and_preference_loss(a, a, torch.tensor([1])), "shapes differ"),
        (lambda a, b: likelihood_and_preference_loss(a, a, torch.tensor([1, 0])), "no token"),
        (lambda a, b: likelihood_and_preference_loss(a, a, b, alpha=-1), "negative"),
        (lambda a, b: direct_preference_loss(a, a, beta=0.1), "B, 2"),
        (lambda a, b: direct_preference_loss(a[None], a[None], beta=0), "positive"),
        (lambda a, b: domain_means(a, torch.tensor([0]), count=1), "shapes differ"),
        (lambda a, b: group_dro_weights(a, a[:1], step_size=1), "shapes differ"),
        (lambda a, b: group_dro_weights(a, a, step_size=0), "positive"),
    ],
)
def test_bad_values_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.tensor([0.5, 0.5]), torch.tensor([1, 1]))
