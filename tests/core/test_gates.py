"""Per-sample products against gradients of single samples."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shiftrm.core.gates import gates, unsupported


class Shifted(nn.Module):
    """An RMSNorm of the kind `x * (1 + w)`: affine, not linear. The name is what is recognised."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class GemmaLikeRMSNorm(Shifted):
    pass


class Net(nn.Module):
    """Each kind of leaf, one layer used twice, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.places = nn.Embedding(8, 6)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.conv = Conv1D(9, 6)
        self.narrow = nn.Linear(9, 6, bias=False)
        self.shifted = GemmaLikeRMSNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])  # [1, T, H]
        x = self.twice(torch.tanh(self.twice(self.norm(x))))
        x = self.narrow(torch.tanh(self.conv(x)))
        return self.head(self.shifted(x))


def losses(net, ids):
    return net(ids).log_softmax(-1)[..., 3].sum(1)


@pytest.mark.parametrize("B", [1, 4])
def test_products_equal_gradients_of_single_samples(B):
    torch.manual_seed(0)
    net = Net().double()
    net.twice.bias.requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    ids = torch.randint(0, 11, (B, 5))  # with the padding index among them
    v = [torch.randn_like(p) for p in parameters]
    assert unsupported(net, parameters) is None

    gate = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    with gates(net, dict(zip(parameters, v, strict=True)), gate) as state:
        loss = losses(net, ids)
        assert not state.unseen()
        [products] = torch.autograd.grad(loss.sum(), [gate])
    assert torch.equal(loss, losses(net, ids))  # the forward pass is untouched

    for i in range(B):
        single = torch.autograd.grad(losses(net, ids[i : i + 1]).sum(), parameters)
        expected = sum((g * d).sum() for g, d in zip(single, v, strict=True))
        torch.testing.assert_close(products[i], expected, rtol=1e-11, atol=1e-12)


def test_hooks_are_gone_afterwards():
    net = Net()
    with pytest.raises(RuntimeError, match="inside"), gates(net, {}, torch.zeros(1)):
        raise RuntimeError("inside")
    with gates(net, {p: p for p in net.parameters()}, torch.zeros(1)):
        assert net.norm._forward_hooks
    assert not any(m._forward_hooks for m in net.modules())


def test_what_has_no_gate_is_said():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

    assert unsupported(nn.Sequential(Bilinear()), []) is None
    net = nn.Sequential(Bilinear())
    assert unsupported(net, list(net.parameters())) == "0 is a Bilinear"


def test_a_parameter_used_without_its_module_is_noticed():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return x @ self.linear.weight

    net = Sneaky()
    with gates(net, {p: p for p in net.parameters()}, torch.zeros(2)) as state:
        net(torch.randn(2, 3))
        assert state.unseen()
