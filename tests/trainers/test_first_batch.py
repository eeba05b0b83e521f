"""What a trainer refuses before its first step, how far it looks, and training without noise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from shiftrm.errors import UserError
from shiftrm.models.prefix import pack
from shiftrm.models.probes import sharing_obstacle
from shiftrm.trainers.first_batch import (
    first_obstacle,
    longest_rows,
    require_no_noise,
    switch_off_dropout,
)
from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.conftest import llama_config
from tests.models.test_checkpoints import classifier

ROWS = pack([[[5, 6, 7, 8], [5, 6, 9]]], pad_token_id=0)


def test_pooling_of_its_own_is_not_trained(make_trainer):
    with pytest.raises(UserError, match="pools in a way of its own"):
        make_trainer(classifier("eurobert", classifier_pooling="late"), RewardTrainer).train()


def test_tokens_beyond_the_embedding_are_refused(make_trainer):
    model = LlamaForSequenceClassification(llama_config(12, num_labels=1))
    with pytest.raises(UserError, match=r"train data: chosen_ids has token id 1\d"):
        make_trainer(model, RewardTrainer)


def test_a_tokenizer_without_words_is_refused(make_trainer, reward_model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"<pad>": 0, "</s>": 2})
    with pytest.raises(UserError, match="knows no words"):
        make_trainer(reward_model, RewardTrainer)


@pytest.mark.parametrize(
    ("name", "options", "max_length", "looks_at"),
    [
        ("llama", {}, 512, 512),
        ("llama", {}, 8192, 1024),
        ("llama", {"max_position_embeddings": 600}, 8192, 600),
        ("mistral", {"sliding_window": 2048}, 8192, 4096),
        ("mistral", {"sliding_window": 4096}, 3000, 3000),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1500}, None, 3000),
        ("doge", {"keep_window_size": 2048}, 3000, 3000),
        ("llama", {"hidden_size": 2048, "intermediate_size": 5000}, 8192, 1024),
    ],
)
def test_how_far_it_looks(name, options, max_length, looks_at):
    small = {"vocab_size": 50_000, "max_position_embeddings": 32_768, "num_hidden_layers": 1}
    config = AutoConfig.for_model(name, **{**small, **options})
    rows = longest_rows(config, ROWS, max_length)
    assert rows.sequence_lengths.tolist() == [[looks_at, 3 * looks_at // 4 + 2]]


def test_top_k_keys_show_at_length_only():
    """Doge attends to its best `keep_window_size` keys, counted in the row."""
    model = classifier("doge", keep_window_size=40, max_position_embeddings=4096)
    assert sharing_obstacle(model, ROWS) is None
    assert "hidden states" in first_obstacle(model, ROWS, max_length=300)


def test_sharing_is_decided_alike_in_any_precision():
    for dtype in (torch.float32, torch.bfloat16):
        model = classifier("llama").to(dtype)
        assert first_obstacle(model, ROWS, max_length=200) is None


# -- noise -------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
NOISY = {
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "phimoe": {**EXPERTS, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "mixtral": {**EXPERTS, "router_jitter_noise": 0.3},
    "llama": {"attention_dropout": 0.3},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "attention_dropout": 0.3,
        "resid_dropout": 0.3,
        "embed_dropout": 0.3,
    },
    "gptj": {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4, "attn_pdrop": 0.3},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.3},
    "bert": {"hidden_dropout_prob": 0.3},
}
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2], [1, 9, 8, 7, 6, 5, 4, 2]])
MASK = torch.ones_like(IDS)


def build(name):
    options = {
        k: v for k, v in SMALL.items() if name not in ("gptj", "gpt_neo") or "num_h" not in k
    }
    if name == "gptj":
        options = {k: v for k, v in options.items() if not k.startswith(("hidden", "num_a"))}
    config = AutoConfig.for_model(name, **{**options, **NOISY[name]})
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def logits(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("name", NOISY)
def test_every_source_is_silenced(name):
    """Two training passes are equal, and equal to what the model evaluates to."""
    model = build(name)
    expected = logits(model.eval(), 0)
    saved = copy.deepcopy(model.config.to_dict())
    with pytest.raises(UserError, match="random numbers in training mode"):
        require_no_noise(model, IDS, MASK)
    switch_off_dropout(model)
    model.train()
    assert torch.equal(logits(model, 0), logits(model, 1))
    torch.testing.assert_close(logits(model, 2), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model.eval(), 2), expected, rtol=1e-5, atol=1e-6)
    require_no_noise(model, IDS, MASK)
    assert model.config.to_dict() == saved, "what is saved keeps the rates"


def noisy_llama():
    """Noise that no attribute names."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))

    class Strange(LlamaMLP):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.2, training=self.training)

    for module in model.modules():
        if type(module) is LlamaMLP:
            module.__class__ = Strange
    return model


@pytest.mark.parametrize("cls", [RewardTrainer, MetaRMTrainer])
def test_what_cannot_be_silenced_is_refused(make_trainer, cls):
    with pytest.raises(UserError, match=r"random numbers .* disable_dropout=False"):
        make_trainer(noisy_llama(), cls).train()


def test_noise_that_is_asked_for_is_allowed(make_trainer):
    make_trainer(noisy_llama(), RewardTrainer, disable_dropout=False).train()


@pytest.mark.parametrize("name", ["phimoe", "falcon"])
def test_without_a_meta_step_there_is_no_influence(make_trainer, name):
    trainer = make_trainer(build(name), MetaRMTrainer, meta_learning_rate=0.0)
    trainer.train()
    [found] = [e["meta_influence"] for e in trainer.state.log_history if "meta_influence" in e]
    assert found <= 1e-6
