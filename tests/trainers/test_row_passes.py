"""Packed passes train the same model as padded and plain ones."""

import copy
import logging

import pytest
import torch

from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.trainers.conftest import same_weights


@pytest.fixture
def pack_all(monkeypatch):
    """Also models so small that packing does not pay."""
    monkeypatch.setattr("shiftrm.models.packed.PACKED_FROM", {"cpu": 0})


@pytest.mark.parametrize("cls", [RewardTrainer, MetaRMTrainer])
def test_packed_training_equals_the_plain_path(cls, make_trainer, reward_model, pack_all, caplog):
    caplog.set_level(logging.INFO, "shiftrm")
    models = []
    for shared in (True, False):
        model = copy.deepcopy(reward_model)
        trainer = make_trainer(model, cls, max_steps=3, shared_prefixes=shared)
        trainer.train()
        assert trainer._packed is shared
        models.append(model)
    assert caplog.text.count("rows are packed") == 1
    same_weights(*models, rtol=1e-5, atol=1e-6)


def test_small_models_and_dropout_keep_padded_rows(make_trainer, reward_model, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "shiftrm")
    trainer = make_trainer(reward_model, RewardTrainer, max_steps=1)
    trainer.train()
    assert trainer._sharing
    assert not trainer._packed
    assert "padded, not packed: not faster for a model of" in caplog.text
    monkeypatch.setattr("shiftrm.models.packed.PACKED_FROM", {"cpu": 0})
    trainer = make_trainer(reward_model, RewardTrainer, max_steps=1, disable_dropout=False)
    trainer.train()
    assert not trainer._packed
    assert "dropout is on" in caplog.text


def test_a_model_that_fails_packed_is_padded(
    make_trainer, reward_model, pack_all, monkeypatch, caplog
):
    def fails(*tensors, **options):
        raise RuntimeError("no such kernel")

    caplog.set_level(logging.INFO, "shiftrm")
    monkeypatch.setattr("shiftrm.models.packed.attend_by_rows", fails)
    trainer = make_trainer(reward_model, RewardTrainer, max_steps=2)
    trainer.train()
    assert trainer._sharing
    assert not trainer._packed
    assert caplog.text.count("no such kernel") == 1
    assert all(torch.isfinite(p).all() for p in reward_model.parameters())
