"""One flat row without padding gives the rewards, and gradients, of one row per sequence."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from transformers import AttentionInterface

from shiftrm.core.curvature import hessian_vector_product
from shiftrm.models import packed as module
from shiftrm.models.packed import (
    FlatRows,
    attend_by_rows,
    flat_inputs,
    flat_mask_function,
    flatten,
    packing_obstacle,
    plan_calls,
)
from shiftrm.models.prefix import SharedRows, pack, visible
from shiftrm.models.probes import sharing_obstacle
from shiftrm.models.rewards import group_rewards
from tests.models.test_prefix import (
    ARCHITECTURES,
    LLAMA,
    ROWS,
    _causal,
    build,
    flat,
    gradients,
    group,
    groups,
    one_by_one,
)

SDPA = [name for name in ARCHITECTURES if name != "gemma2"]  # whose soft cap needs eager attention


def packed_rewards(model, rows):
    return group_rewards(model, rows, shared=True, split=False, packed=True)


@pytest.fixture
def passes(monkeypatch):
    """The shape of every flat row that a model was given."""
    seen = []
    monkeypatch.setattr(
        "shiftrm.models.rewards.flat_inputs",
        lambda flat, config: seen.append(tuple(flat.input_ids.shape)) or flat_inputs(flat, config),
    )
    return seen


@pytest.mark.parametrize("name", SDPA)
def test_equals_one_row_per_response(name, passes):
    model = build(name)
    rows = pack(ROWS, pad_token_id=0)
    before = copy.deepcopy(model.config.to_dict())
    ours = packed_rewards(model, rows)[rows.exists]
    assert passes == [(1, int(rows.lengths.sum()))]
    assert model.config.to_dict() == before
    alone = flat(one_by_one(model, ROWS))
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(model, ours), gradients(model, alone)
    assert mine.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5 * scale, msg=key)
    assert sharing_obstacle(model, rows, packed=True) is None


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(3, 6))
def test_any_rows_any_company(shape, vocabulary):
    """Not K, row length or the other rows of the pass count, nor how a row's calls are chosen."""
    rows = []
    for prompt, responses, seed in shape:
        g = torch.Generator().manual_seed(seed)

        def draw(n, g=g):
            return torch.randint(3, 3 + vocabulary, (n,), generator=g).tolist()

        start = draw(prompt)
        rows.append([start + draw(n) for n in responses])
    packed = pack(rows, pad_token_id=2, pad_to_multiple_of=8)
    with torch.no_grad():
        ours = packed_rewards(LLAMA, packed)
        alone = one_by_one(LLAMA, rows)
    for b, row in enumerate(alone):
        torch.testing.assert_close(ours[b, : len(row)], torch.stack(row), rtol=1e-6, atol=1e-6)
        assert (ours[b, len(row) :] == 0).all()


def test_flatten_by_hand():
    rows = pack([[[5, 6, 7], [5, 6, 8, 9]], [[4, 3]]], pad_token_id=0, pad_to_multiple_of=4)
    found = flatten(rows, multiple=4)
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 0]]
    assert found.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0]]
    assert found.segment_ids.tolist() == [[0, 0, 1, 2, 2, 0, 1, 0]]
    assert found.row_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1]]
    assert found.ends.tolist() == [[2, 4, 6]]
    assert found.sizes == [[2, 1, 2], [1, 1]]
    assert flatten(rows).input_ids.shape == (1, 7)


def test_calls_by_hand():
    """Short answers are one call beside the prompt's; long ones each see their own past only."""
    plan = plan_calls([[350, 35, 35], [50, 250, 250], [0, 3, 4], [7, 2]])
    calls = [(call.pieces, call.sizes, call.start) for call in plan.calls]
    assert calls == [
        ((0,), (0, 350), 0),
        ((0, 1), (350, 35, 35), 350),
        ((2, 3), (50, 250), 0),
        ((2, 4), (50, 250), 50),
        ((5, 6), (0, 3), 0),
        ((5, 7), (0, 4), 0),
        ((8, 9), (7, 2), 0),
    ]
    assert plan.queries == [350, 70, 300, 250, 3, 4, 9]
    assert plan.keys == [350, 70, 50, 250, 250, 0, 3, 4, 7, 2]


