"""The meta step where numbers are rounded to bf16, against fp64 at the same weights."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from shiftrm.core.curvature import relative_size
from shiftrm.core.losses import bradley_terry_loss, difference_loss
from shiftrm.core.meta import (
    MetaRule,
    add_unbiased_,
    ascend_,
    choose_meta_shift,
    global_norm,
    look_ahead,
    metarm_gradient,
    midpoint_change,
    midpoint_change_by_differences,
)
from shiftrm.core.meta_direction import inner_product
from shiftrm.models.scoring import sequence_rewards
from tests.conftest import llama_config
from tests.core.meta_models import norms_in_fp64


class Case:
    """A reward model with pairs, groups and the gradients of their losses."""

    def __init__(self, model, *, autocast=False):
        generator = torch.Generator().manual_seed(1)
        self.model, self.autocast = model, autocast
        self.pairs = torch.randint(3, 32, (16, 12), generator=generator)
        self.groups = torch.randint(3, 32, (16, 12), generator=generator)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def rewards(self, ids):
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return sequence_rewards(self.model, ids, torch.ones_like(ids))

    def loss(self):
        return bradley_terry_loss(*self.rewards(self.pairs).chunk(2)).mean()

    def objective(self):
        return difference_loss(self.rewards(self.groups).view(4, 4)).mean()

    def gradient(self, function=None):
        value = (function or self.loss)()
        return list(torch.autograd.grad(value, self.parameters, materialize_grads=True))

    def unit_direction(self):
        gradients = self.gradient(self.objective)
        return [g.float() / global_norm(gradients) for g in gradients]

    def in_place_change(self, directions, eta):
        base = self.gradient()
        with look_ahead(self.parameters, directions, meta_learning_rate=eta):
            return minus(self.gradient(), base)

    def truth(self, directions, eta):
        """The change of the gradient in fp64, at these weights and for this direction."""
        with norms_in_fp64():
            return Case(copy.deepcopy(self.model).double()).in_place_change(directions, eta)


def minus(left, right):
    return [a.double() - b.double() for a, b in zip(left, right, strict=True)]


def cosine_and_error(change, truth):
    norms = global_norm(change) * global_norm(truth)
    cosine = float(inner_product(change, truth) / norms) if norms > 0 else 0.0
    return cosine, relative_size(minus(change, truth), truth)


def llama():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama_config(num_labels=1, initializer_range=0.2))


def lora(adapter_type):
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama().to(torch.bfloat16), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.to(torch.bfloat16).to(adapter_type)
    return model


CASES = {
    "bf16": lambda: Case(llama().to(torch.bfloat16)),
    "autocast": lambda: Case(llama(), autocast=True),
    "bf16 LoRA": lambda: Case(lora(torch.bfloat16)),
    "fp32 LoRA": lambda: Case(lora(torch.float32)),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("eta", [1e-5, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_in_place_fails_in_bf16_and_the_midpoint_does_not(name, eta):
    case = CASES[name]()
    directions = case.unit_direction()
    truth = case.truth(directions, eta)
    before = [p.detach().clone() for p in case.model.parameters()]

    cosine, error = cosine_and_error(case.in_place_change(directions, eta), truth)
    assert cosine < 0.5
    assert error > 0.9

    ours = midpoint_change(case.loss, case.parameters, directions, meta_learning_rate=eta)
    cosine, error = cosine_and_error(ours, truth)
    assert cosine > 0.998
    assert error < 0.05

    ours, _ = midpoint_change_by_differences(
        case.gradient,
        case.parameters,
        directions,
        meta_learning_rate=eta,
        compute_type=torch.bfloat16,
    )
    cosine, error = cosine_and_error(ours, truth)
    assert cosine > 0.98
    assert error < 0.25
    assert all(map(torch.equal, before, case.model.parameters()))
    assert all(p.grad is None for p in case.model.parameters())


def test_a_large_step_subtracts_gradients_after_all():
    case = CASES["bf16"]()
    directions = case.unit_direction()
    truth = case.truth(directions, 3.0)
    ours = midpoint_change(case.loss, case.parameters, directions, meta_learning_rate=3.0)
    assert relative_size(truth, case.gradient()) > 0.5
    assert relative_size(minus(ours, case.in_place_change(directions, 3.0)), ours) < 1e-6
    assert cosine_and_error(ours, truth)[1] < 0.1
    ours, _ = midpoint_change_by_differences(
        case.gradient,
        case.parameters,
        directions,
        meta_learning_rate=3.0,
        compute_type=torch.bfloat16,
    )
    assert cosine_and_error(ours, truth)[1] < 0.1


def test_in_fp64_it_is_the_in_place_change_to_third_order():
    with norms_in_fp64():
        case = Case(llama().double())
        directions = case.unit_direction()
        errors = []
        for eta in (0.1, 0.05, 0.025):
            ours = midpoint_change(
                case.loss,
                case.parameters,
                directions,
                meta_learning_rate=eta,
                largest_influence=math.inf,
            )
            exact = case.in_place_change(directions, eta)
            errors.append(float(global_norm(minus(ours, exact))))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)  # eta^3
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3-MoE"])
def test_leaves_that_are_not_linear_in_their_parameters(name):
    """Gemma's norms are 1 + w, experts are not even leaves: nothing depends on it."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "num_labels": 1,
        "initializer_range": 0.2,
    }
    if name == "Gemma 3":
        model = Gemma3TextForSequenceClassification(Gemma3TextConfig(**sizes))
    else:
        model = Qwen3MoeForSequenceClassification(
            Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        )
    case = Case(model)
    directions = case.unit_direction()
    ours = midpoint_change(case.loss, case.parameters, directions, meta_learning_rate=0.003)
    assert cosine_and_error(ours, case.in_place_change(directions, 0.003))[1] < 1e-2


