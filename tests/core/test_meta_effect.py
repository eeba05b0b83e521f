"""The length of a step by its effect: hand numbers, autograd in fp64, invariants."""

import math

import pytest
import torch

from shiftrm.core.meta import ascend_, ascent_direction, global_norm
from shiftrm.core.meta_effect import (
    StepEffect,
    first_length,
    growth,
    length_by_effect,
    scaling_derivative,
    squared_differences,
)
from shiftrm.core.objectives import difference_loss, ordered_likelihood


def test_squared_differences_by_hand():
    before = torch.tensor([[0.0, 1.0, 3.0], [2.0, 4.0, math.nan]])
    after = torch.tensor([[0.0, 2.0, 6.0], [4.0, 2.0, math.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    squares = squared_differences(before, after, mask=mask)
    # Differences 1, 3, 2 double: (1 + 9 + 4) / 3 before. In the second group 2 becomes -2.
    expected = [[14 / 3, 4.0], [56 / 3, 4.0], [14 / 3, 16.0]]
    torch.testing.assert_close(squares, torch.tensor(expected))
    total = squares.sum(dim=1)
    assert growth(total) == pytest.approx(math.sqrt((56 / 3 + 4) / (14 / 3 + 4)))
    change = math.sqrt((14 / 3 + 16) / (14 / 3 + 4))
    assert growth(total, by_change=True) == pytest.approx(1 + change)


def test_growth_of_multiples_and_of_nothing():
    before = torch.tensor([[0.3, -1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    squares = squared_differences(before, 1.5 * before + 4.0, mask=mask).sum(1)
    assert growth(squares) == pytest.approx(1.5, rel=1e-6)
    assert growth(squares, by_change=True) == pytest.approx(1.5, rel=1e-6)
    assert growth(torch.zeros(3)) == 1.0
    assert growth(torch.tensor([0.0, 1.0, 1.0]), by_change=True) == math.inf


@pytest.mark.parametrize("objective", [difference_loss, ordered_likelihood])
def test_scaling_derivative_by_finite_differences(objective):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1, 3] = False
    h = 1e-5
    up, down = (float(objective((1 + s) * rewards, mask=mask).sum()) for s in (h, -h))
    assert scaling_derivative(objective, rewards, mask=mask) == pytest.approx(
        (up - down) / (2 * h), rel=1e-8
    )


def test_first_length_is_the_directional_derivative_of_autograd():
    """In fp64: a step of that length raises J as larger differences would, to first order."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
    ).double()
    x, mask = torch.randn(6, 4, 5, dtype=torch.float64), torch.ones(6, 4, dtype=torch.bool)
    parameters = list(net.parameters())

    def J():
        return difference_loss(net(x).squeeze(-1)).mean()

    before = float(J().detach())
    gradients = torch.autograd.grad(J(), parameters)
    directions = ascent_direction(gradients, meta_step="normalized")
    rewards = net(x).squeeze(-1).detach()
    target = 1 + 1e-5
    scaling = scaling_derivative(difference_loss, rewards, mask=mask) / 6
    length = first_length(scaling, float(global_norm(gradients)), target=target, otherwise=0.0)
    wanted = float(difference_loss(target * rewards).mean()) - before
    ascend_(parameters, directions, meta_learning_rate=length)
    assert float(J().detach()) - before == pytest.approx(wanted, rel=1e-3)


def test_first_length_where_the_formula_says_nothing():
    assert first_length(0.0, 1.0, target=1.5, otherwise=0.2) == 0.2
    assert first_length(1.0, 0.0, target=1.5, otherwise=0.2) == 0.2
    assert first_length(-2.0, 4.0, target=1.5, otherwise=0.2) == 0.25


def counted(function):
    calls = []

    def effect(length):
        calls.append(length)
        return function(length)

    return effect, calls


def test_a_good_guess_takes_one_trial():
    effect, calls = counted(lambda length: StepEffect(1 + length, 0.0))
    found = length_by_effect(effect, guess=0.5, target=1.5, loss_rise=0.1)
    assert (found.length, found.trials, calls) == (0.5, 1, [0.5])
    assert found.effect == StepEffect(1.5, 0.0)


@pytest.mark.parametrize("guess", [1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("power", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_growth_reaches_the_target_and_not_more(guess, power, scale):
    """Also from a guess that is thirteen orders of magnitude away, given enough trials."""
    effect, _ = counted(lambda length: StepEffect(1 + (length / scale) ** power, 0.0))
    found = length_by_effect(effect, guess=guess, target=1.5, loss_rise=0.1, most_trials=40)
    assert 1.45 <= found.effect.growth <= 1.55
    assert found.effect == effect(found.length)


def test_the_loss_limits_the_step():
    effect, calls = counted(lambda length: StepEffect(1 + length, 3 * length**2))
    found = length_by_effect(effect, guess=0.5, target=1.5, loss_rise=0.1)
    assert 0.08 <= found.effect.loss_rise <= 0.1, "reached and not exceeded"
    assert found.effect.growth < 1.3
    assert len(calls) <= 4


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_step_into_nonsense_is_shortened(broken):
    effect, calls = counted(
        lambda length: StepEffect(1 + length, 0.0) if length < 1 else StepEffect(broken, broken)
    )
    found = length_by_effect(effect, guess=1e3, target=1.5, loss_rise=0.1)
    assert 1.45 <= found.effect.growth <= 1.55
    assert len(calls) <= 6


def test_spread_that_shrinks_at_first_and_grows_later():
    effect, _ = counted(lambda length: StepEffect(1 - length + length**2, 0.0))
    found = length_by_effect(effect, guess=0.1, target=1.5, loss_rise=0.1)
    assert 1.45 <= found.effect.growth <= 1.55
    assert found.length == pytest.approx(1.366, abs=0.05)


def test_without_any_admissible_length_there_is_no_step():
    effect, calls = counted(lambda length: StepEffect(1.0, 1.0))
    found = length_by_effect(effect, guess=1.0, target=1.5, loss_rise=0.1)
    assert (found.length, found.effect, found.trials) == (0.0, StepEffect(1.0, 0.0), 8)
    assert len(calls) == 8


@pytest.mark.parametrize("growth", [1.0, 0.5, 1 + 1e-7])
def test_differences_that_answer_to_no_length_get_no_step(growth):
    """The length would grow with every trial, and from step to step until it overflows."""
    effect, calls = counted(lambda length: StepEffect(growth, 0.0))
    found = length_by_effect(effect, guess=1.0, target=1.5, loss_rise=0.1)
    assert (found.length, found.effect, len(calls)) == (0.0, StepEffect(1.0, 0.0), 8)


def test_when_trials_run_out_it_is_the_longest_admissible_one():
    effect, calls = counted(lambda length: StepEffect(1 + 0.01 * math.tanh(length), 0.0))
    found = length_by_effect(effect, guess=1.0, target=1.5, loss_rise=0.1, most_trials=3)
    assert found.length == max(calls) == calls[-1]
    assert found.effect.growth < 1.1
