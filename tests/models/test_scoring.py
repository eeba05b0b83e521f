"""A score depends on the text alone: not on padding, batch, order, or a trip to the disk."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from shiftrm.errors import UserError
from shiftrm.models.responses import Response
from shiftrm.models.rewards import pad_right, rewards_at, score_head, sequence_rewards, token_values
from shiftrm.models.scoring import Scorer, row_responses
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


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "num_labels": 1,
    "pad_token_id": 0,
}
ENCODERS = {
    "bert": (BertForSequenceClassification, BertConfig),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),  # its head pools, not the model
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_pool_by_themselves(tokenizer, kind):
    torch.manual_seed(0)
    model_class, config_class = ENCODERS[kind]
    model = model_class(config_class(**TINY)).eval()
    scorer = Scorer(model, tokenizer)
    ids, mask = pad_right(
        [scorer.encode(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], pad_token_id=0
    )
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(sequence_rewards(model, ids, mask), theirs, rtol=0, atol=1e-6)
        for batch_size in (1, 4):
            ours = scorer(PROMPTS, RESPONSES, batch_size=batch_size)
            assert ours == pytest.approx(theirs.tolist(), abs=1e-6)
        with pytest.raises(UserError, match="pools by itself"):
            rewards_at(model, ids, mask, torch.zeros(4, 2, dtype=torch.long))
        with pytest.raises(UserError, match="pools by itself"):
            token_values(model, ids, mask)


def test_a_bf16_encoder_is_read_in_fp32(tokenizer):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY)).eval().bfloat16()
    ids, mask = pad_right([[5, 6, 2]], pad_token_id=0)
    with torch.no_grad():
        pooled = model.bert(input_ids=ids, attention_mask=mask).pooler_output[0].float()
        reward = sequence_rewards(model, ids, mask)
    expected = pooled @ model.classifier.weight[0].float() + model.classifier.bias[0].float()
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward[0], expected, rtol=0, atol=1e-6)


def test_a_lora_layer_as_head(reward_model):
    """`target_modules="all-linear"` without a task type makes the head a LoRA layer."""
    wrapped = get_peft_model(reward_model, LoraConfig(target_modules="all-linear", r=2)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # starts at zero, where LoRA has no effect
                parameter.normal_()
        ids, mask = pad_right([[5, 6, 2], [7, 8, 9, 10, 2]], pad_token_id=0)
        theirs = wrapped(input_ids=ids, attention_mask=mask).logits[:, 0]
        base = reward_model.score.base_layer
        plain = wrapped.base_model.model.model(input_ids=ids, attention_mask=mask)
        without = base(plain.last_hidden_state[torch.arange(2), torch.tensor([2, 4])])[:, 0]
        ours = sequence_rewards(wrapped, ids, mask)
        assert token_values(wrapped, ids, mask).shape == (2, 5)
    assert (theirs - without).abs().min() > 1e-3, "the head's own adapter matters"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="not a linear layer"):
        score_head(wrapped)


def test_without_a_pad_token_eos_pads(reward_model, tokenizer):
    expected = Scorer(reward_model, tokenizer)(PROMPTS, RESPONSES)
    padless = copy.deepcopy(tokenizer)
    padless.pad_token = None
    reward_model.config.pad_token_id = None
    ours = Scorer(reward_model, padless)(PROMPTS, RESPONSES, batch_size=4)
    assert ours == pytest.approx(expected, abs=1e-6)
    padless.eos_token = None
    with pytest.raises(UserError, match="neither a pad nor an EOS token"):
        Scorer(reward_model, padless)


def test_arguments_of_a_scorer(reward_model, tokenizer):
    scorer = Scorer(reward_model, tokenizer)
    for arguments, options, message in (
        ((["the"], []), {}, "1 prompts, 0 responses and 0 entries of finished"),
        ((["the"], [" a"]), {"finished": []}, "1 prompts, 1 responses and 0 entries of finished"),
        (("the", "cat"), {}, "prompts is one string"),
        ((["the"], [" a"]), {"batch_size": 0}, "batch_size is 0"),
        ((["the"], [None]), {}, "response 0: response holds NoneType"),
        (([None], [""]), {"finished": [False]}, "response 0: .* are empty"),
    ):
        with pytest.raises(UserError, match=message):
            scorer(*arguments, **options)
    assert scorer([], []) == []


def test_texts_of_a_row():
    """Finished or not, in every kind of row."""
    assert [t.finished for t in row_responses({"response": "a"}, "f:1")] == [True]
    assert [t.finished for t in row_responses({"response": "a", "finished": False}, "f")] == [False]
    row = {"prompt": "p", "responses": ["a", "b"], "finished": [False, True]}
    assert row_responses(row, "f:1") == [Response("p", "a", False), Response("p", "b", True)]
    pair = {"chosen": "a", "rejected": "b", "rejected_finished": False}
    assert row_responses(pair, "f:1") == [Response(None, "a"), Response(None, "b", False)]
