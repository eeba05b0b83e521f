"""Every pair of an optimizer step counts once, however its micro-batches are cut."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardConfig, RewardTrainer


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


def run(model, rows, options, tokenizer, *, groups=None, **config):
    """The gradients and the logs of one epoch."""
    config = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, **config}
    gradients = Gradients()
    data = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    extra = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [gradients]}
    model = copy.deepcopy(model).double()
    if groups is None:
        trainer = RewardTrainer(model, RewardConfig(**{**options, **config}), **extra)
    else:
        args = MetaRMConfig(**{**options, **config})
        trainer = MetaRMTrainer(model, args, meta_dataset=groups, **extra)
    trainer.train()
    return gradients.found, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["plain", "margin", "centred", "sgd", "midpoint", "second order"])
@pytest.mark.parametrize(("micro", "steps"), [(4, 2), (3, 2), (2, 3), (1, 5)])
def test_a_step_in_parts_is_the_step(
    reward_model, pairs, groups, options, tokenizer, kind, micro, steps
):
    rows = [dict(row) for row in pairs[:5]]
    if kind == "margin":
        rows = [{**row, "margin": 0.5 * k} for k, row in enumerate(rows)]
    config = {"center_rewards_coefficient": 0.3} if kind == "centred" else {}
    meta = groups if kind in ("sgd", "midpoint", "second order") else None
    if meta is not None:
        config = {"meta_learning_rate": 2.0, "meta_batch_size": 3}
        config["meta_shift"] = "midpoint" if kind == "midpoint" else "in_place"
        config["meta_order"] = "exact" if kind == "second order" else "first"
    (whole, [log]), (parts, [parts_log]) = (
        run(
            reward_model,
            rows,
            options,
            tokenizer,
            groups=meta,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            **config,
        )
        for size, accumulated in ((5, 1), (micro, steps))
    )
    assert len(parts) == 1
    # Norms work in fp32: a bit may flip with the rows of a batch.
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-6 * float(whole[0].norm()))
    for name in ("loss", "accuracy", "margin", "mean_reward", "auc", "num_tokens"):
        assert parts_log[name] == pytest.approx(log[name], abs=1e-6), name


def test_the_logged_loss_is_the_mean_over_pairs(reward_model, pairs, options, tokenizer):
    """By hand: 5 pairs in steps of 2 x 2 and 1, of a model that stays as it is."""
    size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    _, single = run(reward_model, pairs[:5], options, tokenizer, **size)
    expected = sum(log["loss"] for log in single) / 5
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, [first, second] = run(reward_model, pairs[:5], options, tokenizer, **size)
    assert (4 * first["loss"] + second["loss"]) / 5 == pytest.approx(expected, abs=1e-6)
    _, [both] = run(reward_model, pairs[:5], options, tokenizer, **size, logging_steps=2)
    assert both["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [None, "in_place", "midpoint"])
def test_a_streamed_epoch_that_ends_within_a_step(
    reward_model, pairs, groups, options, tokenizer, shift
):
    """5 pairs, 4 a step: the fifth waits for the next epoch's first four."""
    rows = [dict(row) for row in pairs[:5]]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    meta = {}
    if shift is not None:
        meta = {"groups": groups, "meta_learning_rate": 2.0, "meta_batch_size": len(groups)}
        meta["meta_shift"] = shift

    def train(rows, micro, accumulated, steps):
        size = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
        return run(reward_model, rows, options, tokenizer, **size, **meta, max_steps=steps)

    streamed, logs = train(stream, 2, 2, 2)
    for step, chosen in enumerate([rows[:4], rows]):
        [gradient], [log] = train(chosen, len(chosen), 1, 1)
        close = {"rtol": 0, "atol": 1e-6 * float(gradient.norm())}
        torch.testing.assert_close(streamed[step], gradient, **close)
        assert logs[step]["loss"] == pytest.approx(log["loss"], abs=1e-6)
    if shift is not None:  # measured on the first pairs after every look ahead
        of_two, of_one = (
            train(chosen, len(chosen), 1, 1)[1][0]["meta_influence"]
            for chosen in (rows[:2], rows[4:])
        )
        found = [log["meta_influence"] for log in logs]
        assert found == pytest.approx([of_two, (of_one + of_two) / 2], rel=1e-5)
