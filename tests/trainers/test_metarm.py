"""MetaRMTrainer: one optimizer step equals Algorithm 1 computed by plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from transformers import TrainerCallback

from shiftrm.errors import UserError
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.trainers.conftest import encoded, logs_of, same_weights


def plain_reward(model, parameters, sequence):
    """One sequence alone, no padding, transformers' own pooling: the oracle's reward."""
    ids = torch.tensor([sequence])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return torch.func.functional_call(model, parameters, (), call).logits[0, 0]


def preference_loss(model, parameters, rows):
    return torch.stack(
        [
            -F.logsigmoid(
                plain_reward(model, parameters, row["chosen_ids"])
                - plain_reward(model, parameters, row["rejected_ids"])
            )
            for row in rows
        ]
    ).mean()


def difference_objective(model, parameters, groups):
    """Eq. 2 with Python loops."""
    values = []
    for group in groups:
        rewards = [plain_reward(model, parameters, sequence) for sequence in group]
        K = len(rewards)
        parts = [torch.sigmoid((rewards[i] - rewards[j]).abs()) for i in range(K) for j in range(i)]
        values.append(2 / K**2 * sum(parts))
    return torch.stack(values).mean()


def gradient(function, model, parameters, data):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in parameters.items()}
    grads = torch.autograd.grad(
        function(model, leaves, data), list(leaves.values()), materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def direction(grads, rule):
    if rule == "normalized":
        size = torch.sqrt(sum(g.pow(2).sum() for g in grads.values()))
        return {k: g / size for k, g in grads.items()}
    if rule == "adaptive":
        return {k: g / (g.abs() + 1e-8) for k, g in grads.items()}
    return grads


def algorithm_1(model, rows, groups, *, eta, alpha, rule, objective=difference_objective):
    theta = {k: v.detach() for k, v in model.named_parameters()}
    G = direction(gradient(objective, model, theta, groups), rule)
    shifted = {k: theta[k] + eta * G[k] for k in theta}
    L = gradient(preference_loss, model, shifted, rows)
    return {k: theta[k] - alpha * L[k] for k in theta}


@pytest.mark.parametrize("rule", ["sgd", "normalized", "adaptive"])
@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (4, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_one_step_is_algorithm_1(
    make_trainer, reward_model, groups, tokenizer, rule, batch, accumulation, dtype, tolerance
):
    model = reward_model.to(dtype)
    original = copy.deepcopy(model)
    eta = {"sgd": 3.0, "normalized": 0.3, "adaptive": 0.01}[rule]
    trainer = make_trainer(
        model,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        meta_step=rule,
        meta_learning_rate=eta,
        meta_batch_size=len(groups),  # every group once: the order does not matter
        shared_prefixes=dtype == torch.float32,  # RMSNorm works in fp32: a bit may flip with rows
    )
    rows = list(trainer.train_dataset)
    assert len(rows) == batch * accumulation
    trainer.train()
    tokens = encoded(tokenizer, groups)
    expected = algorithm_1(original, rows, tokens, eta=eta, alpha=0.1, rule=rule)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)
    moved = max(
        float((v - original.get_parameter(k)).detach().abs().max())
        for k, v in model.named_parameters()
    )
    assert moved > 1e-3, "the test would pass if nothing happened"
    vanilla = algorithm_1(original, rows, tokens, eta=0.0, alpha=0.1, rule=rule)
    difference = max(float((vanilla[k] - expected[k]).abs().max()) for k in vanilla)
    assert difference > 100 * tolerance, "the meta step must matter in this test"


OWN_OBJECTIVE = """
def variance(rewards_BK, *, mask):
    size_B = mask.sum(dim=1)
    mean_B = (rewards_BK * mask).sum(dim=1) / size_B
    return (((rewards_BK - mean_B[:, None]) * mask) ** 2).sum(dim=1) / size_B
