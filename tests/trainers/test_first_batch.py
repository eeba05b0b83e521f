"""What a trainer refuses before its first step, and how far it looks."""

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.prefix import pack
from shiftrm.models.probes import sharing_obstacle
from shiftrm.trainers.first_batch import first_obstacle, longest_rows
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
