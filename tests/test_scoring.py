"""A score depends on the text alone: not on padding, batch, order, or a trip to the disk."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.scoring import Scorer, pad_right, rewards_at, score_head, sequence_rewards
from tests.conftest import llama_config

PROMPTS = ["the red", "a", "the small green bird", "a dog"]
RESPONSES = [" cat runs", " fish swims the large blue", "", " sits"]


def test_batch_size_and_order_do_not_matter(reward_model, tokenizer):
    scorer = Scorer(reward_model, tokenizer)
    reference = scorer(PROMPTS, RESPONSES, batch_size=1)
    assert scorer(PROMPTS, RESPONSES, batch_size=3) == pytest.approx(reference, abs=1e-6)
    backwards = scorer(PROMPTS[::-1], RESPONSES[::-1], batch_size=4)
    assert backwards[::-1] == pytest.approx(reference, abs=1e-6)


def test_padding_does_not_matter(reward_model):
    sequence = [5, 9, 7, 2]
    alone = sequence_rewards(reward_model, torch.tensor([sequence]), torch.ones(1, 4).long())
    for extra in (1, 7, 30):
        right = torch.tensor([sequence + [0] * extra])
        mask = torch.tensor([[1] * 4 + [0] * extra])
        torch.testing.assert_close(
            sequence_rewards(reward_model, right, mask), alone, rtol=0, atol=1e-6
        )
        left = torch.tensor([[0] * extra + sequence])
        torch.testing.assert_close(
            sequence_rewards(reward_model, left, mask.flip(1)), alone, rtol=0, atol=1e-5
        )


def test_agrees_with_transformers_own_pooling(reward_model):
    ids, mask = pad_right([[5, 6, 2], [7, 8, 9, 10, 2]], pad_token_id=0)
    with torch.no_grad():
        theirs = reward_model(input_ids=ids, attention_mask=mask).logits[:, 0]
        ours = sequence_rewards(reward_model, ids, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_rewards_at_every_position(reward_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        rewards = rewards_at(reward_model, ids, torch.ones_like(ids), torch.tensor([[0, 1, 2, 3]]))
        for t in range(4):  # causal: the value at t is the score of the prefix
            prefix = ids[:, : t + 1]
            alone = sequence_rewards(reward_model, prefix, torch.ones_like(prefix))
            torch.testing.assert_close(rewards[:, t], alone, rtol=0, atol=1e-6)


def test_bf16_model_is_read_in_fp32(reward_model):
    model = reward_model.bfloat16()
    ids, mask = pad_right([[5, 6, 2]], pad_token_id=0)
    with torch.no_grad():
        reward = sequence_rewards(model, ids, mask)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[0, -1].float()
    assert reward.dtype == torch.float32
    expected = hidden @ model.score.weight[0].float()
    torch.testing.assert_close(reward[0], expected, rtol=0, atol=1e-6)


def test_save_and_reload(reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = Scorer(reward_model, tokenizer)(PROMPTS, RESPONSES)
    assert Scorer.from_pretrained(tmp_path)(PROMPTS, RESPONSES) == pytest.approx(before, abs=1e-6)


def test_lora_wrapper_head_is_found(reward_model):
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"], r=2
    )
    wrapped = get_peft_model(reward_model, config).eval()
    with torch.no_grad():
        score_head(wrapped).weight.add_(1.0)  # the trained copy, not the frozen original
        ids, mask = pad_right([[5, 6, 2]], pad_token_id=0)
        theirs = wrapped(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(sequence_rewards(wrapped, ids, mask), theirs, rtol=0, atol=1e-5)


def test_a_causal_language_model_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(UserError, match="has no score head"):
        Scorer(policy, tokenizer)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no score head"):
        Scorer.from_pretrained(tmp_path)


def test_two_labels_are_refused(tokenizer):
    model = LlamaForSequenceClassification(llama_config(num_labels=2))
    with pytest.raises(UserError, match="num_labels=2"):
        Scorer(model, tokenizer)


def test_too_long_is_refused(reward_model, tokenizer):
    with pytest.raises(UserError, match=r"response 1: .* 66 tokens .* context is 64"):
        Scorer(reward_model, tokenizer)(["the", "the"], [" cat", " cat" * 64])
