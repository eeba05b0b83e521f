"""A policy folder from a GGUF file: the same model, its tokenizer, and what ends an answer."""

import importlib.util
import os
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shiftrm.errors import UserError
from shiftrm.models.gguf_file import convert_gguf, split_digits
from shiftrm.models.rendering import encode_prompt, stop_token_ids
from tests.byte_level import byte_level
from tests.gguf_files import model_and_tokenizer, permuted, write_gguf

CHAT = [{"role": "user", "content": "ab 12?"}]


@pytest.fixture
def made():
    return model_and_tokenizer()


def test_the_folder_holds_the_same_model(tmp_path, made):
    """Grouped queries, norms and rotary order: logits as those of the model that was written."""
    model, tokenizer = made
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    found = convert_gguf(path, tmp_path / "policy")
    assert (found.architecture, found.stored) == ("LlamaForCausalLM", "F32")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert read.dtype == torch.float32
    assert not hasattr(read.config, "quantization_config")
    ids = torch.randint(len(tokenizer), (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["policy", "tiny.gguf"]


def test_quantised_weights_are_the_packages_own(tmp_path, made):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = made
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind="Q8_0")
    found = convert_gguf(path, tmp_path / "policy")
    assert found.stored == "Q8_0"
    assert "read back from Q8_0" in found.notes[0]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    kind = gguf.GGMLQuantizationType.Q8_0
    attention = model.model.layers[0].self_attn
    for name, heads in (("q_proj", model.config.num_attention_heads), ("v_proj", None)):
        weight = getattr(attention, name).weight.detach().numpy()
        stored = weight if heads is None else permuted(weight, heads)
        back = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
        if heads is not None:  # the permutation of pairs is undone by its inverse
            rows = back.shape[0]
            back = back.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)
        torch.testing.assert_close(
            getattr(read.model.layers[0].self_attn, name).weight.detach(),
            torch.tensor(back.reshape(weight.shape)),
        )


def test_the_tokenizer_its_template_and_what_ends_an_answer(tmp_path, made):
    model, tokenizer = made
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, tokenizer), tmp_path / "policy")
    read = AutoTokenizer.from_pretrained(tmp_path / "policy")
    split_digits(tokenizer)  # as smollm's own does
    for text in ("ab 12 121\n\n x's <|im_end|>", "äöü 🙂 ab", ""):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.decode(read(text)["input_ids"]) == text
    assert len(read("12")["input_ids"]) == 2
    assert encode_prompt(read, CHAT) == encode_prompt(tokenizer, CHAT)
    generation = GenerationConfig.from_pretrained(tmp_path / "policy")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(read, generation) == (end,)
    assert generation.eos_token_id == read.eos_token_id == end
    # The end of an answer is not what fills rows, though the file says so.
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config
    assert generation.pad_token_id == read.pad_token_id == config.pad_token_id == 0
    assert read.model_max_length == model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("pre", "pieces", "noted"),
    [
        *(("smollm", 2, False), ("gpt-2", 1, False), ("llama-bpe", 1, False), ("qwen2", 2, False)),
        *(("odd-one", 1, True), ("default", 1, True), (None, 1, True)),
    ],
)
def test_numbers_are_split_as_the_file_says(tmp_path, made, pre, pieces, noted):
    path = write_gguf(tmp_path / "tiny.gguf", *made, pre=pre)
    found = convert_gguf(path, tmp_path / "policy")
    read = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert len(read("12")["input_ids"]) == pieces
    assert any("no rule for that" in note for note in found.notes) == noted


def test_without_a_template_and_with_an_output_layer_of_its_own(tmp_path):
    model, tokenizer = model_and_tokenizer(tie_word_embeddings=False)
    tokenizer.chat_template = None
    found = convert_gguf(write_gguf(tmp_path / "t.gguf", model, tokenizer), tmp_path / "policy")
    assert any("no chat template" in note for note in found.notes)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(read.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(read.lm_head.weight, read.model.embed_tokens.weight)


def test_a_wheel_that_holds_the_file(tmp_path, made):
    path = write_gguf(tmp_path / "tiny.gguf", *made)
    wheel = tmp_path / "some-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "some/tiny.gguf")
        archive.writestr("some/__init__.py", "")
    convert_gguf(wheel, tmp_path / "policy")
    convert_gguf(path, tmp_path / "other")
    names = sorted(os.listdir(tmp_path / "policy"))
    assert names == sorted(os.listdir(tmp_path / "other"))
    assert not any(name.endswith(".gguf") for name in names)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def refused(tmp_path, source, message):
    """The message, one line, and nothing written."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        convert_gguf(source, tmp_path / "policy")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("share", [0.001, 0.01, 0.2, 0.6, 0.9, 0.999])
def test_half_downloaded(tmp_path, made, share):
    path = write_gguf(tmp_path / "tiny.gguf", *made)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(5, int(len(whole) * share))])
    refused(tmp_path, path, "not a whole GGUF file .*; fetch it again")
    wheel = tmp_path / "cut.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.gguf", whole)
    wheel.write_bytes(wheel.read_bytes()[: int(len(whole) * share)])
    refused(tmp_path, wheel, "cut.whl: is not a whole archive; fetch it again")


def test_what_is_no_gguf_file(tmp_path, made):
    refused(tmp_path, tmp_path / "gone.gguf", "gone.gguf: no such file")
    (tmp_path / "text.gguf").write_text("GGML, or text")
    refused(tmp_path, tmp_path / "text.gguf", "is not a GGUF file")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a.py", "")
    refused(tmp_path, tmp_path / "empty.whl", "holds 0 GGUF files; expected one")
    refused(
        tmp_path,
        write_gguf(tmp_path / "part.gguf", *made, more={"split.count": 3}),
        "is one of 3 parts; join them with",
    )


def test_what_transformers_does_not_read(tmp_path, made):
    path = write_gguf(tmp_path / "odd.gguf", *made, architecture="rwkv6")
    refused(
        tmp_path, path, "reads no GGUF file of architecture 'rwkv6' .*safetensors files instead"
    )


def test_a_weight_that_is_not_there(tmp_path, made, monkeypatch):
    model, tokenizer = made
    path = tmp_path / "tiny.gguf"
    kept = model.state_dict()
    kept.pop("model.layers.0.mlp.up_proj.weight")
    monkeypatch.setattr(model, "state_dict", lambda: kept)
    refused(tmp_path, write_gguf(path, model, tokenizer), "holds no model.layers.0.mlp.up_proj")


def test_without_the_package(tmp_path, made, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", *made)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a)
    )
    refused(tmp_path, path, r"needs the package gguf: pip install 'shiftrm\[gguf\]'")


def test_digits_are_split_once():
    tokenizer = byte_level(merges=[("1", "2")])
    assert len(tokenizer("12")["input_ids"]) == 1
    split_digits(tokenizer)
    assert len(tokenizer("12")["input_ids"]) == 2
    before = tokenizer.backend_tokenizer.to_str()
    split_digits(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.decode(tokenizer("a 12 b")["input_ids"]) == "a 12 b"
