"""Training without noise, whatever it comes from."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification, LlamaMLP

from shiftrm.errors import UserError
from shiftrm.trainers.first_batch import require_no_noise, switch_off_dropout
from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer

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
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "vocab_size": 32})
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)

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