def whole_mask(rows, flat_rows, window):
    """The rule written out: bool [T, T], block by block from `visible`."""
    T = flat_rows.input_ids.shape[1]
    mask = torch.zeros(T, T, dtype=torch.bool)
    at = 0
    for sees, n in zip(visible(rows, window=window), rows.lengths.tolist(), strict=True):
        mask[at : at + n, at : at + n] = sees[:n, :n]
        at += n
    return mask


@pytest.mark.parametrize("window", [None, 1, 4, 17])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_calls_are_attention_with_the_whole_mask(window, heads):
    groups = [*ROWS, group(0, 3, 5), group(40, 2, 2, 2), group(2, 30, 20, 10), group(5, 6)]
    rows = pack(groups, pad_token_id=0)
    flat_rows = flatten(rows)
    T = flat_rows.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, T, 8, generator=generator, dtype=torch.double, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    mask = module._row_mask(flat_rows, window)
    ours = attend_by_rows(mask, query, key, value, scale=0.3)
    scores = 0.3 * query @ key.repeat_interleave(heads[0] // heads[1], 1).transpose(2, 3)
    sees = whole_mask(rows, flat_rows, window)
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    theirs = (weights @ value.repeat_interleave(heads[0] // heads[1], 1)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.double)
    for mine, other in zip(
        torch.autograd.grad(ours, (query, key, value), weight),
        torch.autograd.grad(theirs, (query, key, value), weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attentions_mask_is_the_same(window):
    rows = pack(ROWS, pad_token_id=0)
    flat_rows = flatten(rows, multiple=128)
    T = flat_rows.input_ids.shape[1]
    theirs = create_mask(flat_mask_function(flat_rows, window), 1, 1, T, T, device="cpu")[0, 0]
    n = int(rows.lengths.sum())
    assert n < T
    assert torch.equal(theirs[:n, :n], whole_mask(rows, flat_rows, window)[:n, :n])
    assert not theirs[:n, n:].any()
    assert theirs.any(1).all(), "the rows that fill it up must see something"


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_the_gpus_path_gives_the_same_rewards(name, monkeypatch):
    """FlexAttention computes them here without a kernel of its own, forward only."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *tensors, training, **options: flex_attention(*tensors, **options),
    )
    model = build(name)
    rows = pack(ROWS, pad_token_id=0)
    with torch.no_grad():
        expected = packed_rewards(model, rows)
        kinds = []
        make = module._block_mask
        monkeypatch.setattr(module, "_row_mask", lambda *a: kinds.append(make(*a)) or kinds[-1])
        ours = packed_rewards(model, rows)
    assert kinds
    assert all(isinstance(mask, BlockMask) for mask in kinds)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing(name, reentrant):
    """A layer that is run again gets the same mask, also as a detached copy."""
    model = build(name).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    rows = pack(ROWS, pad_token_id=0)
    reference = gradients(model, packed_rewards(model, rows)[rows.exists])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, packed_rewards(model, rows)[rows.exists])
    for key, value in reference.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6, msg=key)


# Dynamo looks at .grad of every input, and hides torch's warning only where it is not an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_are_compiled_once():
    """Whatever the lengths of a batch's rows; attention row by row stays outside the graphs."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    batches = [pack([group(n, 6, 7 + n), group(30 + n, 4, 9)], pad_token_id=0) for n in (9, 20, 31)]
    model = build("llama")
    wanted = [gradients(model, packed_rewards(model, rows)[rows.exists]) for rows in batches]
    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=True)
    seen = []
    for rows, reference in zip(batches, wanted, strict=True):
        found = gradients(model, packed_rewards(model, rows)[rows.exists])
        for key, value in reference.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
        seen.append(len(compiled))
    assert seen[0] > 0
    assert seen == [seen[0]] * 3


def test_lora_and_autocast():
    rows = pack(ROWS, pad_token_id=0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    model = get_peft_model(build("llama"), lora).train()
    plain = group_rewards(model, rows, shared=False, split=False)
    torch.testing.assert_close(packed_rewards(model, rows), plain, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = packed_rewards(model, rows)
        assert sharing_obstacle(model, rows, packed=True) is None
    assert low.dtype == torch.float32, "the head is computed in fp32"
    torch.testing.assert_close(low, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mask_is_noticed(dtype, monkeypatch):
    """The second sequence sees the first one's rest, too."""
    model = build("llama").to(dtype)
    rows = pack([group(40, 6, 6, 6), group(30, 4, 4)], pad_token_id=0)  # rests in one call
    assert sharing_obstacle(model, rows, packed=True) is None
    monkeypatch.setattr("shiftrm.models.prefix.visible", _causal)
    assert "hidden states" in sharing_obstacle(model, rows, packed=True)


def test_second_derivatives():
    """An exact product with the Hessian goes through the rows' attention."""
    model = build("llama").double()
    rows = pack(ROWS, pad_token_id=0)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def product(packed):
        def loss():
            rewards = group_rewards(model, rows, shared=True, split=False, packed=packed)
            return torch.sin(rewards[rows.exists]).sum()

        return hessian_vector_product(loss, parameters, vectors)

    for ours, theirs in zip(product(True), product(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_other_masks_get_transformers_own_attention():
    """The registered function adds two kinds of mask and changes nothing else."""
    model = build("llama")
    rows = pack(ROWS, pad_token_id=0)
    with torch.no_grad():
        packed_rewards(model, rows)
        with_ours = group_rewards(model, rows, shared=True, split=False)
        ours = AttentionInterface._global_mapping["sdpa"]
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("sdpa", sdpa_attention_forward)
        try:
            theirs = group_rewards(model, rows, shared=True, split=False)
        finally:
            AttentionInterface.register("sdpa", ours)
    assert ours is not sdpa_attention_forward
    assert torch.equal(with_ours, theirs)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_rows_cannot_compute_is_refused(name):
    rows = flatten(pack(ROWS, pad_token_id=0))
    flat_inputs(rows, build("llama").config)
    attend = AttentionInterface._global_mapping["sdpa"]
    states = torch.zeros(1, 2, rows.input_ids.shape[1], 4)
    with pytest.raises(ValueError, match=name):
        attend(None, states, states, states, module._row_mask(rows, None), **{name: 1.0})


@pytest.mark.parametrize(
    ("implementation", "parameters", "device", "said"),
    [
        ("sdpa", 10**7, "cpu", None),
        ("sdpa", 10**5, "cpu", "not faster for a model of 100,000 parameters"),
        ("eager", 10**7, "cpu", "'eager'"),
        ("flex_attention", 10**7, "cpu", "'flex_attention'"),
        ("flex_attention", 10**7, "cuda", None),
        ("sdpa", 10**7, "cuda", "not faster"),
        ("sdpa", 8 * 10**9, "cuda", None),
        ("sdpa", 8 * 10**9, "mps", "kind of device"),
    ],
)
def test_which_models_are_packed(implementation, parameters, device, said):
    config = build("llama").config
    config._attn_implementation = implementation
    found = packing_obstacle(config, parameters=parameters, device=device)
    assert found is said if said is None else said in found


def test_flat_rows_are_of_the_rows_device():
    found = flatten(SharedRows(*(t.clone() for t in pack(ROWS, pad_token_id=0))))
    assert isinstance(found, FlatRows)
    assert {t.device.type for t in found if isinstance(t, torch.Tensor)} == {"cpu"}
