"""The meta step against plain autograd in fp64 and against hand-worked quadratics."""

import math

import pytest
import torch

from shiftrm.core.meta import (
    AdaptiveState,
    MetaRule,
    ascent_direction,
    influence,
    look_ahead,
    metarm_gradient,
)


def quadratic_problem():
    """J = a.theta - |theta|^2/2 and L = (theta - b)' C (theta - b) / 2, with gradients by hand."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    a, b = torch.randn(2, 4, generator=generator, dtype=torch.float64).unbind(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    C = root @ root.T
    return theta, a, b, C


def test_plain_step_by_hand():
    theta, a, b, C = quadratic_problem()
    gradient, report = metarm_gradient(
        [theta],
        lambda: a @ theta - theta @ theta / 2,
        lambda: (theta - b) @ C @ (theta - b) / 2,
        MetaRule(0.3),
    )
    shifted = theta.detach() + 0.3 * (a - theta.detach())  # Eq. 3
    torch.testing.assert_close(gradient[0], C @ (shifted - b), rtol=1e-12, atol=1e-12)
    expected = (C @ (shifted - theta.detach())).norm() / (C @ (theta.detach() - b)).norm()
    assert report.influence == pytest.approx(expected.item(), rel=1e-12)
    assert report.gradient_norm == pytest.approx((a - theta.detach()).norm().item())
    assert report.objective_after == pytest.approx(
        (a @ shifted - shifted @ shifted / 2).item(), rel=1e-12
    )
    assert report.objective_after > report.objective_before
    assert not report.skipped


@pytest.mark.parametrize("meta_step", ["sgd", "normalized", "adaptive"])
def test_equals_autograd_on_a_network(meta_step):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
    ).double()
    x, y = torch.randn(2, 6, 5, dtype=torch.float64).unbind(0)
    parameters = list(net.parameters())
    gradient, _ = metarm_gradient(
        parameters,
        lambda: net(x).std(),
        lambda: (net(y) - 1).pow(2).mean(),
        MetaRule(0.05, meta_step=meta_step),
        state=AdaptiveState(),
    )
    # The oracle: a second copy of the network, moved by hand.
    G = torch.autograd.grad(net(x).std(), parameters, materialize_grads=True)
    if meta_step == "normalized":
        size = math.sqrt(sum(float(g.pow(2).sum()) for g in G))
        G = [g / size for g in G]
    elif meta_step == "adaptive":  # Adam's first step: bias correction leaves g / (|g| + eps)
        G = [g / (g.abs() + 1e-8) for g in G]
    moved = {
        name: p.detach() + 0.05 * g for (name, p), g in zip(net.named_parameters(), G, strict=True)
    }
    for p in moved.values():
        p.requires_grad_()
    loss = (torch.func.functional_call(net, moved, (y,)) - 1).pow(2).mean()
    for ours, oracle in zip(gradient, torch.autograd.grad(loss, list(moved.values())), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-12)


def test_normalized_step_has_length_eta_whatever_the_scale():
    theta = torch.zeros(3, requires_grad=True)
    for scale in (1e-6, 1.0, 1e6):
        direction = torch.tensor([3.0, 0.0, 4.0])
        _, report = metarm_gradient(
            [theta],
            lambda scale=scale, d=direction: scale * (d @ theta),
            lambda: theta.sum(),
            MetaRule(0.5, meta_step="normalized"),
        )
        assert report.step_norm == pytest.approx(0.5, rel=1e-6)


def test_adaptive_direction_equals_torch_adam_over_several_steps():
    generator = torch.Generator().manual_seed(5)
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([p], lr=0.1, maximize=True)
    state, ours = AdaptiveState(), torch.zeros(6, dtype=torch.float64)
    for _ in range(5):
        g = torch.randn(6, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        adam.step()
        ours += 0.1 * ascent_direction([g], meta_step="adaptive", state=state)[0]
    torch.testing.assert_close(ours, p.detach(), rtol=1e-10, atol=1e-12)


def test_zero_gradient_gives_a_zero_step_not_nan():
    for meta_step in ("sgd", "normalized", "adaptive"):
        direction = ascent_direction([torch.zeros(3)], meta_step=meta_step, state=AdaptiveState())
        assert direction[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_return(dtype):
    p = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = p.clone()
    with look_ahead([p], [torch.randn(1000).to(dtype)], meta_learning_rate=0.37):
        assert not torch.equal(p, before)
    assert torch.equal(p, before)


def test_exact_return_after_an_exception():
    theta = torch.randn(8, requires_grad=True)
    before = theta.detach().clone()

    def failing_loss():
        if not torch.equal(theta.detach(), before):
            raise RuntimeError("inside the look-ahead")
        return theta.sum()

    with pytest.raises(RuntimeError, match="inside the look-ahead"):
        metarm_gradient([theta], lambda: theta.pow(2).sum(), failing_loss, MetaRule(0.1))
    assert torch.equal(theta.detach(), before)


def test_non_finite_objective_gradient_skips_the_step():
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    gradient, report = metarm_gradient(
        [theta], lambda: (theta * float("nan")).sum(), lambda: theta.pow(2).sum(), MetaRule(0.1)
    )
    assert report.skipped
    assert report.influence == 0.0
    assert gradient[0].tolist() == [2.0, 4.0]


def test_a_skipped_adaptive_step_does_not_move():
    """Zeros fed to Adam would let its momentum move theta."""
    theta, state = torch.tensor([1.0, 2.0], requires_grad=True), AdaptiveState()
    ascent_direction([torch.ones(2)], meta_step="adaptive", state=state)
    gradient, report = metarm_gradient(
        [theta],
        lambda: (theta * float("nan")).sum(),
        lambda: theta.pow(2).sum(),
        MetaRule(0.1, meta_step="adaptive"),
        state=state,
    )
    assert (report.skipped, report.step_norm, state.steps) == (True, 0.0, 1)
    assert gradient[0].tolist() == [2.0, 4.0]


def test_influence_limits():
    base = [torch.tensor([3.0, 4.0])]
    assert influence(base, base) == 0.0
    assert influence([torch.tensor([0.0, 0.0])], base) == pytest.approx(1.0)
    assert influence([torch.ones(2)], [torch.zeros(2)]) == math.inf


def test_parameters_the_losses_ignore_get_zeros():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    gradient, _ = metarm_gradient(
        [used, unused],
        lambda: used.pow(2).sum(),
        lambda: used.sum(),
        MetaRule(0.1, meta_step="normalized"),
    )
    assert gradient[1].tolist() == [0.0, 0.0]


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="meta_step"):
        ascent_direction([torch.ones(1)], meta_step="adagrad")
    with pytest.raises(ValueError, match="AdaptiveState"):
        ascent_direction([torch.ones(1)], meta_step="adaptive")
