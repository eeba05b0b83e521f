"""A checkpoint whose files do not fill the model, or hold more than it reads, is refused."""

import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    XLMConfig,
    XLMWithLMHeadModel,
)

from shiftrm.errors import UserError
from shiftrm.models.generation import load_policy
from shiftrm.models.loading import load_reward_model
from shiftrm.models.scoring import Scorer
from tests.conftest import llama_config

UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.tensor([[5, 6, 7, 2]])


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
    with pytest.raises(UserError, match="tokens: rates every token"):
        Scorer.from_pretrained(folder)


def adapted(model, config, tokenizer, folder):
    """Save an adapter with random weights; return what the model says with it."""
    wrapped = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    saved(wrapped, tokenizer, folder)
    with torch.no_grad():
        return wrapped(input_ids=IDS).logits


@pytest.mark.parametrize("base", ["masked", "classifier"])
def test_an_adapter_with_a_head_of_several_layers(tokenizer, tmp_path, base):
    """PEFT saves RoBERTa's head whole, also where its base has none."""
    config = RobertaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    kind = RobertaForMaskedLM if base == "masked" else RobertaForSequenceClassification
    folder = saved(kind(config), tokenizer, tmp_path / "base")
    model = RobertaForSequenceClassification.from_pretrained(folder)
    expected = adapted(model, LoraConfig(task_type="SEQ_CLS", r=2), tokenizer, tmp_path / "adapter")
    scorer = Scorer.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(scorer.model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_peft_does_not_save_are_not_missed(tokenizer, tmp_path, tied):
    config = llama_config(tie_word_embeddings=tied)
    base = saved(LlamaForCausalLM(config), tokenizer, tmp_path / "base")
    tokens = LoraConfig(task_type="CAUSAL_LM", r=2, trainable_token_indices=[3, 4])
    ada = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]
    )
    for name, given in (("tokens", tokens), ("ada", ada)):
        model = LlamaForCausalLM.from_pretrained(base)
        expected = adapted(model, given, tokenizer, tmp_path / name)
        policy, _ = load_policy(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(policy(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)


def test_dora_is_refused_with_its_reason(policy, tokenizer, tmp_path):
    base = saved(policy, tokenizer, tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True)
    adapted(model, config, tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match="is a DoRA adapter, whose magnitudes"):
        Scorer.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("lost", ["score.weight", UP, None])
def test_an_adapter_in_the_folder_of_its_model(reward_model, tokenizer, tmp_path, lost):
    config = LoraConfig(target_modules=["q_proj"], r=2)
    base = saved(reward_model, tokenizer, tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(base)
    expected = adapted(model, config, tokenizer, base)  # beside the model's own files
    if lost is None:
        found = Scorer.from_pretrained(base).score_ids(IDS.tolist())
        assert found == pytest.approx([expected.item()], abs=1e-5)
        return
    without(base, lost)
    with pytest.raises(UserError, match=rf"base: .*{lost}"):
        Scorer.from_pretrained(base)


def test_an_adapter_on_a_base_of_four_bits(tokenizer, tmp_path):
    """Its base cannot be read on the meta device, and is not checked."""
    config = BitsAndBytesConfig(load_in_4bit=True)
    policy = LlamaForCausalLM(llama_config(hidden_size=64, intermediate_size=64))
    base = saved(policy, tokenizer, tmp_path / "base")
    quantised = LlamaForCausalLM.from_pretrained(base, quantization_config=config)
    base = saved(quantised, tokenizer, tmp_path / "four")
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    expected = adapted(model, LoraConfig(task_type="SEQ_CLS", r=2), tokenizer, tmp_path / "adapter")
    scorer = Scorer.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        found = scorer.model(input_ids=IDS).logits.float()
    torch.testing.assert_close(found, expected.float(), atol=1e-2, rtol=0)


def test_a_pooler_that_no_file_holds_is_random(tokenizer, tmp_path):
    """It may be new where training starts; a reward model has one."""
    config = encoder_config()
    config.num_labels = 1
    folder = saved(BertForSequenceClassification(config), tokenizer, tmp_path / "reward")
    Scorer.from_pretrained(folder)
    without(folder, "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    before = load_file(folder / "model.safetensors")["classifier.weight"]
    model = load_reward_model(folder, seed=0)
    torch.testing.assert_close(model.classifier.weight.detach(), before)
    with pytest.raises(UserError, match=r"bert.pooler.dense.bias is missing"):
        Scorer.from_pretrained(folder)


def test_layers_that_predict_further_tokens_are_left_out(tokenizer, tmp_path):
    """As in DeepSeek-V3 and GLM-4.5: one layer beyond those that config.json counts."""
    model = LlamaForCausalLM(llama_config(num_hidden_layers=3))
    folder = saved(model, tokenizer, tmp_path / "policy")
    with_layers(folder, 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert load_policy(folder)[0].config.num_hidden_layers == 2


def test_an_encoder_that_may_be_causal(tokenizer, tmp_path):
    """XLM's configuration says so by a name of its own."""
    config = XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2, pad_index=0, causal=False)
    folder = saved(XLMWithLMHeadModel(config), tokenizer, tmp_path / "xlm")
    with pytest.raises(UserError, match=r"is an encoder \(xlm\)"):
        load_policy(folder)
