"""The exact order and the bf16 meta step inside the trainer, against plain autograd."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, OPTConfig, OPTForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.conftest import llama_config
from tests.trainers.conftest import encoded, logs_of, same_weights
from tests.trainers.test_metarm import difference_objective, preference_loss


def through_the_step(model, rows, groups, *, eta, rule):
    """grad of L(theta + eta d(grad J(theta))) by autograd, create_graph and all."""
    theta = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = difference_objective(model, theta, groups)
        G = torch.autograd.grad(J, list(theta.values()), create_graph=True, materialize_grads=True)
        if rule == "normalized":
            size = torch.sqrt(sum(g.pow(2).sum() for g in G))
            G = [g / size for g in G]
        shifted = {k: v + eta * g for (k, v), g in zip(theta.items(), G, strict=True)}
        L = preference_loss(model, shifted, rows)
        return dict(zip(theta, torch.autograd.grad(L, list(theta.values())), strict=True))


@pytest.mark.parametrize("rule", ["sgd", "normalized"])
@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (4, 3)])
@pytest.mark.parametrize(
    ("curvature", "dtype", "tolerance"),
    [("exact", torch.float64, 1e-6), ("finite_difference", torch.float32, 5e-3)],
)
def test_exact_order_is_the_gradient_through_the_step(
    make_trainer,
    reward_model,
    groups,
    tokenizer,
    rule,
    batch,
    accumulation,
    curvature,
    dtype,
    tolerance,
):
    model = reward_model.to(dtype)
    original = copy.deepcopy(model).double()
    eta = {"sgd": 3.0, "normalized": 0.3}[rule]
    trainer = make_trainer(
        model,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        meta_step=rule,
        meta_learning_rate=eta,
        meta_batch_size=len(groups),
        meta_order="exact",
        meta_curvature=curvature,
        shared_prefixes=False,  # RMSNorm works in fp32: a bit may flip with rows
    )
    rows = list(trainer.train_dataset)
    trainer.train()
    expected = through_the_step(original, rows, encoded(tokenizer, groups), eta=eta, rule=rule)
    step = {k: (original.get_parameter(k) - v).detach() / 0.1 for k, v in model.named_parameters()}
    size = torch.sqrt(sum(v.pow(2).sum() for v in expected.values()))
    error = torch.sqrt(sum((step[k] - v).pow(2).sum() for k, v in expected.items()))
    assert float(error / size) < tolerance
    [log] = logs_of(trainer, "meta_second_order")
    assert log["meta_second_order"] > 0.05, "the second order must matter in this test"


def one_step(make_trainer, model, *, eta, **config):
    """The gradient that an SGD step of the trainer applied, in fp32, and its log."""
    before = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    trainer = make_trainer(
        model,
        per_device_train_batch_size=12,
        meta_step="normalized",
        meta_learning_rate=eta,
        meta_batch_size=6,
        **config,
    )
    caught = {}

    def catch(optimizer, args, kwargs):
        caught.update(
            {k: p.grad.float().clone() for k, p in model.named_parameters() if k in before}
        )

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(catch)
    trainer.train()
    return caught, next(log for log in trainer.state.log_history if "loss" in log)


def flat(named):
    return torch.cat([v.flatten().double() for v in named.values()])


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


@pytest.mark.parametrize("lora", [False, True])
def test_where_weights_are_bf16_the_step_in_place_is_lost_and_ours_is_not(
    make_trainer, reward_model, lora, monkeypatch
):
    """The change that the meta step makes to the gradient, against fp32's on the same weights."""
    eta = 1e-5
    low = reward_model.bfloat16()
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
        low = get_peft_model(low, config, autocast_adapter_dtype=False)
    wide = copy.deepcopy(low).double()
    with_step, log = one_step(make_trainer, copy.deepcopy(wide), eta=eta)
    without, _ = one_step(make_trainer, copy.deepcopy(wide), eta=0.0)
    truth = flat(with_step) - flat(without)

    base, _ = one_step(make_trainer, copy.deepcopy(low), eta=0.0, meta_shift="in_place")
    lost, _ = one_step(make_trainer, copy.deepcopy(low), eta=eta, meta_shift="in_place")
    change = flat(lost) - flat(base)
    assert float(change.norm()) == 0 or cosine(change, truth) < 0.5

    seen = []
    monkeypatch.setattr(
        MetaRMTrainer, "_add_to_gradients", lambda self, changes: seen.extend(changes)
    )
    _, our_log = one_step(make_trainer, copy.deepcopy(low), eta=eta)
    ours = torch.cat([change.flatten().double() for change in seen])
    assert cosine(ours, truth) > 0.99
    assert float((ours - truth).norm() / truth.norm()) < 0.1
    assert our_log["meta_influence"] == pytest.approx(log["meta_influence"], rel=0.05)


