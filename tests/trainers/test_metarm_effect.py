"""meta_step="effect": the trainer's step against plain autograd, and what must not change it."""

import copy
import logging
import math
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.trainers.metarm import MetaRMConfig
from shiftrm.trainers.reward import RewardTrainer
from tests.conftest import llama_config
from tests.trainers.conftest import encoded, logs_of, same_weights
from tests.trainers.test_metarm import algorithm_1, plain_reward, preference_loss

BY_EFFECT = {"meta_step": "effect", "meta_batch_size": 6}


def reward_lists(model, parameters, groups):
    with torch.no_grad():
        return [[float(plain_reward(model, parameters, s)) for s in group] for group in groups]


def rms_difference(rewards):
    """Mean over groups of the mean squared difference between two of them, then the root."""
    squares = [
        sum((a - b) ** 2 for a, b in combinations(group, 2)) / math.comb(len(group), 2)
        for group in rewards
    ]
    return math.sqrt(sum(squares) / len(squares))


def moved(model, eta, gradient):
    return {k: v.detach() + eta * gradient[k] for k, v in model.named_parameters()}


def difference_direction(model, groups):
    """grad J / ||grad J||, from Algorithm 1's update with L replaced by nothing."""
    from tests.trainers.test_metarm import difference_objective, direction, gradient

    theta = {k: v.detach() for k, v in model.named_parameters()}
    return direction(gradient(difference_objective, model, theta, groups), "normalized")


def test_one_step_is_algorithm_1_with_the_length_that_has_the_effect(
    make_trainer, reward_model, groups, tokenizer
):
    model = reward_model.double()
    original = copy.deepcopy(model)
    trainer = make_trainer(
        model,
        per_device_train_batch_size=12,
        shared_prefixes=False,
        meta_loss_rise=1e3,
        **BY_EFFECT,
    )
    rows, tokens = list(trainer.train_dataset), encoded(tokenizer, groups)
    trainer.train()
    [log] = logs_of(trainer)
    rho = trainer._last_length
    assert log["meta_rho"] == pytest.approx(rho)
    expected = algorithm_1(original, rows, tokens, eta=rho, alpha=0.1, rule="normalized")
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)

    theta = dict(original.named_parameters())
    shifted = moved(original, rho, difference_direction(original, tokens))
    before, after = (rms_difference(reward_lists(original, p, tokens)) for p in (theta, shifted))
    assert 1.45 <= after / before <= 1.55
    assert log["meta_growth"] == pytest.approx(after / before, rel=1e-6)
    old, new = (float(preference_loss(original, p, rows).detach()) for p in (theta, shifted))
    assert log["meta_loss_rise"] == pytest.approx(new / old - 1, rel=1e-5)


def test_the_loss_on_pairs_limits_the_step(make_trainer, reward_model, pairs):
    """The labels say the opposite of the model, so wider differences cost."""
    for pair in pairs:
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    trainer = make_trainer(reward_model, train=pairs, meta_loss_rise=2e-3, **BY_EFFECT)
    trainer.train()
    [log] = logs_of(trainer)
    assert 1.6e-3 <= log["meta_loss_rise"] <= 2e-3
    assert 1.02 < log["meta_growth"] < 1.4


