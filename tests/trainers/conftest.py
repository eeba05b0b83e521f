"""One training run on the tiny reward model, with everything incidental switched off."""

import pytest
import torch
from datasets import Dataset

from shiftrm.models.rendering import encode
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
    }


@pytest.fixture
def make_trainer(tokenizer, pairs, groups, options):
    """make(model, cls=MetaRMTrainer, **config) -> trainer; `more` are further arguments of cls."""

    def make(
        model, cls=MetaRMTrainer, *positional, train=pairs, meta=groups, evaluation=None,
        config_class=MetaRMConfig, more=None, **config,
    ):  # fmt: skip
        arguments = {"train_dataset": table(train), "processing_class": tokenizer}
        if issubclass(cls, MetaRMTrainer):
            arguments["meta_dataset"] = meta
        if evaluation is not None:
            arguments["eval_dataset"] = table(evaluation)
        args = config_class(**{**options, **config})
        return cls(model, args, *positional, **{**arguments, **(more or {})})

    return make


def table(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def same_weights(one, other, **tolerance):
    """Equal bit for bit, or as closely as the tolerance of `torch.testing.assert_close`."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def encoded(tokenizer, groups):
    """The token ids of every response, by group."""
    return [[encode(tokenizer, g["prompt"], r) for r in g["responses"]] for g in groups]


def logs_of(trainer, key="loss"):
    """The entries of the log that have the key."""
    return [log for log in trainer.state.log_history if key in log]
