"""One prefill a prompt, finished rows leave: the tokens are those of transformers' own loop."""

import copy
import itertools
import random

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers.cache_utils import DynamicLayer

from shiftrm.models import decoding
from shiftrm.models.decoding import FEWEST_ROWS, NotShared, RoomyLayer, require_shareable
from shiftrm.models.generation import SamplingConfig, generate
from tests.conftest import LLAMA_SIZES

V, STOP = 40, (2, 5, 7)
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(8, V) for _ in range(length)] for length in (3, 14, 7, 1)]
PROMPTS.append(PROMPTS[1])
PROMPTS.append([0, *PROMPTS[0]])  # begins with the token that pads
K = 9
SETTINGS = (
    SamplingConfig(20),
    SamplingConfig(20, temperature=0.7, top_p=0.8),
    SamplingConfig(20, temperature=0.8, top_p=0.9, repetition_penalty=1.3),
    SamplingConfig(20, temperature=0.0),
)
TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**TOKENS, **LLAMA_SIZES}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    **TOKENS,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SHARING = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "gpt2": transformers.GPT2Config(**GPT2),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "gemma2": transformers.Gemma2Config(**LLAMA, head_dim=8, sliding_window=6),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=6),
    "opt": transformers.OPTConfig(**OPT),
    "bloom": transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
}
RECURRENT = transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4)
HYBRID = transformers.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"])
LONGROPE = transformers.LlamaConfig(
    **LLAMA,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
)


def build(config):
    """A small model with several tokens that end a response."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(STOP))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that a wrong position or mask gives other tokens
    return model


def draw(model, tokenizer, **options):
    """The samples, and the shapes of the ids of all forward passes."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    options = {"prompts": PROMPTS, "config": SETTINGS[0], "num_responses": K, "seed": 1, **options}
    samples = generate(model, tokenizer, **options)
    hook.remove()
    return samples, shapes


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("name", SHARING)
def test_tokens_are_those_of_the_plain_loop(tokenizer, name, config):
    model = build(SHARING[name])
    shared, ours = draw(model, tokenizer, config=config)
    plain, theirs = draw(model, tokenizer, config=config, share_prompts=False)
    assert shared == plain
    rows = len(PROMPTS) * (K if config.temperature else 1)
    assert theirs[0] == (rows, 14), "every response reads its prompt"
    assert ours[0] == (5, 14), "every prompt is read once; two of the six are equal"
    assert len(ours) == len(theirs), "the loop ends with the last response"
    if config.temperature:
        assert {s.finished for s in shared} == {True, False}
        assert {s.response_ids[-1] for s in shared if s.finished} == set(STOP)
        sizes = [rows for rows, _ in ours[1:]]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1] >= FEWEST_ROWS, "finished rows have left"
    assert len({tuple(s.response_ids) for s in shared}) > rows // 3


def test_tokens_are_those_of_a_loop_without_cache_or_padding(tokenizer):
    """Every row alone reads its whole text at every token; the draw is one over all rows."""
    model = build(SHARING["llama"])
    texts = [list(p) for p in PROMPTS for _ in range(K)]
    ended = [False] * len(texts)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for _ in range(20):
            logits = torch.cat([model(torch.tensor([t])).logits[:, -1] for t in texts])
            for row, token in enumerate(torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()):
                texts[row] += [] if ended[row] else [token]
                ended[row] |= token in STOP
            if all(ended):
                break
    samples, _ = draw(model, tokenizer)
    assert [s.prompt_ids + s.response_ids for s in samples] == texts
    assert [s.finished for s in samples] == ended


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt", "bloom"])
def test_short_prompts_are_read_apart_from_long_ones(tokenizer, monkeypatch, name, config):
    """The order of the responses and their tokens stay."""
    monkeypatch.setattr(decoding, "PASS_TOKENS", 5)
    model = build(SHARING[name])
    shared, shapes = draw(model, tokenizer, config=config)
    assert shapes[:3] == [(1, 14), (1, 7), (3, 4)], "lengths 14; 7; 1, 3 and 4"
    assert shared == draw(model, tokenizer, config=config, share_prompts=False)[0]


def test_sliding_windows_are_read_in_one_pass(tokenizer, monkeypatch):
    """Their layers do not keep all tokens."""
    monkeypatch.setattr(decoding, "PASS_TOKENS", 5)
    assert draw(build(SHARING["gemma2"]), tokenizer)[1][0] == (5, 14)