def test_a_small_change_enters_a_bf16_gradient_on_average(make_trainer, reward_model):
    """`.grad` is bf16 too: rounding at random keeps what rounding to the nearest drops."""
    trainer = make_trainer(reward_model.bfloat16())
    parameter = trainer._trainable()[0]
    total = torch.zeros_like(parameter, dtype=torch.float64)
    for seed in range(400):
        trainer.args.seed = seed
        parameter.grad = torch.ones_like(parameter)
        trainer._trainable = lambda: [parameter]
        trainer._add_to_gradients([torch.full(parameter.shape, 1e-3)])
        total += parameter.grad.double() - 1.0
    assert float(total.mean() / 400) == pytest.approx(1e-3, rel=0.05)


def test_influence_under_autocast_is_no_rounding(make_trainer, reward_model):
    """In place under bf16 autocast the two gradients differ by rounding, ten times the truth."""
    eta = 1e-4
    _, wide = one_step(make_trainer, copy.deepcopy(reward_model).double(), eta=eta)
    _, log = one_step(make_trainer, copy.deepcopy(reward_model), eta=eta, bf16=True)
    assert log["meta_influence"] == pytest.approx(wide["meta_influence"], rel=0.3)


def test_midpoint_equals_in_place_in_fp32(make_trainer, reward_model):
    shifted, log = one_step(make_trainer, copy.deepcopy(reward_model), eta=0.05)
    without, _ = one_step(make_trainer, copy.deepcopy(reward_model), eta=0.0)
    for curvature in ("exact", "finite_difference"):
        ours, our_log = one_step(
            make_trainer,
            copy.deepcopy(reward_model),
            eta=0.05,
            meta_shift="midpoint",
            meta_curvature=curvature,
        )
        truth = flat(shifted) - flat(without)
        error = float((flat(ours) - flat(shifted)).norm() / truth.norm())
        assert error < 0.02, curvature
        assert our_log["meta_influence"] == pytest.approx(log["meta_influence"], rel=0.02)


def test_accumulated_midpoints_are_one_batchs(make_trainer, reward_model):
    results = []
    for batch, accumulation in ((12, 1), (4, 3)):
        model = copy.deepcopy(reward_model)
        make_trainer(
            model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            meta_step="normalized",
            meta_learning_rate=0.1,
            meta_batch_size=6,
            meta_shift="midpoint",
        ).train()
        results.append(model)
    same_weights(*results, rtol=1e-4, atol=1e-6)


def test_auto_knows_what_is_computed_in(make_trainer, reward_model):
    assert make_trainer(copy.deepcopy(reward_model)).meta_shift == "in_place"
    assert make_trainer(copy.deepcopy(reward_model).bfloat16()).meta_shift == "midpoint"
    forced = make_trainer(copy.deepcopy(reward_model).bfloat16(), meta_shift="in_place")
    assert forced.meta_shift == "in_place"


@pytest.mark.parametrize("field", ["meta_order", "meta_shift", "meta_curvature"])
def test_unknown_choices_are_refused(field, options):
    with pytest.raises(UserError, match=field):
        MetaRMConfig(**{**options, field: "other"})


def test_exact_order_with_eta_zero_is_the_plain_trainer(make_trainer, reward_model):
    plain, meta = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    make_trainer(plain, RewardTrainer, max_steps=2).train()
    make_trainer(meta, max_steps=2, meta_learning_rate=0.0, meta_order="exact").train()
    same_weights(plain, meta, rtol=0, atol=1e-7)


def test_differences_are_of_the_smooth_part_of_the_difference_loss(make_trainer, tokenizer):
    """A new head: rewards so close that steps cross hundreds of kinks."""
    config = llama_config(hidden_size=16, intermediate_size=32, num_labels=1)
    words = ["cat", "dog", "bird", "red", "small"]
    groups = [{"prompt": f"the {w}", "responses": [f" {w} {x}" for x in words]} for w in words]
    found = {}
    for curvature in ("exact", "finite_difference"):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        options = {"meta_order": "exact", "meta_curvature": curvature, "meta": groups}
        gradient, log = one_step(make_trainer, model, eta=0.3, **options)
        found[curvature] = flat(gradient)
        assert log["meta_second_order"] > 0.05
    change = found["finite_difference"] - found["exact"]
    assert float(change.norm() / found["exact"].norm()) < 1e-4


def test_differences_across_jumps_of_a_gradient_are_refused(make_trainer, tokenizer):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    config = OPTConfig(
        vocab_size=len(tokenizer), ffn_dim=8, word_embed_proj_dim=8, num_labels=1, **sizes
    )
    with pytest.raises(UserError, match=r"ReLU, whose gradient jumps.*use meta_curvature='exact'"):
        make_trainer(
            OPTForSequenceClassification(config),
            meta_order="exact",
            meta_curvature="finite_difference",
        )
