"""GGUF files of tiny models, written by the package `gguf` as llama.cpp's converter writes them."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.byte_level import byte_level
from tests.conftest import LLAMA_SIZES

NORMAL, CONTROL = 1, 3
TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def model_and_tokenizer(**sizes):
    """A random Llama with tied embeddings, and a byte-level tokenizer with ChatML's template."""
    tokenizer = byte_level(eos="<|im_end|>", merges=[("1", "2"), ("a", "b"), ("Ġ", "a")])
    torch.manual_seed(0)
    sizes = {**LLAMA_SIZES, "tie_word_embeddings": True, **sizes}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    for parameter in model.parameters():  # norms, too, are no longer ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, tokenizer


def permuted(weight, heads):
    """The order of a rotary projection's rows in llama.cpp."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path, model, tokenizer, *, kind="F32", more=None, architecture="llama", pre="smollm"
):
    """Write a Llama and its tokenizer; its end token also pads.

    Args:
        kind: how matrices are stored, such as "Q8_0".
        more: further integers of the metadata.
    """
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (the extra gguf)")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in (more or {}).items():
        writer.add_uint32(name, value)
    _add_tokenizer(writer, tokenizer, pre)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = weight.numpy().astype(np.float32)
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            data = permuted(data, heads) if part in name else data
        if data.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), data)
        else:
            packed = gguf.quants.quantize(data, quantised)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{TENSORS[rest.removesuffix('.weight')]}.weight"


def _add_tokenizer(writer, tokenizer, pre):
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in vocabulary]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values()
    }
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if word in special else NORMAL for word in words])
    writer.add_token_merges(["1 2", "a b", "Ġ a"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
