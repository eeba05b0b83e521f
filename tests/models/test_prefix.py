"""Rows with a shared prefix give the rewards, and gradients, of one row per sequence."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from shiftrm.models.prefix import (
    cheap_split,
    common_prefix_length,
    like_lengths,
    model_inputs,
    pack,
    separate,
    visible,
)
from shiftrm.models.probes import sharing_obstacle
from shiftrm.models.rewards import group_rewards, sequence_rewards

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_labels": 1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOW = {"sliding_window": 9}  # shorter than every sequence of ROWS
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "gemma": {},
    "phi3": {},
    "olmo2": {},
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "smollm3": {},
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
FALL_BACK = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}
GENERATOR = torch.Generator().manual_seed(1)


def tokens(n):
    return torch.randint(3, 200, (n,), generator=GENERATOR).tolist()


def group(prompt, *responses):
    shared = tokens(prompt)
    return [shared + tokens(n) for n in responses]


ROWS = [group(20, 7, 12, 5), group(11, 4, 4), group(30, 1, 16, 2)]


def build(name, implementation="sdpa", **extra):
    options = {**SMALL, **ARCHITECTURES.get(name, {}), **FALL_BACK.get(name, {}), **extra}
    config = AutoConfig.for_model(name, **options)
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation=implementation
    )
    with torch.no_grad():  # random models hardly attend: make what attention adds count
        for key, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in key:
                p.mul_(4.0)
    return model.eval()


def one_by_one(model, rows):
    """The oracle: each sequence alone, no padding, no mask but the model's own."""
    return [
        [
            sequence_rewards(model, torch.tensor([s]), torch.ones(1, len(s)).long())[0]
            for s in sequences
        ]
        for sequences in rows
    ]


def flat(rewards):
    return torch.stack([r for row in rewards for r in row])


def gradients(model, rewards):
    model.zero_grad()
    torch.sin(3.0 * rewards).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_one_row_per_response(name, implementation):
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers: Gemma-2's soft cap needs eager attention")
    model = build(name, implementation)
    rows = pack(ROWS, pad_token_id=0)
    ours = group_rewards(model, rows, shared=True, split=False)[rows.exists]
    alone = flat(one_by_one(model, ROWS))
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    assert alone.std() > 0.01, "rewards that are all alike would show nothing"
    mine, theirs = gradients(model, ours), gradients(model, alone)
    assert mine.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5 * scale, msg=key)
    assert sharing_obstacle(model, rows) is None


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_a_window_left_out_is_noticed(name):
    """The start-up check sees a mask that forgets the window: it would see any wrong mask."""
    model = build(name, "eager")
    rows = pack(ROWS, pad_token_id=0)
    forgetful = copy.deepcopy(model)
    forgetful.config.sliding_window = 10_000  # only our mask reads it: the layers were built
    right = group_rewards(model, rows, shared=True, split=False)
    wrong = group_rewards(forgetful, rows, shared=True, split=False)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("name", FALL_BACK)
def test_others_fall_back(name):
    model = build(name, implementation="eager")
    rows = pack(ROWS, pad_token_id=0)
    assert sharing_obstacle(model, rows), "must be noticed"
    ours = group_rewards(model, rows, shared=False, split=False)[rows.exists]
    torch.testing.assert_close(ours, flat(one_by_one(model, ROWS)), rtol=1e-4, atol=1e-5)


def test_recurrent_models_are_noticed():
    extra = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    model = build("qwen3_next", **extra)
    assert "linear_attention" in sharing_obstacle(model, pack(ROWS, pad_token_id=0))


lengths = st.integers(1, 9)
groups = st.lists(
    st.tuples(st.integers(0, 12), st.lists(lengths, min_size=1, max_size=4), st.integers(0, 10**6)),
    min_size=1,
    max_size=4,
)
LLAMA = build("llama").double()  # RMSNorm still works in fp32


@settings(max_examples=60, deadline=None)
@given(groups, st.sampled_from([None, 8, 32]), st.booleans(), st.integers(3, 6))
def test_any_rows_any_padding_any_company(shape, multiple, split, vocabulary):
    """A reward depends on its sequence alone: not on K, row length, padding or batch."""
    rows = []
    for prompt, responses, seed in shape:
        g = torch.Generator().manual_seed(seed)

        def draw(n, g=g):  # few words, so that responses share beginnings by chance too
            return torch.randint(3, 3 + vocabulary, (n,), generator=g).tolist()

        start = draw(prompt)
        rows.append([start + draw(n) for n in responses])
    packed = pack(rows, pad_token_id=2, pad_to_multiple_of=multiple)
    with torch.no_grad():
        ours = group_rewards(LLAMA, packed, shared=True, split=split)
        plain = group_rewards(LLAMA, packed, shared=False, split=split)
        alone = one_by_one(LLAMA, rows)
    for b, row in enumerate(alone):
        torch.testing.assert_close(ours[b, : len(row)], torch.stack(row), rtol=1e-6, atol=1e-6)
        assert (ours[b, len(row) :] == 0).all()
    torch.testing.assert_close(plain, ours, rtol=1e-6, atol=1e-6)


