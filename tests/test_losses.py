"""Losses against values worked out by hand, gradcheck in fp64, and properties every loss keeps."""

import math

import pytest
import torch

from shiftrm.losses import bradley_terry_loss, difference_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand():
    loss = bradley_terry_loss(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 5.0]))
    expected = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(3))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_margin_moves_the_difference():
    loss = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]), margin=torch.tensor([2.0]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_difference_loss_by_hand():
    # K = 3, differences 1, 3, 2: J = 2/9 (s(1) + s(3) + s(2))
    rewards = torch.tensor([[0.0, 1.0, 3.0], [5.0, 5.0, 5.0]])
    expected = [2 / 9 * (sigmoid(1) + sigmoid(3) + sigmoid(2)), 2 / 9 * 3 * 0.5]
    assert difference_loss(rewards).tolist() == pytest.approx(expected, abs=1e-6)


def test_difference_loss_of_a_ragged_group_is_that_of_the_short_group():
    rewards = torch.tensor([[0.0, 1.0, float("nan")], [0.0, 1.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    short = 2 / 4 * sigmoid(1)
    full = 2 / 9 * (sigmoid(1) + sigmoid(3) + sigmoid(2))
    assert difference_loss(rewards, mask=mask).tolist() == pytest.approx([short, full], abs=1e-6)


def test_range_is_as_documented():
    K = 5
    equal = difference_loss(torch.zeros(1, K))
    apart = difference_loss(1e3 * torch.arange(K, dtype=torch.float32)[None])
    assert equal.item() == pytest.approx((K - 1) / (2 * K), abs=1e-6)
    assert apart.item() == pytest.approx((K - 1) / K, abs=1e-6)


def test_stable_at_differences_of_1e4():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(far, -far)
    assert loss.tolist() == pytest.approx([0.0, 2e4])
    loss.sum().backward()
    assert far.grad.tolist() == pytest.approx([0.0, -2.0])

    rewards = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    difference_loss(rewards).sum().backward()
    assert torch.isfinite(rewards.grad).all()


def test_equal_rewards_give_no_nan_gradient():
    rewards = torch.tensor([[1.0, 1.0, 2.0]], requires_grad=True)
    difference_loss(rewards).sum().backward()
    # By hand: d/dr_3 = 2/9 * 2 * s(1)(1 - s(1)); the equal pair adds nothing to either side.
    slope = 2 / 9 * sigmoid(1) * (1 - sigmoid(1))
    assert rewards.grad[0].tolist() == pytest.approx([-slope, -slope, 2 * slope], abs=1e-7)


def test_padding_gets_no_gradient_even_when_it_holds_nan():
    rewards = torch.tensor([[0.0, 1.0, float("nan")]], requires_grad=True)
    difference_loss(rewards, mask=torch.tensor([[True, True, False]])).sum().backward()
    assert rewards.grad[0, 2] == 0
    assert torch.isfinite(rewards.grad).all()


def test_gradcheck_in_fp64():
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 4, dtype=torch.float64).unbind(0)
    chosen.requires_grad_()
    rejected.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry_loss(a, b, margin=margin), (chosen, rejected)
    )
    rewards = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda r: difference_loss(r, mask=mask), (rewards,))


# One table for every loss: a function of rewards [B, K], and whether it rises with discrimination.
LOSSES = {
    "bradley_terry": lambda r: bradley_terry_loss(r[:, 0], r[:, 1]),
    "difference": lambda r: difference_loss(r[:, :2]),
    "difference_K5": difference_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_shared_properties(name):
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    value = loss(rewards)
    assert value.shape == (6,), "per-example results"
    torch.testing.assert_close(loss(rewards + 7.0), value)  # only differences matter
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(loss(rewards[order]), value[order])  # examples are independent
    assert loss(rewards.float()).dtype == torch.float32
    assert torch.isfinite(loss(rewards * 1e4)).all()


def test_swap_symmetry_of_bradley_terry():
    chosen, rejected = torch.randn(2, 9, generator=torch.Generator().manual_seed(2)).unbind(0)
    # -log s(d) and -log s(-d) differ by d.
    torch.testing.assert_close(
        bradley_terry_loss(rejected, chosen) - bradley_terry_loss(chosen, rejected),
        chosen - rejected,
    )


def test_difference_loss_ignores_the_order_of_responses():
    rewards = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(difference_loss(rewards[:, order]), difference_loss(rewards))
    torch.testing.assert_close(difference_loss(-rewards), difference_loss(rewards))


@pytest.mark.parametrize(
    ("rewards", "mask"),
    [
        (torch.zeros(2, 1), None),
        (torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]])),
        (torch.zeros(3), None),
        (torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool)),
    ],
    ids=["K=1", "one response left", "no groups", "mask shape"],
)
def test_refused(rewards, mask):
    with pytest.raises(ValueError, match=r"two responses|shape|mask"):
        difference_loss(rewards, mask=mask)


def test_bradley_terry_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="shapes differ"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