def larger(reward_model):
    """Fifty times as many parameters."""
    torch.manual_seed(1)
    config = llama_config(
        num_labels=1,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    return LlamaForSequenceClassification(config)


def louder(reward_model):
    reward_model.score.weight.data.mul_(10)
    return reward_model


def larger_weights(reward_model):
    """All matrices three times as large."""
    for p in reward_model.parameters():
        if p.dim() == 2:
            p.data.mul_(3)
    return reward_model


@pytest.mark.parametrize("of", [lambda model: model, larger, louder, larger_weights])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_same_setting_has_the_same_effect_on_any_model(
    make_trainer, reward_model, of, per_layer
):
    trainer = make_trainer(
        of(reward_model), max_steps=3, meta_per_layer=per_layer, meta_loss_rise=1e3, **BY_EFFECT
    )
    trainer.train()
    for log in logs_of(trainer):
        assert 1.45 <= log["meta_growth"] <= 1.55
        assert log["meta_trials"] <= 5


def test_a_louder_model_takes_the_same_relative_step(make_trainer, reward_model):
    """With the head ten times as large, so that rewards are, the head's step is about that, too."""
    lengths = []
    for scale in (1e-3, 1e-2):  # differences far below 1, where J is proportional to their size
        model = copy.deepcopy(reward_model)
        model.score.weight.data.mul_(scale)
        for name, p in model.named_parameters():
            p.requires_grad_(name == "score.weight")
        trainer = make_trainer(model, meta_loss_rise=1e3, **BY_EFFECT)
        trainer.train()
        lengths.append(trainer._last_length)
    assert lengths[1] == pytest.approx(10 * lengths[0], rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"meta_per_layer": True},
        {"meta_order": "exact"},
        {"meta_order": "exact", "meta_per_layer": True},
        {"meta_shift": "midpoint"},
        {"meta_direction": "random"},
        {"meta_objective": "ordered"},
        {"gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_a_step_is_the_normalised_step_of_that_length(make_trainer, reward_model, config):
    """Also the exact order: the length counts as a constant."""
    by_effect, by_length = (copy.deepcopy(reward_model) for _ in range(2))
    first = make_trainer(by_effect, deploy="base", **BY_EFFECT, **config)
    first.train()
    options = {**BY_EFFECT, "meta_step": "normalized", "meta_learning_rate": first._last_length}
    make_trainer(by_length, deploy="base", **options, **config).train()
    same_weights(by_effect, by_length)
    assert first._last_length > 0


def through_the_step(model, rows, groups, eta):
    """grad of L(theta + eta d), with d of meta_per_layer and the weights' norms as constants."""
    from tests.trainers.test_metarm import difference_objective

    theta = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    J = difference_objective(model, theta, groups)
    gradients = torch.autograd.grad(J, list(theta.values()), create_graph=True)
    scaled = {}
    for (k, w), g in zip(theta.items(), gradients, strict=True):
        used = (g != 0).double()
        if not used.any():
            scaled[k] = 0.0 * g
            continue
        size = max((w.detach() * used).norm(), 1e-3 * used.norm())
        scaled[k] = size * g / g.norm()
    length = torch.sqrt(sum(g.pow(2).sum() for g in scaled.values()))
    shifted = {k: theta[k] + eta * g / length for k, g in scaled.items()}
    loss = preference_loss(model, shifted, rows)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def test_exact_order_per_layer_equals_autograd(make_trainer, reward_model, groups, tokenizer):
    from tests.core.meta_models import norms_in_fp64

    model = reward_model.double()
    model.config._attn_implementation = "eager"  # differentiated twice
    original = copy.deepcopy(model)
    with norms_in_fp64():
        trainer = make_trainer(
            model,
            per_device_train_batch_size=12,
            shared_prefixes=False,
            meta_per_layer=True,
            meta_order="exact",
            **BY_EFFECT,
        )
        rows = list(trainer.train_dataset)
        trainer.train()
        expected = through_the_step(
            original, rows, encoded(tokenizer, groups), trainer._last_length
        )
    for name, value in model.named_parameters():
        step = (original.get_parameter(name) - value).detach() / 0.1
        torch.testing.assert_close(step, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_the_adapted_model_has_the_effect_too(make_trainer, reward_model, groups, tokenizer):
    base, adapted = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    config = {**BY_EFFECT, "max_steps": 2, "meta_loss_rise": 1e3}
    make_trainer(base, deploy="base", **config).train()
    trainer = make_trainer(adapted, deploy="adapted", **config)
    trainer.train()
    tokens = encoded(tokenizer, groups)
    before, after = (
        rms_difference(reward_lists(m, dict(m.named_parameters()), tokens)) for m in (base, adapted)
    )
    assert 1.44 <= after / before <= 1.56
    [log] = logs_of(trainer, "deploy_rho")
    assert log["deploy_growth"] == pytest.approx(after / before, rel=1e-3)
    assert log["deploy_objective_after"] > log["deploy_objective_before"]


@pytest.mark.parametrize("head", [0.0, 1e6])
def test_where_spread_answers_to_no_length_it_is_plain_training(make_trainer, reward_model, head):
    """Equal rewards, and rewards so far apart that grad J is 0 in fp32, have no direction."""
    with torch.no_grad():
        reward_model.score.weight.mul_(head)
    plain, found = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    steps = {"max_steps": 1 if head == 0 else 10, "learning_rate": 1e-4}
    make_trainer(plain, RewardTrainer, **steps).train()
    trainer = make_trainer(found, deploy="base", **BY_EFFECT, **steps)
    trainer.train()
    assert all(log["meta_rho"] == 0.0 for log in logs_of(trainer, "meta_rho"))
    same_weights(plain, found)


def test_the_length_of_the_last_step_is_in_the_checkpoint(make_trainer, reward_model, tmp_path):
    trainer = make_trainer(
        reward_model, max_steps=2, save_strategy="steps", save_steps=2, deploy="base", **BY_EFFECT
    )
    trainer.train()
    kept = load_file(tmp_path / "out" / "checkpoint-2" / "meta_state.safetensors")
    assert kept["length"].tolist() == trainer._last_length


def test_ordered_groups_are_measured_by_the_change_of_differences(
    make_trainer, reward_model, groups, tokenizer
):
    model = reward_model.double()
    original = copy.deepcopy(model)
    trainer = make_trainer(
        model, learning_rate=0.0, shared_prefixes=False, meta_objective="ordered",
        meta_loss_rise=1e3, deploy="adapted", **BY_EFFECT,
    )  # fmt: skip
    trainer.train()
    tokens = encoded(tokenizer, groups)
    before, after = (reward_lists(m, dict(m.named_parameters()), tokens) for m in (original, model))
    change = [[b - a for a, b in zip(*two, strict=True)] for two in zip(before, after, strict=True)]
    assert 0.45 <= rms_difference(change) / rms_difference(before) <= 0.55


def test_the_random_control_moves_every_layer_as_far(make_trainer, reward_model):
    weights = []
    for direction in ("gradient", "random"):
        model = copy.deepcopy(reward_model)
        trainer = make_trainer(
            model, learning_rate=0.0, deploy="adapted", meta_direction=direction, **BY_EFFECT
        )
        trainer.train()
        [log] = logs_of(trainer, "deploy_rho")
        assert ("deploy_growth" in log) == (direction == "gradient"), "it is that of another step"
        changes = zip(model.parameters(), reward_model.parameters(), strict=True)
        weights.append([(a - b).detach() for a, b in changes])
    for along, anywhere in zip(*weights, strict=True):
        assert float(anywhere.norm()) == pytest.approx(float(along.norm()), rel=1e-3, abs=1e-7)
    cosine = sum(float((a * b).sum()) for a, b in zip(*weights, strict=True))
    assert abs(cosine) < 0.3 * sum(float(a.square().sum()) for a in weights[0])


def test_nothing_to_learn_from_equal_rewards(make_trainer, reward_model):
    """A score head of zeros: grad J is zero, and there is no length to choose."""
    reward_model.score.weight.data.zero_()
    trainer = make_trainer(reward_model, **BY_EFFECT)
    trainer.train()
    [log] = logs_of(trainer)
    assert log["meta_influence"] == 0
    assert log["meta_growth"] == 1


def test_bf16_weights_are_refused(make_trainer, reward_model):
    with pytest.raises(UserError, match=r"meta_step='effect'.*load the model with dtype=float32"):
        make_trainer(reward_model.bfloat16(), **BY_EFFECT)


def test_fp32_weights_under_autocast_are_measured(make_trainer, reward_model):
    trainer = make_trainer(reward_model, bf16=True, meta_loss_rise=1e3, **BY_EFFECT)
    trainer.train()
    [log] = logs_of(trainer)
    assert 1.45 <= log["meta_growth"] <= 1.55


def test_an_eta_that_is_not_used_is_said(make_trainer, reward_model, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(copy.deepcopy(reward_model), preset="by_effect")
        make_trainer(copy.deepcopy(reward_model), preset="scale_free", meta_step="effect")
    assert "meta_learning_rate is not used" not in caplog.text
    with caplog.at_level(logging.WARNING):
        make_trainer(reward_model, preset="by_effect", meta_learning_rate=0.5)
    assert caplog.text.count("meta_learning_rate is not used with meta_step='effect'") == 1


def test_the_preset(tmp_path):
    config = MetaRMConfig(str(tmp_path), preset="by_effect", use_cpu=True)
    assert (config.meta_step, config.deploy) == ("effect", "adapted")
    assert (config.meta_effect, config.meta_loss_rise) == (1.5, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_step": "efect"}, "did you mean 'effect'"),
        ({"meta_effect": 1.0}, "meta_effect is 1.0; it must be above 1"),
        ({"meta_loss_rise": 0.0}, "meta_loss_rise is 0.0; it must be above 0"),
        ({"meta_per_layer": True}, "meta_step=sgd has no length to divide"),
        ({"meta_direction": "randon"}, "did you mean 'random'"),
        ({"meta_direction": "random", "meta_order": "exact"}, "has no derivative"),
    ],
)
def test_bad_settings_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        MetaRMConfig(str(tmp_path), use_cpu=True, **options)
