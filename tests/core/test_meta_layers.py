"""Steps divided among layers, and the random control, by hand and against autograd."""

import math

import pytest
import torch

from shiftrm.core.meta_direction import ascent_direction, direction_vjp, global_norm
from shiftrm.core.meta_layers import per_layer, per_layer_vjp, random_directions


def test_per_layer_by_hand():
    weights = [torch.tensor([3.0, 4.0]), torch.tensor([[6.0], [8.0]]), torch.zeros(4)]
    gradients = [torch.tensor([1000.0, 0.0]), torch.tensor([[0.3], [0.4]]), torch.full((4,), 5.0)]
    head, layer, fresh = per_layer(gradients, weights)
    assert head.tolist() == pytest.approx([3.0, 0.0]), "the weight without gradient does not count"
    assert layer.flatten().tolist() == pytest.approx([6.0, 8.0])
    # |w| = 0: 0.001 * sqrt(4), shared by four equal entries.
    assert fresh.tolist() == pytest.approx([1e-3] * 4)
    [none] = per_layer([torch.zeros(2)], [torch.ones(2)])
    assert none.tolist() == [0.0, 0.0]


def test_the_head_no_longer_takes_the_whole_step():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, generator=generator), torch.randn(1, 8, generator=generator)]
    gradients = [1e-3 * torch.randn(8, 8, generator=generator), torch.ones(1, 8)]
    body, head = ascent_direction(per_layer(gradients, weights), meta_step="normalized")
    assert float(global_norm([body, head])) == pytest.approx(1.0)
    ratio = float(weights[0].norm() / weights[1].norm())
    assert float(body.norm() / head.norm()) == pytest.approx(ratio, rel=1e-5)


def test_multiplying_a_layer_and_its_gradient_moves_it_by_the_same_share():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    gradients = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    plain = per_layer(gradients, weights)
    # J(w / 10): weights ten times as large have a tenth of the gradient.
    scaled = per_layer([gradients[0] / 10, gradients[1]], [weights[0] * 10, weights[1]])
    torch.testing.assert_close(scaled[0], 10 * plain[0])
    torch.testing.assert_close(scaled[1], plain[1])


def test_derivative_equals_autograd():
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 2), (4,), (5,)]
    draw = {"generator": generator, "dtype": torch.float64}
    weights, gradients, vectors = ([torch.randn(s, **draw) for s in shapes] for _ in range(3))
    weights[2] = torch.zeros(5, dtype=torch.float64)

    def direction(*given):
        limits = [max(w.norm(), 1e-3 * math.sqrt(w.numel())) for w in weights]
        scaled = [c * g / g.norm() for c, g in zip(limits, given, strict=True)]
        size = torch.cat([s.flatten() for s in scaled]).norm()
        return tuple(s / size for s in scaled)

    ours = ascent_direction(per_layer(gradients, weights), meta_step="normalized")
    for a, b in zip(ours, direction(*gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    through_length = direction_vjp(per_layer(gradients, weights), vectors, meta_step="normalized")
    ours = per_layer_vjp(gradients, weights, through_length)
    _, expected = torch.autograd.functional.vjp(direction, tuple(gradients), tuple(vectors))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_random_direction_keeps_lengths_and_zeros():
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(50, 4, generator=generator), torch.tensor([0.0, 2.0, 0.0, -1.0])]
    given.append(torch.zeros(3))
    found = random_directions(given, seed=7)
    for a, b in zip(found, given, strict=True):
        assert a.dtype == b.dtype
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-5)
        assert torch.equal(a == 0, b == 0)
    cosine = float((found[0] * given[0]).sum() / given[0].square().sum())
    assert abs(cosine) < 0.25, "200 entries: the standard deviation is 0.07"
    again, other = random_directions(given, seed=7), random_directions(given, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], other[0])
