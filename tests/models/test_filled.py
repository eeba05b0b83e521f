"""A checkpoint whose files do not fill the model, or hold more than it reads, is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from shiftrm.errors import UserError
from shiftrm.models.generation import load_policy
from shiftrm.models.loading import load_reward_model
from shiftrm.models.scoring import Scorer
from tests.conftest import llama_config

UP = "model.layers.0.mlp.up_proj.weight"
SCORE = "base_model.model.score.weight"


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without(folder, *names, file="model.safetensors"):
    weights = load_file(folder / file)
    for name in names:
        del weights[name]
    save_file(weights, folder / file, metadata={"format": "pt"})


def with_layers(folder, number):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": number}))


@pytest.fixture
def adapter(policy, tokenizer, tmp_path):
    """A reward model's adapter with a head, on a policy's folder."""
    base = saved(policy, tokenizer, tmp_path / "base")
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"])
    ).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = saved(wrapped, tokenizer, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        return folder, ids, wrapped(input_ids=ids).logits[0, 0].item()


def test_a_whole_adapter_gives_its_own_reward(adapter):
    folder, ids, expected = adapter
    for _ in range(2):
        assert Scorer.from_pretrained(folder).score_ids(ids.tolist()) == pytest.approx([expected])


@pytest.mark.parametrize("lost", ["score", "lora_A", "lora_B"])
def test_an_adapter_that_lost_weights(adapter, lost):
    folder, _, _ = adapter
    names = load_file(folder / "adapter_model.safetensors")
    gone = [name for name in names if lost in name]
    assert gone
    without(folder, *gone, file="adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"the adapter's files lack \S*{lost}\S*; copy or save"):
        Scorer.from_pretrained(folder)


def test_a_head_that_neither_the_adapter_nor_its_base_has(policy, tokenizer, tmp_path):
    base = saved(policy, tokenizer, tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    folder = saved(wrapped, tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no score head \(score.weight is missing"):
        Scorer.from_pretrained(folder)


def test_an_adapter_of_a_base_with_a_hole(adapter, tmp_path):
    folder, _, _ = adapter
    without(tmp_path / "base", UP)
    with pytest.raises(UserError, match=rf"base: its files lack the weight {UP}"):
        Scorer.from_pretrained(folder)


def test_an_adapter_of_a_reward_model_is_no_policy(adapter):
    with pytest.raises(UserError, match="is the adapter of a reward model; give a policy"):
        load_policy(adapter[0])


@pytest.mark.parametrize("lost", [UP, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_body_with_a_hole(reward_model, policy, tokenizer, tmp_path, lost):
    reward = saved(reward_model, tokenizer, tmp_path / "reward")
    without(reward, lost)
    for load in (Scorer.from_pretrained, lambda path: load_reward_model(path, seed=0)):
        with pytest.raises(UserError, match=f"reward: its files lack the weight {lost}"):
            load(reward)
    without(saved(policy, tokenizer, tmp_path / "policy"), lost)
    with pytest.raises(UserError, match=f"policy: its files lack the weight {lost}"):
        load_policy(tmp_path / "policy")


def test_another_number_of_layers_than_the_files_hold(reward_model, policy, tokenizer, tmp_path):
    reward = saved(reward_model, tokenizer, tmp_path / "reward")
    policy = saved(policy, tokenizer, tmp_path / "policy")
    for load, path in ((Scorer.from_pretrained, reward), (load_policy, policy)):
        with_layers(path, 1)
        with pytest.raises(
            UserError, match=r"hold model\.layers\.1\.\S+, a layer that config.json"
        ):
            load(path)
        with_layers(path, 3)
        with pytest.raises(UserError, match=r"lack the weight model\.layers\.2\."):
            load(path)


def test_a_policy_still_starts_a_reward_model(policy, tokenizer, tmp_path):
    """Its language head is not read, and the score head is new: both are of heads."""
    model = load_reward_model(saved(policy, tokenizer, tmp_path / "policy"), seed=0)
    torch.testing.assert_close(model.model.norm.weight, policy.model.norm.weight)


def encoder_config():
    return BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0,
    )  # fmt: skip


def test_an_encoder_starts_a_reward_model_and_is_no_policy(tokenizer, tmp_path):
    """A masked language model has no pooler, which is part of the new head."""
    folder = saved(BertForMaskedLM(encoder_config()), tokenizer, tmp_path / "encoder")
    load_reward_model(folder, seed=0)
    with pytest.raises(UserError, match=r"is an encoder \(bert\), whose tokens see the later"):
        load_policy(folder)
    without(folder, "bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(UserError, match=r"lack the weight bert\.encoder\.layer\.1\.output\.dense"):
        load_reward_model(folder, seed=0)


def test_a_token_classifier_is_no_reward_model(tokenizer, tmp_path):
    model = LlamaForTokenClassification(llama_config(num_labels=1))
    folder = saved(model, tokenizer, tmp_path / "tokens")
    with pytest.raises(UserError, match="LlamaForTokenClassification, which rates every token"):
        Scorer.from_pretrained(folder)
