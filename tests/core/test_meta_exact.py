"""Exact second order against plain autograd through the step, in fp64."""

import pytest
import torch
from torch.func import functional_call
from transformers import LlamaForSequenceClassification

from shiftrm.core.losses import bradley_terry_loss, difference_loss
from shiftrm.core.meta import (
    AdaptiveState,
    MetaRule,
    ascent_direction,
    direction_vjp,
    metarm_gradient,
)
from shiftrm.models.scoring import sequence_rewards
from tests.conftest import llama_config
from tests.core.meta_models import norms_in_fp64

RULES = ["sgd", "normalized", "adaptive"]


def plain_direction(g, rule, past=None):
    """The rules written out once more, on one flat vector, for autograd to differentiate."""
    if rule == "sgd":
        return g
    if rule == "normalized":
        return g / g.norm()
    steps, m, v = past or (0, torch.zeros_like(g), torch.zeros_like(g))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    m, v = m / (1 - 0.9 ** (steps + 1)), v / (1 - 0.999 ** (steps + 1))
    return m / (v.sqrt() + 1e-8)


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def relative_error(ours, oracle):
    return float((flatten(ours) - flatten(oracle)).norm() / flatten(oracle).norm())


def through_the_step(objective, loss, theta, rule, eta, past=None):
    """grad of L(theta + eta d(grad J(theta))) by autograd; theta is a list of leaves."""
    g = torch.autograd.grad(objective(theta), theta, create_graph=True, materialize_grads=True)
    moves = plain_direction(flatten(g), rule, past).split([p.numel() for p in theta])
    moved = [p + eta * d.view_as(p) for p, d in zip(theta, moves, strict=True)]
    return torch.autograd.grad(loss(moved), theta)


def adaptive_past(theta):
    """A state with two earlier steps, as Adam's moments and as the flat oracle's."""
    state = AdaptiveState()
    generator = torch.Generator().manual_seed(11)
    for _ in range(2):
        past = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.01 for p in theta]
        ascent_direction(past, meta_step="adaptive", state=state)
    return state, (2, flatten(state.first).clone(), flatten(state.second).clone())


