"""Only response tokens go through the LM head: equality to whole logits, gradients, memory."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from shiftrm.models.sampling import Sample
from shiftrm.policies import ppo_passes, ppo_rows
from shiftrm.policies.outcome import AdapterOff
from shiftrm.policies.ppo_math import exact_token_kl, kl_and_entropy, policy_logprobs
from shiftrm.policies.ppo_passes import known_head
from shiftrm.policies.ppo_rows import Rows

V = 23
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "phi": {},  # its head has a bias
}
SAMPLES = [  # unequal prompts and responses, some ended by one of two end tokens, one at once
    Sample([2, 3, 4], [5, 6, 7, 1], True),
    Sample([2], [8, 9, 10, 11, 12, 13], False),
    Sample([2, 5, 6, 7, 8, 9, 10, 11, 12], [22], True),
    Sample([4, 4, 4, 4], [1], True),
    Sample([2, 3, 4], [3, 4, 14, 15, 22], True),
]


def make(name, *, seed=0, dtype=torch.float64):
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # biases too; logits that soft-capping changes
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def with_lora(model, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def in_chunks(monkeypatch):
    """Seven states in a chunk, and no batch so small that all of its columns are computed."""
    monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", 7 * V)
    monkeypatch.setattr(ppo_rows, "FEW_LOGITS", 0)


def plain(model, sample):
    """The log-probabilities of the whole vocabulary at each state, from the model's own logits."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    return model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)


def plain_logprobs(model):
    tables = [plain(model, sample) for sample in SAMPLES]
    return [t[range(len(t)), s.response_ids] for t, s in zip(tables, SAMPLES, strict=True)]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_passes_equal_whole_logits(model, *, atol=1e-10):
    """Log-probabilities and gradients against the models' own logits, row by row."""
    rows = Rows.pack(SAMPLES)
    weights = torch.randn(rows.response_mask.shape, generator=torch.manual_seed(0)).double()
    ours = rows.logprobs(model)
    theirs = plain_logprobs(model)
    for row, expected in enumerate(theirs):
        found = ours[row][rows.response_mask[row]]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert bool((ours[~rows.response_mask] == 0).all())
    model.zero_grad()
    (ours * weights).sum().backward()
    found = gradients(model)
    model.zero_grad()
    flat = weights[rows.response_mask]
    (torch.cat(theirs) * flat).sum().backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol * size, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_the_models_own_logits(in_chunks, name):
    model = make(name)
    assert known_head(model) is not None
    # Norms and rotary tables of transformers are in fp32, also in a model of doubles.
    assert_passes_equal_whole_logits(model, atol=1e-10 if name == "gpt2" else 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_one_pass_over_the_same_rows(monkeypatch, name):
    """The same rows, so that the backbone rounds alike: equal to 1e-10 in fp64, 1e-6 in fp32."""
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        model, other = make(name, dtype=dtype), make(name, seed=1, dtype=dtype)
        rows, found = Rows.pack(SAMPLES), []
        weights = torch.randn(rows.response_mask.shape, generator=torch.manual_seed(0)).to(dtype)
        for few, chunk in ((2**20, 2**24), (0, 2**24), (0, 7 * V), (0, 1)):
            monkeypatch.setattr(ppo_rows, "FEW_LOGITS", few)
            monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", chunk)
            model.zero_grad()
            logprobs = rows.logprobs(model)
            (logprobs * weights).sum().backward()
            kl, entropy = kl_and_entropy(rows.logits(model), rows.logits(other))
            found.append([logprobs, kl, entropy, *gradients(model).values()])
        for parts in found[1:]:
            for part, whole in zip(parts, found[0], strict=True):
                size = max(1.0, float(whole.detach().abs().max()))
                torch.testing.assert_close(part, whole, rtol=0, atol=near * size)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_also_on_the_head(in_chunks, targets):
    model = with_lora(make("llama"), target_modules=targets)
    assert (known_head(model) is None) == ("lm_head" in targets)
    assert_passes_equal_whole_logits(model, atol=1e-5)
    base = policy_logprobs(make("llama"), SAMPLES)[0]
    torch.testing.assert_close(policy_logprobs(AdapterOff(model), SAMPLES)[0], base)
    assert not torch.allclose(policy_logprobs(model, SAMPLES)[0], base, atol=1e-3)


def test_an_adapter_of_virtual_tokens(monkeypatch):
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, rows, found = get_peft_model(make("llama"), options).eval(), Rows.pack(SAMPLES), []
    for few, chunk in ((2**20, 2**24), (0, 2**24), (0, 7 * V)):
        monkeypatch.setattr(ppo_rows, "FEW_LOGITS", few)
        monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", chunk)
        found.append(policy_logprobs(model, SAMPLES)[0])
    assert not torch.allclose(found[0], policy_logprobs(make("llama"), SAMPLES)[0], atol=1e-3)
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0])
    monkeypatch.setattr(type(model.base_model), "get_output_embeddings", lambda self: None)
    torch.testing.assert_close(rows.logits(model), rows._of_few(model))


