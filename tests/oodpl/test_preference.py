"""A_PL and KL of a policy, against plain loops over tokens."""

import math

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.models.sampling import Draws, SamplingConfig, as_samples, sample_rows
from shiftrm.oodpl.batches import Encoder
from shiftrm.oodpl.preference import preference_accuracy, sampled_kl


def log_likelihood(policy, tokenizer, prompt, response, *, finished=True):
    """Word by word; the tokenizer's words are its tokens."""
    words = f"{prompt}{response}".split() + (["</s>"] if finished else [])
    ids = tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        logs = policy(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(logs[t - 1, ids[t]]) for t in range(len(prompt.split()), len(ids))]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_accuracy_and_loss_by_hand(policy, tokenizer, pairs, reduction):
    rows = [{**pair, "rejected_finished": i % 2 == 0} for i, pair in enumerate(pairs)]
    margins = []
    for row in rows:
        chosen = log_likelihood(policy, tokenizer, row["prompt"], row["chosen"])
        rejected = log_likelihood(
            policy, tokenizer, row["prompt"], row["rejected"], finished=row["rejected_finished"]
        )
        scale = (len(chosen), len(rejected)) if reduction == "mean" else (1, 1)
        margins.append(sum(chosen) / scale[0] - sum(rejected) / scale[1])
    losses = [math.log1p(math.exp(-m)) for m in margins]
    for batch_size in (3, 100):
        found = preference_accuracy(
            policy, tokenizer, rows, reduction=reduction, batch_size=batch_size
        )
        assert found.accuracy == sum(m > 0 for m in margins) / len(margins)
        assert 0 < found.accuracy < 1
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found.pairs == len(pairs)
    tokens = [Encoder(tokenizer).pair(row, 0) for row in rows]
    assert preference_accuracy(policy, tokenizer, tokens, reduction=reduction).loss == found.loss


def test_a_tie_is_no_preference(policy, tokenizer):
    same = {"prompt": "the", "chosen": " cat", "rejected": " cat"}
    found = preference_accuracy(policy, tokenizer, [same])
    assert found.accuracy == 0.0
    assert found.loss == pytest.approx(math.log(2))
    with pytest.raises(UserError, match="no preference pairs"):
        preference_accuracy(policy, tokenizer, [])


def test_kl_is_zero_to_itself_and_that_of_the_distributions_otherwise(policy, tokenizer):
    rows = sample_rows(
        policy,
        tokenizer,
        ["the red", "a dog"],
        Draws(SamplingConfig(max_new_tokens=4), 2, batch_size=2, seed=0),
    )
    samples = as_samples(tokenizer, rows)
    assert [s.finished for s in samples] == [f for row in rows for f in row["finished"]]
    assert sampled_kl(policy, policy, samples) == 0.0
    other = type(policy)(policy.config).eval()
    expected = []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (policy, other))
        at = slice(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        expected.append(float((p.exp() * (p - q)).sum(-1)[at].sum()))
    assert sampled_kl(policy, other, samples) == pytest.approx(sum(expected) / 4, rel=1e-4)
    with pytest.raises(UserError, match="no samples"):
        sampled_kl(policy, other, [])
