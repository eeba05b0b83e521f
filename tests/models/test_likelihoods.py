"""Log-likelihoods of responses against a plain softmax over single sequences."""

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.models.likelihoods import encode_for_policy, encode_side, log_likelihoods

CHAT = [{"role": "user", "content": "the cat"}]


def by_hand(policy, ids, count):
    """Sum of the log-probabilities of the last `count` tokens, one sequence without padding."""
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_log_likelihoods_of_texts_and_chats(policy, tokenizer, batch_size):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # prompt, response, finished, all tokens, number of the response's
    cases = [
        ("the red cat", " runs", True, ids("the red cat runs </s>"), 2),
        ("the red cat", " runs", False, ids("the red cat runs"), 1),
        ("the", " dog sits the large fish flies", True,
         ids("the dog sits the large fish flies </s>"), 7),
        ("the", "", True, ids("the </s>"), 1),
        (CHAT, " dog runs", True, ids("<s> user the cat </s> <s> assistant dog runs </s>"), 3),
        (CHAT, " dog runs", False, ids("<s> user the cat </s> <s> assistant dog runs"), 2),
        (CHAT, [{"role": "assistant", "content": "dog"}], True,
         ids("<s> user the cat </s> <s> assistant dog </s>"), 2),
    ]  # fmt: skip
    rows = []
    for prompt, response, finished, expected, count in cases:
        row = encode_for_policy(tokenizer, prompt, response, finished=finished)
        assert row.ids == expected
        assert len(row.ids) - row.start == count
        rows.append(row)
    policy.train()  # dropout would be off even so
    found = log_likelihoods(policy, rows, pad_token_id=0, batch_size=batch_size)
    expected = [by_hand(policy, ids, count) for *_, ids, count in cases]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert policy.training


def test_a_side_of_a_pair(tokenizer):
    row = {"prompt": "the", "chosen": " cat", "rejected": " dog", "rejected_finished": False}
    assert encode_side(tokenizer, row, "chosen").ids[-1] == tokenizer.eos_token_id
    assert encode_side(tokenizer, row, "rejected").ids[-1] != tokenizer.eos_token_id
    answer = [{"role": "assistant", "content": "dog"}]
    whole = {"prompt": None, "chosen": CHAT + answer, "rejected": CHAT + answer}
    apart = {"prompt": CHAT, "chosen": answer, "rejected": answer}
    assert encode_side(tokenizer, whole, "chosen") == encode_side(tokenizer, apart, "chosen")
    with pytest.raises(UserError, match="has no prompt"):
        encode_side(tokenizer, {"chosen": "the cat", "rejected": "the dog"}, "chosen")
    with pytest.raises(UserError, match="no token of its own"):
        encode_for_policy(tokenizer, "the", "", finished=False)
