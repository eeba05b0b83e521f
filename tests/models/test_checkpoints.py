"""Checkpoints whose numbers would be wrong are one line instead."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from shiftrm.errors import UserError
from shiftrm.models import probes
from shiftrm.models.loading import load_reward_model, unread_heads
from shiftrm.models.probes import require_own_reward
from shiftrm.models.rewards import find_head, hidden_states
from shiftrm.models.scoring import Scorer
from tests.conftest import llama_config

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def classifier(name, *, seed=0, **options):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**SMALL, **options})
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return model.eval()


def test_pooling_of_its_own_is_refused(tokenizer):
    """EuroBERT's mean of token scores is not the last token's score."""
    late = classifier("eurobert", classifier_pooling="late")
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(UserError, match=r"EuroBert.* pools in a way of its own"):
        Scorer(late, tokenizer)
    for pooling in ("bos", "mean"):  # the classifier is handed what was pooled
        model = classifier("eurobert", classifier_pooling=pooling)
        found = Scorer(model, tokenizer).score_ids(ids.tolist())
        with torch.no_grad():
            assert found == pytest.approx(model(ids).logits[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "bert", "roberta", "deberta-v2"])
def test_known_poolings_are_the_models_own(name, dtype):
    require_own_reward(classifier(name).to(dtype))


def centred(model):
    """Turn the head all but orthogonal to the states of the probe's rows."""
    rows = probes._rows(model.config)
    with torch.no_grad():
        basis, _ = torch.linalg.qr(hidden_states(model, rows, torch.ones_like(rows)).T)
        weight = find_head(model).weight
        weight -= 0.99 * (basis @ (basis.T @ weight[0]))
    return model


def in_precision(model, cast):
    """The model, and the context in which it computes as `cast` says."""
    model = model.to(torch.bfloat16) if cast == "weights" else model
    return model, torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast")


ANY_SIZE = [
    pytest.mark.parametrize("cast", ["autocast", "weights", "fp32"]),
    pytest.mark.parametrize("hidden_size", [16, 64, 256]),
    pytest.mark.parametrize("change", [lambda model: model, centred], ids=["drawn", "centred"]),
]


def of_any_size(test):
    for mark in ANY_SIZE:
        test = mark(test)
    return test


@of_any_size
def test_rewards_near_zero_leave_room_for_rounding(hidden_size, cast, change):
    """As rewards are that a new head gives, or one trained to a mean of zero."""
    for seed in range(12):
        drawn = classifier("llama", hidden_size=hidden_size, seed=seed)
        model, computing = in_precision(change(drawn), cast)
        with computing:
            require_own_reward(model)


@of_any_size
def test_pooling_of_its_own_is_found_at_any_size_of_the_rewards(hidden_size, cast, change):
    for seed in range(12):
        options = {"hidden_size": hidden_size, "classifier_pooling": "late"}
        model, computing = in_precision(change(classifier("eurobert", seed=seed, **options)), cast)
        with computing, pytest.raises(UserError, match="pools in a way of its own"):
            require_own_reward(model)


@pytest.mark.parametrize(
    "head", ["value_head", "v_head.summary", "regression_head", "reward_head.0", "rm_head.dense"]
)
def test_a_head_of_another_name_is_not_replaced(head, reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{head}.weight"] = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{head}.weight.*rename it to score.weight"):
        load_reward_model(tmp_path, seed=0)
    with pytest.raises(UserError, match=rf"no score head .*{head}.weight is not read"):
        Scorer.from_pretrained(tmp_path)


def test_a_language_head_is_no_head_of_rewards(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    assert load_reward_model(tmp_path, seed=0).score.weight.std() > 0
    assert unread_heads(["lm_head.weight", "embed_out.weight", "cls.predictions.bias"]) == []


def test_a_folder_without_a_tokenizer(tmp_path):
    """transformers makes one of special tokens alone: every text would be the same."""
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(Qwen2Config(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer knows no words"):
        Scorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value, reward_model, tokenizer):
    scorer = Scorer(reward_model, tokenizer)
    with torch.no_grad():
        reward_model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match=r"response 0: the reward is nan; .*layers.1.mlp.up_proj"):
        scorer(["the red cat"], [" runs"])


def test_token_ids_beyond_the_embedding(tokenizer):
    model = LlamaForSequenceClassification(llama_config(12, num_labels=1)).eval()
    scorer = Scorer(model, tokenizer)
    with pytest.raises(UserError, match=r"sequence 1 has token id 12, .* embeddings for 12 tokens"):
        scorer.score_ids([[5, 6], [11, 12, 3]])
    with pytest.raises(UserError, match="sequence 0 has token id -1"):
        scorer.score_ids([[5, -1]])
