"""SmolLM2-135M from its GGUF file: it answers, stops, and reads text as in its training."""

import pytest
from transformers import AutoTokenizer

from shiftrm.models.generation import load_policy
from shiftrm.models.gguf_file import convert_gguf
from shiftrm.models.rendering import encode_prompt, stop_token_ids
from shiftrm.models.sampling import Draws, SamplingConfig, sample_rows
from tests.smollm2 import smollm2_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "policy"
    found = convert_gguf(smollm2_file(), target)
    assert found.architecture == "LlamaForCausalLM"
    assert found.parameters == 134_515_008
    return target


def test_the_template_and_the_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = [{"role": "user", "content": "What is 12 + 30?"}]
    text = tokenizer.decode(encode_prompt(tokenizer, prompt))
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("12 + 30")["input_ids"])
    assert pieces == ["1", "2", "Ġ+", "Ġ", "3", "0"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192


def test_it_answers_and_stops(folder):
    model, tokenizer = load_policy(folder)
    assert stop_token_ids(tokenizer, model.generation_config) == (2,)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    questions = ["What is the capital of France?", "Name three colors.", "Name three colours."]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=24)
    rows = sample_rows(model, tokenizer, prompts, Draws(greedy, 1, batch_size=3))  # rows are filled
    first, second, third = (row["responses"][0] for row in rows)
    assert first == "The capital of France is Paris."
    assert second == "1. Red\n2. Blue\n3. Green"
    assert third.startswith("1. Red: This is ")
    assert [row["finished"][0] for row in rows] == [True, True, False]