def test_wrapped_models_project_inside_their_forward_pass(in_chunks, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows, expected = Rows.pack(SAMPLES), torch.cat([plain(make("gemma2"), s) for s in SAMPLES])
    try:
        together = torch.nn.parallel.DistributedDataParallel(make("gemma2"))
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = make("gemma2")
        for layer in (*sharded.model.layers, sharded):
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        for model in (together, sharded):
            with torch.no_grad():
                found = rows.logits(model).log_softmax(-1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


class Unusual(torch.nn.Module):
    """What a model's own code may do after its head, of which no configuration tells."""

    def __init__(self, head, change):
        super().__init__()
        self.head, self.change = head, change

    def forward(self, **inputs):
        output = self.head(**inputs)
        output.logits = self.change(output.logits)
        return output

    @property
    def config(self):
        return self.head.config

    def get_output_embeddings(self):
        return self.head.get_output_embeddings()


@pytest.mark.parametrize(
    "change",
    [lambda z: 3 * z, lambda z: z + 0.1 * torch.arange(V), lambda z: 50 * (z / 50).tanh()],
    ids=["scaled", "shifted", "bounded"],
)
def test_what_follows_the_head_is_noticed_and_kept(in_chunks, change):
    model = Unusual(make("llama"), change)
    assert known_head(model) is None
    assert_passes_equal_whole_logits(model, atol=1e-5)


def test_a_model_that_names_no_head(in_chunks, monkeypatch):
    model = make("llama")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert_passes_equal_whole_logits(model, atol=1e-5)


def test_the_kl_along_samples(in_chunks):
    policy, reference = make("gemma2"), make("gemma2", seed=1)
    expected = []
    with torch.no_grad():
        for sample in SAMPLES:
            log_p, log_q = plain(policy, sample), plain(reference, sample)
            expected.append(float((log_p.exp() * (log_p - log_q)).sum()))
    found = exact_token_kl(policy, reference, SAMPLES, batch_size=2)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_bf16_passes_have_logprobs_in_fp32_and_the_same_gradient_in_chunks(monkeypatch):
    model, rows, found = make("llama", dtype=torch.float32), Rows.pack(SAMPLES), []
    for chunk in (2**24, 7 * V):
        monkeypatch.setattr(ppo_rows, "FEW_LOGITS", 0)
        monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", chunk)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = rows.logprobs(model)
        assert logprobs.dtype == torch.float32
        logprobs.sum().backward()
        found.append([logprobs, *gradients(model).values()])
    for part, whole in zip(*found, strict=True):
        size = max(1.0, float(whole.detach().abs().max()))
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-2 * size)


# Memory


def peak_bytes(function):
    """Largest sum of CPU memory that one call holds at once, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def wide_llama(vocabulary):
    sizes = {**SIZES, "vocab_size": vocabulary, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def update(model, samples):
    rows = Rows.pack(samples)
    model.zero_grad(set_to_none=False)
    rows.logprobs(model).sum().backward()


def test_memory_of_an_update_follows_the_response_tokens_and_not_the_prompts(monkeypatch):
    vocabulary, chunk = 20_000, 16 * 20_000
    monkeypatch.setattr(ppo_passes, "LOGITS_IN_CHUNK", chunk)
    monkeypatch.setattr(ppo_rows, "FEW_LOGITS", 0)
    model = wide_llama(vocabulary)
    logits = 4 * chunk  # bytes of one chunk in fp32
    peaks = {}
    for prompts, responses in (((4, 4), 8), ((4, 50), 8), ((4, 4), 48)):
        samples = [Sample([3] * n, [5] * responses, False) for n in prompts * 4]
        update(model, samples)  # gradients are there
        peaks[prompts, responses] = peak_bytes(lambda samples=samples: update(model, samples))
    # 64 response tokens of rows with 4 to 50 prompt tokens: all columns would be 464 tokens.
    short, unequal, long = peaks.values()
    assert unequal < short + logits
    # Six times the response tokens need no more logits at once: a chunk, its gradient, the head's.
    assert long < short + logits
    assert max(short, unequal, long) < 8 * logits
    whole = 4 * 8 * 48 * vocabulary
    assert max(short, unequal, long) < whole


def test_a_pass_without_gradient_is_cut_by_its_response_tokens(monkeypatch):
    samples = [Sample([3] * n, [5] * 4, False) for n in (1, 60) * 4]
    rows = Rows.pack(samples)
    assert rows.response_mask.shape[1] == 63
    assert rows.within(100 * V, V) == 25  # of 4 tokens each, though the columns are 63
    monkeypatch.setattr(ppo_rows, "LOGITS_AT_ONCE", 8 * V)
    assert [len(part) for part in rows.portions(100, V)] == [2] * 4
    assert copy.deepcopy(rows).tokens.tolist() == [5] * 32
