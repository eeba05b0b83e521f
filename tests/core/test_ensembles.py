"""Rewards of several models as one: numbers by hand, and what must not change them."""

import pytest
import torch

from shiftrm.core.ensembles import KINDS, combined_rewards, mean_weights

# Two models, three responses. Standardised: (0, 1, -1) and (2, 1, 0).
REWARDS = torch.tensor([[3.0, 5.0, 1.0], [30.0, 20.0, 10.0]], dtype=torch.float64)
MEANS = torch.tensor([3.0, 10.0], dtype=torch.float64)
STDS = torch.tensor([2.0, 10.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "penalty", "standardised"),
    [
        ("mean", 0.0, [1.0, 1.0, -0.5]),
        ("min", 0.0, [0.0, 1.0, -1.0]),
        ("variance", 0.0, [1.0, 1.0, -0.5]),
        ("variance", 3.0, [1 - 3 * 1.0, 1 - 3 * 0.0, -0.5 - 3 * 0.25]),
    ],
)
def test_by_hand(kind, penalty, standardised):
    found = combined_rewards(REWARDS, MEANS, STDS, kind=kind, penalty=penalty)
    expected = 6.0 * torch.tensor(standardised, dtype=torch.float64)  # the mean of 2 and 10
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_offset_of_a_model_does_not_matter(kind):
    offset = torch.tensor([[7.0], [-4.0]], dtype=torch.float64)
    moved = combined_rewards(REWARDS + offset, MEANS + offset[:, 0], STDS, kind=kind, penalty=0.5)
    torch.testing.assert_close(
        moved, combined_rewards(REWARDS, MEANS, STDS, kind=kind, penalty=0.5)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_one(kind):
    twice = REWARDS[:1].expand(3, 3)
    found = combined_rewards(twice, MEANS[:1].expand(3), STDS[:1].expand(3), kind=kind, penalty=9.0)
    torch.testing.assert_close(found, REWARDS[0] - 3.0)


def test_weights_are_averaged_in_their_own_type():
    states = [
        {
            "a": torch.tensor([1.0, 2.0 * k]),
            "b": torch.tensor([float(k)], dtype=torch.bfloat16),
            "n": torch.tensor([k]),
        }
        for k in (1, 2, 6)
    ]
    found = mean_weights(states)
    assert found["a"].tolist() == [1.0, 6.0]
    assert found["b"].dtype == torch.bfloat16
    assert found["b"].tolist() == [3.0]
    assert found["n"].tolist() == [1]