"""


def variance_objective(model, parameters, groups):
    values = []
    for group in groups:
        rewards = torch.stack([plain_reward(model, parameters, sequence) for sequence in group])
        values.append(rewards.var(unbiased=False))
    return torch.stack(values).mean()


def test_an_objective_from_outside_the_package(
    make_trainer, reward_model, groups, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "own_objectives.py").write_text(OWN_OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    model = reward_model.double()
    original = copy.deepcopy(model)
    trainer = make_trainer(
        model,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        meta_objective="own_objectives:variance",
        meta_step="normalized",
        meta_learning_rate=0.3,
        meta_batch_size=len(groups),
        shared_prefixes=False,
    )
    rows = list(trainer.train_dataset)
    trainer.train()
    options = {"eta": 0.3, "alpha": 0.1, "rule": "normalized"}
    tokens = encoded(tokenizer, groups)
    expected = algorithm_1(original, rows, tokens, objective=variance_objective, **options)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)
    of_difference = algorithm_1(original, rows, tokens, **options)
    assert max(float((of_difference[k] - expected[k]).abs().max()) for k in expected) > 1e-5


def test_an_unknown_objective_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"meta objective 'diference'; did you mean 'difference'"):
        MetaRMConfig(output_dir=str(tmp_path), meta_objective="diference")


def test_an_objective_must_give_one_value_a_group(make_trainer, reward_model, monkeypatch):
    trainer = make_trainer(reward_model)
    monkeypatch.setattr(trainer, "_meta_objective", lambda rewards, mask: rewards.mean())
    with pytest.raises(UserError, match="expected one value a group"):
        trainer.train()


def test_deploy_adapted_is_one_further_ascent(make_trainer, reward_model, groups, tokenizer):
    reward_model = reward_model.double()
    config = {
        "meta_step": "normalized",
        "meta_learning_rate": 0.3,
        "meta_batch_size": len(groups),
        "max_steps": 3,
        "shared_prefixes": False,
    }
    base, adapted = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    make_trainer(base, deploy="base", **config).train()
    make_trainer(adapted, deploy="adapted", **config).train()
    theta = {k: v.detach() for k, v in base.named_parameters()}
    G = direction(
        gradient(difference_objective, base, theta, encoded(tokenizer, groups)), "normalized"
    )
    for name, value in adapted.named_parameters():
        torch.testing.assert_close(value, theta[name] + 0.3 * G[name], rtol=0, atol=1e-10)


def test_zero_meta_learning_rate_is_the_plain_trainer_bit_for_bit(make_trainer, reward_model):
    config = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
    }
    plain, meta = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    make_trainer(plain, RewardTrainer, **config).train()
    trainer = make_trainer(meta, meta_learning_rate=0.0, deploy="adapted", **config)
    trainer.train()
    same_weights(plain, meta)
    assert all(log["meta_influence"] == 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("shift", ["in_place", "midpoint"])
@pytest.mark.parametrize("bf16", [False, True])
def test_influence_compares_gradients_of_one_function(make_trainer, reward_model, shift, bf16):
    """A model that draws random numbers: with eta 0 nothing changes, and with little, little."""

    class Noisy(MetaRMTrainer):
        def _pair_losses(self, model, inputs):
            losses, *rest = super()._pair_losses(model, inputs)
            return losses * torch.rand_like(losses), *rest

    def influences(eta):
        model = copy.deepcopy(reward_model)
        config = {"max_steps": 2, "learning_rate": 0.0, "meta_step": "normalized", "bf16": bf16}
        config |= {"meta_shift": shift, "meta_curvature": "finite_difference"}
        trainer = make_trainer(model, Noisy, meta_learning_rate=eta, **config)
        trainer.train()
        return [log["meta_influence"] for log in trainer.state.log_history if "loss" in log]

    assert influences(0.0) == [0.0, 0.0]
    assert 0 < max(influences(1e-4)) < 0.02


def test_dropout_is_off_during_both_gradients(make_trainer, groups):
    """attention_dropout is a number on the attention module, which TRL's switch does not reach."""
    from transformers import LlamaForSequenceClassification

    from tests.conftest import llama_config

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1, attention_dropout=0.5))
    runs = []
    for seed in (0, 1):
        copied = copy.deepcopy(model)
        trainer = make_trainer(copied, meta_batch_size=len(groups), per_device_train_batch_size=12)
        torch.manual_seed(seed)
        trainer.train()
        runs.append(copied)
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_parameters_return_when_the_loss_fails(make_trainer, reward_model, monkeypatch):
    before = copy.deepcopy(reward_model)
    trainer = make_trainer(reward_model, meta_learning_rate=0.5, meta_step="normalized")

    def failing(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer._statistics, "add", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    same_weights(before, reward_model)


def test_checkpoints_hold_theta_not_theta_prime(make_trainer, reward_model, tmp_path):
    """A checkpoint written between steps equals the parameters the next step starts from."""
    from transformers import AutoModelForSequenceClassification

    config = {"meta_step": "normalized", "meta_learning_rate": 0.5, "max_steps": 2}
    straight, saved = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    make_trainer(straight, **config).train()
    make_trainer(saved, save_strategy="steps", save_steps=2, **config).train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-2")
    same_weights(straight, loaded)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("rule", ["normalized", "adaptive", "effect"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resuming_is_exact(make_trainer, reward_model, tmp_path, rule, stop):
    """Stopped and resumed from the checkpoint: the same losses and weights as a straight run.

    Step 5 is the last: its checkpoint is of theta, and only the deployed meta step is left to do.
    """
    config = {
        "meta_step": rule,
        "meta_learning_rate": 0.05,
        "meta_batch_size": 4,
        "deploy": "adapted",
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    straight, resumed = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    first = make_trainer(straight, output_dir=str(tmp_path / "straight"), **config)
    first.train()
    stopped = make_trainer(
        copy.deepcopy(reward_model), output_dir=str(tmp_path / "resumed"), **config
    )
    stopped.add_callback(StopAt(stop))
    stopped.train()
    second = make_trainer(resumed, output_dir=str(tmp_path / "resumed"), **config)
    second.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{stop}"))
    same_weights(straight, resumed)
    losses = [[log["loss"] for log in logs_of(t)] for t in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_logs_say_what_the_meta_step_did(make_trainer, reward_model):
    trainer = make_trainer(
        reward_model, meta_step="normalized", meta_learning_rate=0.3, max_steps=3
    )
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3
    for log in logs:
        assert log["meta_objective_after"] > log["meta_objective"]  # it is an ascent
        assert 0 < log["meta_influence"] < 10
        assert log["meta_gradient_norm"] > 0
        assert log["meta_skipped"] == 0


def test_non_finite_meta_gradient_is_skipped_and_counted(make_trainer, reward_model, monkeypatch):
    plain, meta = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    make_trainer(plain, RewardTrainer, max_steps=2).train()
    trainer = make_trainer(meta, max_steps=2, meta_learning_rate=0.5)
    monkeypatch.setattr(
        trainer, "_meta_objective", lambda rewards, mask: rewards.sum(1) * float("nan")
    )
    trainer.train()
    assert [log["meta_skipped"] for log in trainer.state.log_history if "loss" in log] == [1, 1]
    same_weights(plain, meta)


def test_every_group_is_seen_once_an_epoch(make_trainer, reward_model):
    trainer = make_trainer(reward_model, meta_batch_size=2)
    seen = []
    for step in range(3):
        seen += trainer._groups.batch(step, 2)
    assert sorted(map(str, seen)) == sorted(map(str, trainer._groups.groups))


@pytest.mark.parametrize(
    ("preset", "meta_step", "eta", "deploy"),
    [
        ("paper", "sgd", 1e-4, "base"),
        ("scale_free", "normalized", 0.5, "adapted"),
        ("adaptive", "adaptive", 1e-4, "base"),
    ],
)
def test_presets(preset, meta_step, eta, deploy, tmp_path):
    config = MetaRMConfig(str(tmp_path), preset=preset, learning_rate=1e-4, use_cpu=True)
    assert (config.meta_step, config.meta_learning_rate, config.deploy) == (meta_step, eta, deploy)


def test_a_preset_gives_way_to_an_explicit_value(tmp_path):
    config = MetaRMConfig(str(tmp_path), preset="scale_free", meta_learning_rate=0.2, use_cpu=True)
    assert (config.meta_learning_rate, config.deploy) == (0.2, "adapted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "scalefree"}, "did you mean 'scale_free'"),
        ({"meta_step": "normalised"}, "did you mean 'normalized'"),
        ({"deploy": "adapt"}, "did you mean 'adapted'"),
        ({"meta_learning_rate": -1.0}, "must be >= 0"),
        ({"meta_batch_size": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        MetaRMConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"meta": None}, "meta_dataset is None"),
        ({"meta": [{"prompt": "a"}]}, "meta_dataset, row 0: column 'responses' is missing"),
        (
            {"meta": [{"prompt": "a", "responses": [" red" * 30] * 2}], "max_length": 20},
            "no group of two different responses that are not longer than max_length",
        ),
        (
            {"meta": [{"prompt": "", "responses": ["", " a"], "finished": [False, True]}]},
            "row 0: a response has no tokens",
        ),
        ({"disable_dropout": False}, "dropout"),
        ({"fp16": True}, "bf16"),
        ({"neftune_noise_alpha": 5.0}, "neftune"),
        (
            {
                "preset": "scale_free",
                "load_best_model_at_end": True,
                "eval_steps": 1,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "save_steps": 1,
            },
            "load_best_model_at_end",
        ),
    ],
)
def test_what_the_meta_step_cannot_use_is_refused(make_trainer, reward_model, given, message):
    with pytest.raises(UserError, match=message):
        make_trainer(reward_model, **given)


def test_a_group_of_one_is_refused(make_trainer, reward_model, groups):
    with pytest.raises(UserError, match="meta_dataset, row 6: the group has 1 response"):
        make_trainer(reward_model, meta=[*groups, {"prompt": "a", "responses": [" red"]}])


def test_a_plain_reward_config_is_refused(make_trainer, reward_model):
    with pytest.raises(UserError, match="takes a MetaRMConfig"):
        make_trainer(reward_model, config_class=trl.RewardConfig)


def test_streamed_epochs_are_saved_and_evaluated_at_theta(make_trainer, reward_model, pairs):
    """An epoch of a stream can end in the middle of an accumulation."""
    shifted, leaked = [], []

    class Watched(MetaRMTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            shifted.append(self._shift is not None)

        def _objective_gradient(self, model):
            before = [p.grad for p in self._trainable()]
            result = super()._objective_gradient(model)
            after = [p.grad for p in self._trainable()]
            leaked.append(any(a is not b for a, b in zip(before, after, strict=True)))
            return result

    trainer = make_trainer(
        reward_model,
        Watched,
        train=Dataset.from_list(pairs).to_iterable_dataset(),
        evaluation=pairs,
        preset="scale_free",
        max_steps=4,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
    )
    trainer.train()
    assert len(shifted) > 4, "epochs ended between steps"
    assert not any(shifted)
    assert not any(leaked), "gradients of the pairs stay theirs"


@pytest.mark.parametrize("shift", ["in_place", "midpoint"])
def test_a_step_over_two_streamed_epochs_counts_once_in_the_moments(
    make_trainer, reward_model, pairs, groups, shift
):
    """The fifth pair waits for the next epoch: 2 steps, as of pairs that are not streamed."""
    found = []
    for train in (Dataset.from_list(pairs[:5]).to_iterable_dataset(), pairs):
        trainer = make_trainer(
            copy.deepcopy(reward_model).double(), train=train, max_steps=2, preset="adaptive",
            meta_shift=shift, meta_learning_rate=0.01, meta_batch_size=len(groups),
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        found.append(trainer._adaptive_state)
    assert [state.steps for state in found] == [2, 2]
    for name in ("first", "second"):
        for ours, plain in zip(*(getattr(state, name) for state in found), strict=True):
            torch.testing.assert_close(ours, plain)


def test_truncated_sides_are_left_open(make_trainer, reward_model, tokenizer, pairs):
    row = {**pairs[0], "chosen_finished": False, "rejected_finished": True}
    [encoded] = make_trainer(reward_model, RewardTrainer, train=[row]).train_dataset
    assert encoded["chosen_ids"][-1] != tokenizer.eos_token_id
    assert encoded["rejected_ids"][-1] == tokenizer.eos_token_id


def test_trains_by_name_like_trl(make_trainer, reward_model, tokenizer, tmp_path):
    """A folder name instead of a model, and a result that loads through transformers alone."""
    reward_model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = make_trainer(str(tmp_path / "start"), preset="scale_free", max_steps=1)
    assert isinstance(trainer, MetaRMTrainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    from shiftrm.models.scoring import Scorer

    scorer = Scorer.from_pretrained(tmp_path / "final")
    from_memory = Scorer(trainer.model, tokenizer)
    rows = (["the red", "a"], [" cat runs", " dog"])
    assert scorer(*rows) == pytest.approx(from_memory(*rows), abs=1e-6)


def test_groups_of_equal_responses_are_dropped_and_counted(make_trainer, reward_model, caplog):
    same = {"prompt": "a dog", "responses": [" runs"] * 3}
    mixed = {"prompt": "a dog", "responses": [" runs", " runs", " sits"]}
    trainer = make_trainer(reward_model, meta=[same, mixed, same])
    assert len(trainer._groups.groups) == 1
    assert "2 groups of equal responses" in caplog.text
    with pytest.raises(UserError, match="no group of two different responses"):
        make_trainer(reward_model, meta=[same])
