"""QLoRA trains what plain LoRA trains on the dequantised weights, in full precision."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

from shiftrm.errors import UserError
from shiftrm.models.rewards import score_head
from shiftrm.trainers import quantised, settings
from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.trainers.reward_configs import RewardConfig
from tests.conftest import llama_config

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # several blocks of 64 weights in a row


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")


@pytest.fixture
def lora():
    return LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def base(tmp_path):
    """A folder of a reward model whose head has many digits."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1, **SIZES))
    nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bits(folder, **options):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, quantization_config=config, **options
    )


def dequantised(folder, bitsandbytes):
    """The ordinary model whose weights are those that the four bits stand for."""
    held = four_bits(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    for name, module in held.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            assert not weight.equal(model.get_submodule(name).weight)
            model.get_submodule(name).weight.data = weight
    return model


def trained(trainer):
    """The trained weights by name, evaluated before: bitsandbytes changes layers then."""
    trainer.evaluate()
    trainer.train()
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


KINDS = {
    "plain": (RewardTrainer, {"shared_prefixes": False}),
    "shared": (RewardTrainer, {}),
    "packed": (RewardTrainer, {}),
    "metarm": (MetaRMTrainer, {"meta_learning_rate": 0.5}),
    "metarm_exact": (MetaRMTrainer, {"meta_learning_rate": 0.5, "meta_order": "exact"}),
    "metarm_packed": (MetaRMTrainer, {"preset": "by_effect", "deploy": "adapted"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_lora_on_the_dequantised_weights(
    kind, base, bitsandbytes, lora, make_trainer, pairs, monkeypatch
):
    if "packed" in kind:
        monkeypatch.setattr("shiftrm.models.packed.PACKED_FROM", {"cpu": 0})
    cls, options = KINDS[kind]
    models = (four_bits(base), dequantised(base, bitsandbytes))
    found = []
    for model in models:
        trainer = make_trainer(
            model,
            cls,
            max_steps=3,
            evaluation=pairs[:4],
            more={"peft_config": copy.deepcopy(lora)},
            **options,
        )
        generator = torch.Generator().manual_seed(1)
        for name, p in trainer.model.named_parameters():
            if "lora_" in name:  # both factors, so that all of them have gradients
                p.data = torch.randn(p.shape, generator=generator) / 8
        found.append(trained(trainer))
        assert trainer._sharing is (kind != "plain")
        assert trainer._packed is ("packed" in kind)
        if cls is MetaRMTrainer:
            assert trainer.meta_shift == "in_place"
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6)


def test_head_and_adapters_keep_their_precision(base, bitsandbytes, lora, make_trainer):
    model = four_bits(base)
    before = model.score.weight.data.clone()
    assert not before.equal(before.bfloat16().float())
    trainer = make_trainer(model, RewardTrainer, more={"peft_config": lora})
    assert score_head(trainer.model).weight.equal(before)
    types = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert types == {torch.float32}
    kinds = {type(p).__name__ for name, p in trainer.model.named_parameters() if "_proj" in name}
    assert kinds == {"Params4bit", "Parameter"}
    # A trained adapter that is trained again is not rounded either.
    again = make_trainer(trainer.model, RewardTrainer)
    assert score_head(again.model).weight.equal(before)


def test_counting_weights_in_four_bits(base, bitsandbytes):
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    held = four_bits(base)
    numbers = [sum(map(quantised.count, model.parameters())) for model in (plain, held)]
    assert numbers[0] == numbers[1]


# -- what is refused -------------------------------------------------------------------------------


def test_false_is_not_a_wish(tmp_path):
    given = {"load_in_4bit": "false", "load_in_8bit": "false"}
    chosen = settings.resolve(given, RewardConfig, work=tmp_path, command_name="train")
    assert chosen.trainer_options == {}


def test_what_a_trainer_refuses(base, bitsandbytes, lora, make_trainer):
    model = four_bits(base)
    with pytest.raises(UserError, match="give a peft_config"):
        make_trainer(model, RewardTrainer)
    before = quantised.trained_weights(model, lora=True)
    with pytest.raises(UserError, match="use DDP or one process instead of FSDP2"):
        quantised.restore_(model, before, sharded=True)


def test_second_derivatives_of_eight_bits_are_refused(base, bitsandbytes, lora, make_trainer):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, quantization_config=config
    )
    with pytest.raises(UserError, match="load_in_8bit rounds activations"):
        make_trainer(model, MetaRMTrainer, more={"peft_config": lora}, meta_order="exact")
