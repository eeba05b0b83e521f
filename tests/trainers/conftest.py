"""One training run on the tiny reward model, with everything incidental switched off."""

import pytest
from datasets import Dataset

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
    """make(model, cls=MetaRMTrainer, **config) -> trainer"""

    def make(model, cls=MetaRMTrainer, *, train=pairs, meta=groups, evaluation=None, **config):
        args = MetaRMConfig(**{**options, **config})
        extra = {"meta_dataset": meta} if cls is MetaRMTrainer else {}
        return cls(
            model,
            args,
            train_dataset=Dataset.from_list(train),
            eval_dataset=None if evaluation is None else Dataset.from_list(evaluation),
            processing_class=tokenizer,
            **extra,
        )

    make.options = options
    make.data = {
        "train_dataset": Dataset.from_list(pairs),
        "processing_class": tokenizer,
        "meta_dataset": groups,
    }
    return make