def test_passes_are_the_cheapest_of_all_divisions(monkeypatch):
    """Against every way to cut the sorted lengths."""
    monkeypatch.setattr(decoding, "PASS_TOKENS", 6)

    def cost(parts):
        return sum(6 + len(part) * max(part) for part in parts)

    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.choice([1, 2, 3, 5, 8, 13]) for _ in range(rng.randint(1, 9))]
        parts = decoding.passes(lengths)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        ordered, ways = sorted(lengths), []
        for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
            way = [[ordered[0]]]
            for cut, length in zip(cuts, ordered[1:], strict=True):
                if cut:
                    way.append([])
                way[-1].append(length)
            ways.append(way)
        assert cost([[lengths[i] for i in part] for part in parts]) == min(map(cost, ways))
    assert decoding.passes([4] * 50) == [list(range(50))]


@pytest.mark.parametrize("staying", [0.0, 0.5, 1.0])
def test_who_leaves_when_changes_no_token(tokenizer, monkeypatch, staying):
    model = build(SHARING["gemma2"])
    expected, _ = draw(model, tokenizer, config=SETTINGS[2])
    monkeypatch.setattr(decoding, "STAYING_SHARE", staying)
    samples, shapes = draw(model, tokenizer, config=SETTINGS[2])
    assert samples == expected
    assert (len(set(shapes[1:])) == 1) == (staying == 0.0)


def test_a_small_batch_stays_whole(tokenizer):
    model = build(SHARING["llama"])
    samples, shapes = draw(model, tokenizer, num_responses=2)
    assert any(s.finished for s in samples)
    assert shapes[1:] == [(12, 1)] * (len(shapes) - 1)
    assert samples == draw(model, tokenizer, num_responses=2, share_prompts=False)[0]


def test_adapters_share(tokenizer):
    model = get_peft_model(build(SHARING["llama"]), LoraConfig(task_type="CAUSAL_LM", r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    base = model.get_base_model()
    shapes = []
    base.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    shared, _ = draw(model, tokenizer)
    assert shapes[0] == 5
    assert shared == draw(model, tokenizer, share_prompts=False)[0]


def prompt_tuned():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(build(SHARING["llama"]), settings)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build(RECURRENT), "NoneType is not a plain cache"),
        (lambda: build(HYBRID), "LinearAttentionLayer holds more than keys and values"),
        (lambda: build(LONGROPE), "rotated by the longest row"),
        (prompt_tuned, "prepares its inputs itself"),
    ],
)
def test_what_cannot_share_takes_the_plain_loop(tokenizer, monkeypatch, make, reason):
    model, reasons = make(), []

    def require(*args):
        try:
            require_shareable(*args)
        except NotShared as refusal:
            reasons.append(str(refusal))
            raise

    monkeypatch.setattr(decoding, "require_shareable", require)
    options = {"config": SamplingConfig(21), "num_responses": 3}
    samples, _ = draw(model, tokenizer, **options)
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert samples == draw(model, tokenizer, share_prompts=False, **options)[0]


def test_other_caches_and_inputs_are_refused():
    model = build(SHARING["llama"])
    cache = transformers.DynamicCache(config=model.config)
    require_shareable(model, 30, {"past_key_values": cache, "attention_mask": None})
    static = transformers.StaticCache(config=model.config, max_cache_len=30)
    for inputs, reason in (
        ({"past_key_values": static}, "StaticCache is not a plain cache"),
        ({}, "NoneType is not a plain cache"),
        ({"past_key_values": cache, "token_type_ids": None}, "the model is given token_type_ids"),
    ):
        with pytest.raises(NotShared, match=reason):
            require_shareable(model, 30, inputs)
    model.config.is_encoder_decoder = True
    with pytest.raises(NotShared, match="encoder-decoder"):
        require_shareable(model, 30, {"past_key_values": cache})


def test_the_roomy_layer_holds_what_the_dynamic_layer_does():
    """Random appends and selections; what was returned before stays as it was."""
    torch.manual_seed(0)
    rng, theirs = random.Random(0), DynamicLayer()
    theirs.update(*torch.randn(2, 4, 3, 5, 8))
    ours = RoomyLayer(theirs)
    theirs.batch_select_indices(torch.tensor([0, 0, 3, 3, 3, 2]))
    ours.reorder_cache(torch.tensor([0, 0, 3, 3, 3, 2]))
    for step in range(120):
        if step % 50 == 49:
            kept = torch.arange(theirs.keys.shape[0] - 1)
            theirs.batch_select_indices(kept)
            ours.reorder_cache(kept)
        new = torch.randn(2, theirs.keys.shape[0], 3, rng.choice([1, 1, 1, 40]), 8)
        expected, found = theirs.update(*new), ours.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_under_autocast_all_rows_are_drawn(tokenizer):
    """As PPO with bf16 draws. Fewer rows round otherwise, so a few tokens may differ."""
    model = build(SHARING["llama"])
    with torch.autocast("cpu", torch.bfloat16):
        shared, shapes = draw(model, tokenizer)
        plain, _ = draw(model, tokenizer, share_prompts=False)
    assert shapes[0] == (5, 14)
    equal = sum(a == b for a, b in zip(shared, plain, strict=True))
    assert equal > 0.8 * len(plain)
