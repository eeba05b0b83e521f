"""Losses against values worked out by hand, gradcheck in fp64, and properties every loss keeps."""

import math

import pytest
import torch

from shiftrm.core.losses import (
    bradley_terry_loss,
    difference_loss,
    preference_policy_loss,
    response_log_likelihood,
    reward_weighted_loss,
    reward_weights,
)


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


def test_log_likelihood_by_hand():
    # Two words; logits (0, log 3) give them 1/4 and 3/4, whatever came before.
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 4, 2).clone()
    ids = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    expected = [2 * math.log(3 / 4) + math.log(1 / 4), math.log(3 / 4)]
    assert response_log_likelihood(logits, ids, mask).tolist() == pytest.approx(expected, abs=1e-6)
    mean = response_log_likelihood(logits, ids, mask, reduction="mean")
    assert mean.tolist() == pytest.approx([expected[0] / 3, expected[1]], abs=1e-6)


def test_log_likelihood_reads_only_what_predicts_the_response():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 7, requires_grad=True)
    ids = torch.tensor([[3, 1, 4, 1, -100]])  # the last is padding, and no word
    mask = torch.tensor([[1, 0, 1, 1, 0]])  # token 0 has nothing that predicts it
    response_log_likelihood(logits, ids, mask).sum().backward()
    used = logits.grad.abs().sum(-1)[0] > 0
    assert used.tolist() == [False, True, True, False, False]
    half = response_log_likelihood(logits.detach().bfloat16(), ids, mask)
    assert half.dtype == torch.float32


def test_reward_weights_by_hand():
    rewards = torch.tensor([0.0, 1.0, 2.0])
    e = math.exp
    assert reward_weights(rewards, beta=0.5).tolist() == pytest.approx([1, e(2), e(4)], rel=1e-6)
    mean = (1 + e(2) + e(4)) / 3
    expected = [1 / mean, e(2) / mean, e(4) / mean]
    weights = reward_weights(rewards, beta=0.5, normalize=True)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    loss = reward_weighted_loss(torch.tensor([-1.0, -2.0, -3.0]), rewards, beta=0.5)
    assert loss.tolist() == pytest.approx([1, 2 * e(2), 3 * e(4)], rel=1e-6)


def test_normalised_weights_ignore_a_constant_and_do_not_overflow():
    rewards = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    plain = reward_weights(rewards, beta=0.7, normalize=True)
    far = reward_weights(rewards + 1e6, beta=0.7, normalize=True)
    torch.testing.assert_close(far, plain, rtol=1e-6, atol=0)
    assert plain.mean().item() == pytest.approx(1)


def test_overflowing_and_broken_weights_name_the_example():
    with pytest.raises(ValueError, match=r"example 1: .*reward 100, beta 1.*normalised weights"):
        reward_weights(torch.tensor([0.0, 100.0]), beta=1.0)
    for normalize in (False, True):
        with pytest.raises(ValueError, match=r"example 2: .*output is not finite"):
            reward_weights(torch.tensor([0.0, 1.0, math.nan]), beta=1.0, normalize=normalize)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta is"):
            reward_weights(torch.zeros(2), beta=beta)
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        reward_weights(torch.zeros(2, 1), beta=1.0)


def test_preference_policy_loss_by_hand():
    loss = preference_policy_loss(torch.tensor([-3.0, -1e4, 0.0]), torch.tensor([-5.0, 0.0, -1e4]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), 1e4, 0.0], abs=1e-6)


def test_gradcheck_of_the_bilevel_losses():
    torch.manual_seed(0)
    likelihood = -torch.rand(4, dtype=torch.float64).mul(5).requires_grad_()
    rewards = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, r, n=normalize: reward_weighted_loss(a, r, beta=0.7, normalize=n),
            (likelihood, rewards),
        )
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), torch.tensor([[0, 1, 1, 0]] * 2)
    assert torch.autograd.gradcheck(lambda x: response_log_likelihood(x, ids, mask), (logits,))
    assert torch.autograd.gradgradcheck(lambda x: response_log_likelihood(x, ids, mask), (logits,))
    a, b = torch.randn(2, 3, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(preference_policy_loss, (a.requires_grad_(), b))


def test_bilevel_losses_refuse_what_does_not_fit():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    with pytest.raises(ValueError, match="do not fit"):
        response_log_likelihood(torch.zeros(2, 4, 5), ids, mask)
    with pytest.raises(ValueError, match="row 1 has no response token"):
        response_log_likelihood(torch.zeros(2, 3, 5), ids, torch.tensor([[0, 1, 0], [1, 0, 0]]))
    with pytest.raises(ValueError, match="reduction is 'max'"):
        response_log_likelihood(torch.zeros(2, 3, 5), ids, mask, reduction="max")
    with pytest.raises(ValueError, match="shapes differ"):
        reward_weighted_loss(torch.zeros(2), torch.zeros(3), beta=1.0)
    with pytest.raises(ValueError, match="shapes differ"):
        preference_policy_loss(torch.zeros(2), torch.zeros(3))
