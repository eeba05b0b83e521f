"""Rotary positions that depend on the longest sequence: a reward still depends on its own alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3ForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.prefix import pack
from shiftrm.models.probes import sharing_obstacle
from shiftrm.models.rewards import group_rewards, pad_right, sequence_rewards, token_values
from shiftrm.models.rope import frequency_class, frequency_limit, require_fixed_frequencies
from shiftrm.models.scoring import Scorer

SHAPE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fresh(kind):
    """A model of its own, without the memory of a longer sequence; alike in each call."""
    torch.manual_seed(0)
    if kind == "longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16,
        }
        config = Phi3Config(**SHAPE, max_position_embeddings=128, rope_parameters=rope)
        config.original_max_position_embeddings = 16
        model = Phi3ForSequenceClassification(config)
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = LlamaConfig(**SHAPE, max_position_embeddings=16, rope_parameters=rope)
        model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(6.0)
    return model.eval()


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 200, (n,), generator=generator).tolist()


SEQUENCES = [words(n, seed) for seed, n in enumerate((9, 40, 16, 17, 25, 40, 12))]


def alone(kind):
    """The oracle: every sequence in a model that has seen no other."""
    with torch.no_grad():
        return [float(fresh(kind)(torch.tensor([s])).logits) for s in SEQUENCES]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_company_changes_no_reward(kind, tokenizer):
    expected = alone(kind)
    together = Scorer(fresh(kind), tokenizer)
    for batch_size in (1, 3, 64, 2):
        found = together.score_ids(SEQUENCES, batch_size=batch_size)
        assert found == pytest.approx(expected, abs=1e-5)
    ids, mask = pad_right(SEQUENCES, pad_token_id=0)
    with torch.no_grad():
        naive = fresh(kind)(input_ids=ids, attention_mask=mask).logits[:, 0]
        values = token_values(fresh(kind), ids, mask)
    assert (naive - torch.tensor(expected)).abs().max() > 1e-3, "transformers' own does depend"
    at_end = values[torch.arange(len(SEQUENCES)), mask.sum(1) - 1]
    torch.testing.assert_close(at_end, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_groups_and_gradients(kind):
    """Pairs on both sides of the limit: shared prefixes where all are rotated alike."""
    groups = []
    for seed, (prompt, *rest) in enumerate([(6, 3, 5), (10, 4, 20), (20, 9, 8)]):
        start = words(prompt, seed)
        groups.append([start + words(n, 100 * seed + n) for n in rest])
    expected = []
    model = fresh(kind)
    assert sharing_obstacle(model, pack(groups, pad_token_id=0)) is None
    reference = fresh(kind)
    for s in (s for group in groups for s in group):
        one = torch.tensor([s])
        expected.append(sequence_rewards(reference, one, torch.ones_like(one))[0])
    rows = pack(groups, pad_token_id=0)
    for shared in (True, False):
        for split in (True, False):
            found = group_rewards(model, rows, shared=shared, split=split)[rows.exists]
            torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    torch.sin(torch.stack(expected)).sum().backward()
    torch.sin(found).sum().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_classes():
    long = fresh("longrope").config
    assert frequency_limit(long) == 16
    assert frequency_class(long, 16) == (0,)
    assert frequency_class(long, 17) == frequency_class(long, 90) == (1,)
    dynamic = fresh("dynamic").config
    assert [frequency_class(dynamic, n) for n in (3, 16, 17, 18)] == [(0,), (0,), (17,), (18,)]
    assert frequency_limit(LlamaConfig(**SHAPE)) is None


def test_ppo_beyond_the_limit_is_refused():
    config = fresh("longrope").config
    require_fixed_frequencies(config, 16)
    require_fixed_frequencies(LlamaConfig(**SHAPE), 10**6)
    with pytest.raises(UserError, match="may have 17 tokens, but beyond 16"):
        require_fixed_frequencies(config, 17)