def test_pack_by_hand():
    rows = pack([[[5, 6, 7], [5, 6, 8, 9]], [[4, 3]]], pad_token_id=0, pad_to_multiple_of=4)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 0, 0, 0, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert rows.segment_ids.tolist() == [
        [0, 0, 1, 2, 2, -1, -1, -1],
        [0, 1, -1, -1, -1, -1, -1, -1],
    ]
    assert rows.ends.tolist() == [[2, 4], [1, -1]]
    assert rows.sequence_lengths.tolist() == [[3, 4], [2, 0]]
    assert rows.lengths.tolist() == [5, 2]
    sees = visible(rows)[0].int().tolist()
    assert sees[2] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert sees[4] == [1, 1, 0, 1, 1, 0, 0, 0], "the second sequence does not see the first's rest"
    assert visible(rows, window=2)[0, 4].int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert visible(rows, window=2)[0, 3].int().tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    ids, mask = separate(rows, pad_token_id=0)
    assert ids.tolist() == [[5, 6, 7, 0], [5, 6, 8, 9], [4, 3, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 1),  # one is the other's beginning: it keeps its last token
        ([[1, 2], [1, 2]], 1),
        ([[1], [2, 1]], 0),
        ([[7, 8, 9]], 2),
        ([[5, 1, 2], [5, 1, 3], [5, 9]], 1),
    ],
)
def test_common_prefix(sequences, shared):
    assert common_prefix_length(sequences) == shared


@pytest.mark.parametrize("groups", [[], [[]], [[[1, 2], []]]])
def test_nothing_to_pack_is_refused(groups):
    with pytest.raises(ValueError, match="needs"):
        pack(groups, pad_token_id=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7),
    st.sampled_from([0.0, 5.0, 1000.0]),
    st.sampled_from([0.0, 70.0]),
)
def test_like_lengths_is_the_cheapest_split(lengths, overhead, least):
    """Against trying every way of cutting the rows, in order of length, into parts."""
    parts = like_lengths(lengths, overhead=overhead, least=least)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))

    def cost(split):
        return sum(max(max(part) * len(part), least) + overhead for part in split)

    ordered = sorted(lengths)
    splits = []
    for cuts in range(2 ** (len(lengths) - 1)):
        split = [[ordered[0]]]
        for i, n in enumerate(ordered[1:]):
            if cuts >> i & 1:
                split.append([])
            split[-1].append(n)
        splits.append(split)
    ours = cost([[lengths[i] for i in part] for part in parts])
    assert ours == pytest.approx(min(map(cost, splits)))


@pytest.mark.parametrize("parameters", [14_000_000, 134_500_000, 8_000_000_000])
def test_few_passes(parameters):
    """A batch of unequal rows is two passes on a CPU, and one where a GPU is not full."""
    lengths = [224, 180, 257, 301, 233, 275, 340, 199]  # pairs of 150/35 tokens
    assert len(cheap_split(lengths, parameters=parameters, device="cpu")) == 2
    assert len(cheap_split(lengths, parameters=parameters, device="cuda")) == 1
    assert len(cheap_split([300] * 8, parameters=parameters, device="cpu")) == 1
    long = [4000] * 7 + [500] * 8  # half a second's padding for 8 B, next to nothing for 14 M
    expected = 1 if parameters < 100_000_000 else 2
    assert len(cheap_split(long, parameters=parameters, device="cuda")) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_positions_that_are_not_used_are_noticed(dtype, scale):
    """Falcon takes position_ids and drops them; in bf16 that is within 5 % of its states."""
    config = AutoConfig.for_model(
        "falcon",
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    assert "position_ids" in sharing_obstacle(model, pack(ROWS, pad_token_id=0))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_no_obstacle_and_a_wrong_mask_is(name, autocast, monkeypatch):
    """Rounding differs as two orders of the same rows do; what rows see of each other, more."""
    model = build(name, "eager" if name == "gemma2" else "sdpa")
    if not autocast:
        model.bfloat16()
    rows = pack(ROWS, pad_token_id=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert sharing_obstacle(model, rows) is None
        # The second sequence sees the first one's rest, too.
        monkeypatch.setattr("shiftrm.models.prefix.visible", _causal)
        assert "hidden states" in sharing_obstacle(model, rows)


def _causal(rows, *, window=None):
    B, L = rows.input_ids.shape
    return torch.ones(L, L, dtype=torch.bool).tril().expand(B, L, L)


def test_lora_and_checkpointing_and_autocast():
    rows = pack(ROWS, pad_token_id=0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    model = get_peft_model(build("llama"), lora).train()
    ours = group_rewards(model, rows, shared=True, split=False)
    plain = group_rewards(model, rows, shared=False, split=False)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    reference = gradients(model, plain[rows.exists])
    model.base_model.model.activation_checkpointing_enable()
    again = gradients(model, group_rewards(model, rows, shared=True, split=False)[rows.exists])
    for key, value in reference.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5, msg=key)
    with torch.autocast("cpu", torch.bfloat16):
        low = group_rewards(model, rows, shared=True, split=False)
        assert sharing_obstacle(model, rows) is None
    assert low.dtype == torch.float32, "the head is computed in fp32"
    torch.testing.assert_close(low, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attentions_mask_is_the_same(window):
    from torch.nn.attention.flex_attention import create_mask

    from shiftrm.models.prefix import _mask_function

    rows = pack(ROWS, pad_token_id=0)
    B, L = rows.input_ids.shape
    theirs = create_mask(_mask_function(rows, window), B, 1, L, L, device="cpu")[:, 0]
    assert torch.equal(theirs, visible(rows, window=window))
    config = AutoConfig.for_model("llama", **SMALL)
    config._attn_implementation = "flex_attention"
    mask = model_inputs(rows, config, dtype=torch.float32)["attention_mask"]
    assert mask.shape[-2:] == (L, L)
