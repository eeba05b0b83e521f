"""Objectives that read the order of a group's responses: best first."""

import math

import pytest
import torch

from shiftrm.core.losses import bradley_terry_loss, difference_loss
from shiftrm.core.objectives import OBJECTIVES, ordered_difference, ordered_likelihood

ORDERED = (ordered_likelihood, ordered_difference)


def test_by_hand():
    # Differences 1 - 0 = 1, 1 - 3 = -2, 0 - 3 = -3.
    rewards = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64)
    sigmoid = [1 / (1 + math.exp(-d)) for d in (1.0, -2.0, -3.0)]
    log = sum(math.log(s) for s in sigmoid) / 3
    assert ordered_likelihood(rewards).tolist() == pytest.approx([log], rel=1e-12)
    assert ordered_difference(rewards).tolist() == pytest.approx([2 / 9 * sum(sigmoid)], rel=1e-12)


def test_equals_loops_over_ragged_groups():
    generator = torch.Generator().manual_seed(3)
    rewards = 3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[:, :2] = True
    mask[0, 2:] = False
    likelihoods, differences = [], []
    for row, exists in zip(rewards.tolist(), mask.tolist(), strict=True):
        kept = [r for r, e in zip(row, exists, strict=True) if e]
        pairs = [a - b for i, a in enumerate(kept) for b in kept[i + 1 :]]
        likelihoods.append(sum(-math.log1p(math.exp(-d)) for d in pairs) / len(pairs))
        total = sum(1 / (1 + math.exp(-d)) for d in pairs)
        differences.append(2 / len(kept) ** 2 * total)
    rewards[~mask] = math.nan  # what padding holds must not matter
    assert ordered_likelihood(rewards, mask=mask).tolist() == pytest.approx(likelihoods, rel=1e-12)
    assert ordered_difference(rewards, mask=mask).tolist() == pytest.approx(differences, rel=1e-12)


def test_of_two_it_is_minus_the_bradley_terry_loss():
    rewards = torch.tensor([[2.0, -1.0], [0.5, 0.75]])
    expected = -bradley_terry_loss(rewards[:, 0], rewards[:, 1])
    torch.testing.assert_close(ordered_likelihood(rewards), expected)


def test_where_the_model_is_right_the_control_is_the_difference_loss():
    right = torch.tensor([[4.0, 1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(ordered_difference(right), difference_loss(right))
    # Reversed, sigmoid(-d) = 1 - sigmoid(d) of each of the three pairs.
    torch.testing.assert_close(ordered_difference(right.flip(1)), 2 / 3 - difference_loss(right))


@pytest.mark.parametrize("objective", ORDERED)
def test_gradients_raise_the_first_and_lower_the_last(objective):
    rewards = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    objective(rewards).sum().backward()
    first, middle, last = rewards.grad[0].tolist()
    assert first > 0
    assert middle == pytest.approx(0.0, abs=1e-15)
    assert last == pytest.approx(-first)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    rewards = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: objective(r, mask=mask), (rewards,))


@pytest.mark.parametrize("objective", ORDERED)
def test_what_has_no_pair_is_refused(objective):
    with pytest.raises(ValueError, match="at least two"):
        objective(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="differ"):
        objective(torch.zeros(1, 3), mask=torch.ones(1, 2))


def test_extreme_rewards_stay_finite():
    rewards = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = ordered_likelihood(rewards)
    value.sum().backward()
    assert value.tolist() == [-2e4]
    assert rewards.grad.tolist() == [[1.0, -1.0]]


def test_they_are_registered():
    assert OBJECTIVES.get("ordered") is ordered_likelihood
    assert OBJECTIVES.get("ordered_difference") is ordered_difference
