"""Hessian-vector products against hand-worked Hessians and torch.func."""

import pytest
import torch
from transformers import (
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from shiftrm.core.curvature import (
    coarsest_type,
    finite_difference_product,
    hessian_vector_product,
    kinks,
    relative_size,
)
from shiftrm.core.objectives import difference_loss, held_signs, recorded_signs
from shiftrm.errors import UserError
from shiftrm.models.scoring import sequence_rewards
from tests.conftest import llama_config


def cubic(theta):
    return (theta**3).sum() / 6 + theta[0] * theta[1]


def cubic_hessian_times(theta, v):
    product = theta * v
    product[0] += v[1]
    product[1] += v[0]
    return product


def test_both_ways_by_hand():
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    hand = cubic_hessian_times(theta.detach(), v)
    [exact] = hessian_vector_product(lambda: cubic(theta), [theta], [v])
    torch.testing.assert_close(exact, hand, rtol=1e-14, atol=0)

    def gradient():
        return torch.autograd.grad(cubic(theta), theta)

    before = theta.detach().clone()
    [central], _ = finite_difference_product(gradient, [theta], [v], compute_type=torch.float64)
    torch.testing.assert_close(central, hand, rtol=1e-9, atol=0)  # exact for a cubic, but rounding
    assert torch.equal(theta, before)


def test_the_radius_found_needs_no_second_trial():
    theta = torch.tensor([50.0, -100.0, 200.0], dtype=torch.float64, requires_grad=True)
    calls = []

    def gradient():
        calls.append(1)
        return torch.autograd.grad(cubic(theta), theta)

    v = [torch.ones(3, dtype=torch.float64)]
    options = {"compute_type": torch.float32}
    _, radius = finite_difference_product(gradient, [theta], v, **options)
    assert len(calls) == 4  # the first radius was too small for values of this size
    _, again = finite_difference_product(gradient, [theta], v, radius=radius, **options)
    assert (len(calls), again) == (6, radius)


def test_parameters_come_back_after_an_exception():
    theta = torch.ones(3, requires_grad=True)

    def failing():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        finite_difference_product(failing, [theta], [torch.ones(3)])
    assert theta.tolist() == [1.0] * 3


def test_zero_vectors_and_parameters_without_curvature():
    used, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))

    def function():
        return used.pow(2).sum() + linear.sum()

    products = hessian_vector_product(function, [used, linear, unused], [torch.ones(2)] * 3)
    assert [p.tolist() for p in products] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert hessian_vector_product(lambda: linear.sum(), [linear], [torch.ones(2)])[0].sum() == 0
    found, _ = finite_difference_product(lambda: 1 / 0, [used], [torch.zeros(2)])
    assert found[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_add_up_on_a_model_with_attention(checkpointing):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1)).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 32, (4, 8))
    theta = list(model.parameters())
    v = [torch.randn_like(p) for p in theta]

    def part(rows):
        return sequence_rewards(model, rows, torch.ones_like(rows)).pow(2).sum()

    whole = hessian_vector_product(lambda: part(ids), theta, v)
    halves = [hessian_vector_product(lambda r=r: part(r), theta, v) for r in ids.chunk(2)]
    added = [a + b for a, b in zip(*halves, strict=True)]
    assert relative_size([a - w for a, w in zip(added, whole, strict=True)], whole) < 1e-5
    assert all(p.grad is None for p in theta)
    # Without a second derivative, in fp32:
    by_differences, _ = finite_difference_product(
        lambda: torch.autograd.grad(part(ids), theta, materialize_grads=True), theta, v
    )
    error = [d - w for d, w in zip(by_differences, whole, strict=True)]
    assert relative_size(error, whole) < 1e-2


def test_an_operation_with_one_derivative_is_refused_with_advice():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(UserError, match="curvature='finite_difference'"):
        hessian_vector_product(lambda: Once.apply(theta).pow(2).sum(), [theta], [torch.ones(2)])


@pytest.mark.parametrize("seed", range(3))
def test_differences_do_not_cross_the_kinks_of_the_difference_loss(seed):
    """Many differences near 0: of the raw J the difference was 9.6 times the product for seed 0."""
    torch.manual_seed(seed)
    config = llama_config(hidden_size=16, intermediate_size=32, num_labels=1)
    model = LlamaForSequenceClassification(config)
    ids = torch.randint(3, 32, (8, 5, 9))
    theta = list(model.parameters())

    def objective():
        rewards = sequence_rewards(model, ids.view(40, 9), torch.ones(40, 9, dtype=torch.long))
        return difference_loss(rewards.view(8, 5)).mean()

    def gradient():  # in parts, as in a training step
        return torch.autograd.grad(objective(), theta, materialize_grads=True)

    v = [torch.randn_like(p) for p in theta]
    exact = hessian_vector_product(objective, theta, v)
    near, radius = finite_difference_product(gradient, theta, v)
    error = relative_size([a - b for a, b in zip(near, exact, strict=True)], exact)
    assert error < 1e-4
    with recorded_signs() as signs:
        gradient()

    def held():
        with held_signs(signs):
            return gradient()

    calls = []
    again, _ = finite_difference_product(lambda: calls.append(1) or held(), theta, v, radius=radius)
    assert len(calls) == 2, "signs that are held cost no further gradient"
    error = relative_size([a - b for a, b in zip(again, exact, strict=True)], exact)
    assert error < 1e-4


def test_held_signs_are_those_of_the_same_calls():
    rewards = torch.tensor([[0.1, 0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    with recorded_signs() as signs:
        plain = difference_loss(rewards)
    assert [s.tolist() for s in signs] == [[[-1.0, -1.0, 1.0]]]
    with held_signs(signs):
        assert torch.equal(difference_loss(rewards), plain)
    turned = rewards.detach().flip(1)
    with held_signs(signs):  # differences -0.2, 0.1 and 0.3, the first two times -1
        hand = 2 / 9 * torch.sigmoid(torch.tensor([0.2, -0.1, 0.3]).double()).sum()
        torch.testing.assert_close(difference_loss(turned)[0], hand)
        with pytest.raises(RuntimeError, match="differently than when its signs"):
            difference_loss(turned)
    with held_signs(signs), pytest.raises(RuntimeError, match="differently than when its signs"):
        difference_loss(turned[:, :2])


def test_models_whose_gradient_jumps_are_known():
    assert kinks(LlamaForSequenceClassification(llama_config(num_labels=1))) is None
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "hidden_size": 8}
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8, ffn_dim=8))
    assert kinks(opt) == "model.decoder.layers.0.activation_fn is a ReLU, whose gradient jumps"
    moe = MixtralConfig(**sizes, num_key_value_heads=2, intermediate_size=8, num_local_experts=2)
    assert "Mixtral" in kinks(MixtralForCausalLM(moe))


def test_the_type_that_rounds_most():
    fp32, bf16 = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert coarsest_type([fp32, fp32.double()]) == torch.float32
    assert coarsest_type([fp32, bf16]) == torch.bfloat16
    assert coarsest_type([fp32], autocast_type=torch.bfloat16) == torch.bfloat16
    assert coarsest_type([fp32, torch.zeros(1, dtype=torch.uint8)]) == torch.bfloat16
