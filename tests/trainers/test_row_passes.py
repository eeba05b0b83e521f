"""Packed passes train the same model as padded and plain ones, and so do passes of few tokens."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shiftrm.errors import UserError
from shiftrm.trainers.bsr import BSRConfig, BSRTrainer
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.trainers.row_passes import cut_to_budget
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


# -- max_tokens_per_pass ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(40, 200), st.booleans())
def test_a_cut_holds_every_row_once_and_no_pass_holds_too_much(lengths, most, padded):
    passes = cut_to_budget(lengths, most, padded=padded)
    assert sorted(i for part in passes for i in part) == list(range(len(lengths)))
    for part in passes:
        held = [lengths[i] for i in part]
        assert (len(held) * max(held) if padded else sum(held)) <= most
    if not padded:  # neighbours would not fit together, so at most twice the fewest
        assert len(passes) <= max(1, 2 * sum(lengths) / most)


def test_a_cut_by_hand():
    assert cut_to_budget([3, 9, 4, 8], 12, padded=False) == [[1], [2, 3], [0]]
    assert cut_to_budget([3, 9, 4, 8], 16, padded=True) == [[1], [2, 3], [0]]
    assert cut_to_budget([3, 9, 4, 8], 100, padded=True) == [[0, 1, 2, 3]]


@pytest.fixture
def tokens_of_passes():
    """A function that lists the tokens of a model's passes with gradients, padding included."""

    def watch(model):
        seen = []

        def note(module, args, kwargs):
            ids = args[0] if args else kwargs["input_ids"]
            if torch.is_grad_enabled():
                seen.append(ids.numel())

        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        return seen

    return watch


KINDS = {
    "reward": (RewardTrainer, MetaRMConfig, {}),
    "padded": (RewardTrainer, MetaRMConfig, {"disable_dropout": False}),
    "plain": (RewardTrainer, MetaRMConfig, {"shared_prefixes": False}),
    "metarm": (MetaRMTrainer, MetaRMConfig, {}),
    "by effect": (MetaRMTrainer, MetaRMConfig, {"preset": "by_effect"}),
    # Steps so small that no part of a batch leaves the midpoint rule (`core.meta_shift`).
    "midpoint": (
        MetaRMTrainer,
        MetaRMConfig,
        {"meta_shift": "midpoint", "meta_learning_rate": 0.01},
    ),
    "exact order": (MetaRMTrainer, MetaRMConfig, {"meta_order": "exact"}),
    "bsr": (BSRTrainer, BSRConfig, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_equal_whatever_the_budget(
    kind, make_trainer, reward_model, pack_all, tokens_of_passes
):
    cls, config_class, more = KINDS[kind]
    models, counts = [], []
    for most in (None, 60, 26):
        model = copy.deepcopy(reward_model)
        seen = tokens_of_passes(model)
        trainer = make_trainer(
            model, cls, config_class=config_class, max_steps=2, max_tokens_per_pass=most, **more
        )
        trainer.train()
        assert most is None or max(seen) <= most
        models.append(model)
        counts.append(len(seen))
    assert counts[2] > counts[0], "the smaller budget must take more passes"
    for model in models[1:]:
        same_weights(models[0], model, rtol=1e-4, atol=1e-5)


class CastsCounted(TorchDispatchMode):
    """Counts how often a weight of the given shapes is cast to bf16."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.casts = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func is torch.ops.aten._to_copy.default
            and (kwargs or {}).get("dtype") is torch.bfloat16
        ):
            self.casts += args[0].dtype is torch.float32 and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("most", [None, 26])
def test_weights_are_cast_once_a_step(most, make_trainer, reward_model, pack_all):
    """Autocast's copies serve all passes of a step, and its gradients are still right."""
    weights = [p for name, p in reward_model.named_parameters() if "_proj" in name]
    trainer = make_trainer(
        reward_model, RewardTrainer, max_steps=3, bf16=True, max_tokens_per_pass=most
    )
    counts, step = [], trainer.training_step

    def counted(*args, **kwargs):
        with CastsCounted({p.shape for p in weights}) as counter:
            loss = step(*args, **kwargs)
        counts.append(counter.casts)
        return loss

    trainer.training_step = counted
    trainer.train()
    assert counts[1:] == [len(weights)] * 2  # the first step also compares paths


def test_bf16_gradients_are_equal_whatever_the_budget(make_trainer, reward_model, pack_all):
    models = []
    for most in (None, 26):
        model = copy.deepcopy(reward_model)
        trainer = make_trainer(
            model, RewardTrainer, max_steps=2, bf16=True, max_tokens_per_pass=most
        )
        trainer.train()
        models.append(model)
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(reward_model.parameters(), models[0].parameters(), strict=True)
    )
    same_weights(*models, rtol=0.02, atol=0.02 * moved)


def test_budgets_are_refused(make_trainer, reward_model):
    with pytest.raises(UserError, match="max_tokens_per_pass is 0; it must be at least 1"):
        make_trainer(reward_model, RewardTrainer, max_tokens_per_pass=0)
    trainer = make_trainer(reward_model, RewardTrainer, max_tokens_per_pass=5)
    with pytest.raises(UserError, match=r"has \d+ tokens; raise it, or lower max_length"):
        trainer.train()


def test_several_processes_have_no_budget(make_trainer, reward_model, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(UserError, match="the same number of passes"):
        make_trainer(reward_model, RewardTrainer, max_tokens_per_pass=100)