@pytest.mark.parametrize("rule", RULES)
def test_direction_vjp_equals_autograd(rule):
    generator = torch.Generator().manual_seed(2)
    g, v = torch.randn(2, 12, generator=generator, dtype=torch.float64).unbind(0)
    state, past = adaptive_past([g[:5], g[5:]])
    leaf = g.clone().requires_grad_()
    (oracle,) = torch.autograd.grad(plain_direction(leaf, rule, past), leaf, v)
    parts = [g[:5], g[5:]]
    ascent_direction(parts, meta_step=rule, state=state)
    ours = direction_vjp(parts, [v[:5], v[5:]], meta_step=rule, state=state)
    torch.testing.assert_close(flatten(ours), oracle, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", ["normalized", "adaptive"])
def test_no_step_has_no_derivative(rule):
    """A zero gradient makes no step; nothing is divided by zero and Adam's 1/eps is not met."""
    state, zeros = AdaptiveState(), [torch.zeros(3)]
    ascent_direction(zeros, meta_step=rule, state=state)
    assert (
        direction_vjp(zeros, [torch.ones(3)], meta_step=rule, state=state)[0].tolist() == [0.0] * 3
    )


def test_a_second_moment_of_zero_beside_others():
    """An unused embedding row: only it is zero."""
    g, state = [torch.tensor([0.0, 0.5], dtype=torch.float64)], AdaptiveState()
    ascent_direction(g, meta_step="adaptive", state=state)
    [ours] = direction_vjp(g, [torch.ones(2).double()], meta_step="adaptive", state=state)
    # Adam's first step is g / (|g| + eps), whose derivative is eps / (|g| + eps)^2.
    assert ours.tolist() == [0.0, pytest.approx(1e-8 / (0.5 + 1e-8) ** 2, rel=1e-6)]


def test_direction_vjp_refuses_what_ascent_direction_refuses():
    with pytest.raises(ValueError, match="meta_step"):
        direction_vjp([torch.ones(1)], [torch.ones(1)], meta_step="adagrad")
    with pytest.raises(ValueError, match="AdaptiveState"):
        direction_vjp([torch.ones(1)], [torch.ones(1)], meta_step="adaptive")
    with pytest.raises(ValueError, match="meta_order"):
        metarm_gradient([], lambda: None, lambda: None, MetaRule(1, meta_order="second"))


def toy():
    """A small network's parameters with smooth J and L, as functions of a list of tensors."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 7), (7,), (7, 1)]
    theta = [torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for s in shapes]
    x, y = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).unbind(0)

    def net(p, inputs):
        return (torch.tanh(inputs @ p[0] + p[1]) @ p[2]).squeeze(-1)

    return (
        [p.requires_grad_() for p in theta],
        lambda p: difference_loss(net(p, x).view(2, 3)).mean(),
        lambda p: bradley_terry_loss(net(p, y)[:3], net(p, y)[3:]).mean(),
    )


@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
@pytest.mark.parametrize("rule", RULES)
def test_toy_function(rule, curvature):
    theta, objective, loss = toy()
    state, past = adaptive_past(theta)
    oracle = through_the_step(objective, loss, theta, rule, 0.3, past)
    ours, _ = metarm_gradient(
        theta,
        lambda: objective(theta),
        lambda: loss(theta),
        MetaRule(0.3, meta_step=rule, meta_order="exact", curvature=curvature),
        state=state,
    )
    assert relative_error(ours, oracle) < (1e-12 if curvature == "exact" else 1e-8)


def test_second_order_matters_and_a_skipped_step_has_none():
    theta, objective, loss = toy()
    first, exact = (
        metarm_gradient(
            theta, lambda: objective(theta), lambda: loss(theta), MetaRule(0.3, meta_order=order)
        )[0]
        for order in ("first", "exact")
    )
    assert relative_error(first, exact) > 1e-3
    ours, report = metarm_gradient(
        theta,
        lambda: objective(theta) * float("nan"),
        lambda: loss(theta),
        MetaRule(0.3, meta_order="exact"),
    )
    assert report.skipped
    assert relative_error(ours, torch.autograd.grad(loss(theta), theta)) == 0.0


@pytest.fixture
def llama_in_fp64():
    torch.manual_seed(0)
    config = llama_config(hidden_size=16, intermediate_size=32, num_labels=1, initializer_range=0.2)
    with norms_in_fp64():
        yield LlamaForSequenceClassification(config).double()


@pytest.mark.parametrize("rule", RULES)
def test_llama_reward_model_with_groups_and_pairs(llama_in_fp64, rule):
    model = llama_in_fp64
    generator = torch.Generator().manual_seed(4)
    groups = torch.randint(3, 32, (6, 9), generator=generator)  # two of three responses
    pairs = torch.randint(3, 32, (6, 7), generator=generator)  # three pairs
    names = [name for name, _ in model.named_parameters()]
    theta = list(model.parameters())

    class Rewards(torch.nn.Module):
        """Lets `functional_call` reach the parameters inside `sequence_rewards`."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return sequence_rewards(self.model, ids, torch.ones_like(ids))

    def rewards(p, ids):
        swapped = {f"model.{name}": t for name, t in zip(names, p, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(Rewards(), swapped, (ids,))

    def objective(p):
        return difference_loss(rewards(p, groups).view(2, 3)).mean()

    def loss(p):
        return bradley_terry_loss(*rewards(p, pairs).chunk(2)).mean()

    # With a past, no second moment is zero: the oracle has no answer there (0/0).
    state, past = adaptive_past(theta)
    eta = {"sgd": 0.1, "normalized": 0.1, "adaptive": 0.003}[rule]
    oracle = through_the_step(objective, loss, theta, rule, eta, past)
    ours, _ = metarm_gradient(
        theta,
        lambda: difference_loss(
            sequence_rewards(model, groups, torch.ones_like(groups)).view(2, 3)
        ).mean(),
        lambda: bradley_terry_loss(
            *sequence_rewards(model, pairs, torch.ones_like(pairs)).chunk(2)
        ).mean(),
        MetaRule(eta, meta_step=rule, meta_order="exact"),
        state=state,
        diagnose=False,
    )
    assert relative_error(ours, oracle) < 1e-8