def test_accumulated_over_micro_batches_it_is_the_whole_step():
    """What a trainer does: backward each micro-batch at theta, add the changes at the end."""
    with norms_in_fp64():
        case = Case(llama().double())
        directions, eta = case.unit_direction(), 1e-3
        with look_ahead(case.parameters, directions, meta_learning_rate=eta):
            whole = case.gradient()
        chosen, rejected = case.pairs.chunk(2)
        change = [torch.zeros_like(p) for p in case.parameters]
        for c, r in zip(chosen.chunk(2), rejected.chunk(2), strict=True):

            def loss(c=c, r=r):
                return bradley_terry_loss(case.rewards(c), case.rewards(r)).mean() / 2

            part = midpoint_change(loss, case.parameters, directions, meta_learning_rate=eta)
            change = [a + b for a, b in zip(change, part, strict=True)]
            loss().backward()
        gradients = [p.grad for p in case.parameters]
        measured = relative_size(change, gradients)
        assert measured == pytest.approx(
            relative_size(minus(whole, gradients), gradients), rel=1e-4
        )
        add_unbiased_(gradients, change, seed=0)
    assert relative_size(minus(gradients, whole), whole) < 1e-7


def test_the_whole_step_and_its_influence_in_bf16():
    case = CASES["bf16"]()
    options = {"meta_learning_rate": 1e-4, "meta_step": "normalized"}
    report = {
        shift: metarm_gradient(
            case.parameters, case.objective, case.loss, MetaRule(meta_shift=shift, **options)
        )[1]
        for shift in ("in_place", "midpoint")
    }
    truth = case.truth(case.unit_direction(), 1e-4)
    expected = relative_size(truth, case.gradient())
    assert report["midpoint"].influence == pytest.approx(expected, rel=0.05)
    assert abs(report["in_place"].influence / expected - 1) > 0.5
    by_differences = metarm_gradient(
        case.parameters,
        case.objective,
        case.loss,
        MetaRule(meta_shift="midpoint", curvature="finite_difference", **options),
    )[1]
    assert by_differences.influence == pytest.approx(expected, rel=0.2)


def test_random_rounding_is_right_on_average():
    start = torch.tensor([1.0, -3.0, 0.1, 0.0, 5.0, math.inf]).to(torch.bfloat16)
    change = torch.tensor([1e-3, 2e-3, -1e-5, 1e-6, 0.0, 1.0])
    total = torch.zeros(6)
    for seed in range(4000):
        moved = start.clone()
        add_unbiased_([moved], [change], seed=seed)
        total += moved.float() - torch.where(start.isinf(), 0.0, start.float())
    average = total / 4000
    # The error of the average is sqrt(step * ulp / 4000) at most, ulp <= 2^-6 of the largest.
    torch.testing.assert_close(average[:4], change[:4], rtol=0.15, atol=1e-8)
    assert average[4] == 0.0
    assert moved[5] == math.inf
    again = start.clone()
    add_unbiased_([again], [change], seed=3999)
    assert torch.equal(again, moved)
    plain = torch.ones(2)
    add_unbiased_([plain], [torch.full((2,), 0.5)], seed=0)
    assert plain.tolist() == [1.5, 1.5]


def test_a_deployed_step_below_the_resolution_of_bf16():
    generator = torch.Generator().manual_seed(0)
    theta = (torch.randn(200_000, generator=generator) * 0.02).to(torch.bfloat16)
    direction = torch.randn(200_000, generator=generator).to(torch.bfloat16)
    for seed, share in ((None, (0.0, 0.5)), (7, (0.9, 1.1))):
        moved = theta.clone()
        ascend_([moved], [direction], meta_learning_rate=1e-6, seed=seed)
        along = (moved.float() - theta.float()) @ direction.float()
        along = float(along / (1e-6 * direction.float() @ direction.float()))
        assert share[0] <= along <= share[1]


def test_the_choice():
    fp32, bf16 = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert choose_meta_shift([fp32, fp32.double()]) == "in_place"
    assert choose_meta_shift([fp32, bf16]) == "midpoint"
    assert choose_meta_shift([fp32], autocast_type=torch.bfloat16) == "midpoint"
