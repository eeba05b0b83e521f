"""Prompts whose end a tokenizer joins with a response's first word."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shiftrm.data.prompts import count_joined_ends, warn_of_joined_ends


@pytest.fixture(scope="module")
def gpt():
    """Byte-level BPE as GPT-2's, in which a space belongs to the word after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Question: I ask. Answer: The answer. I say a word"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2's: a space is the sign before a word, and one stands before every text."""
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["</s>", "<unk>"], show_progress=False
    )
    backend.train_from_iterator(["Question: I ask. Answer: The answer. I say a word"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", ["gpt", "sentencepiece"])
@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("Answer: ", 1),
        ("Answer:", 0),
        ("Answer", 0),
        ("", 0),
        ([{"role": "user", "content": "Answer: "}], 0),
    ],
)
def test_a_space_at_the_end_is_joined(request, name, prompt, count):
    assert count_joined_ends(request.getfixturevalue(name), [prompt]) == count


def test_a_line_break_stays_apart_where_the_tokenizer_keeps_it(gpt):
    assert count_joined_ends(gpt, ["Answer:\n", "Answer:\n\n", "Answer:\n ", "Answer:  "]) == 2


def test_words_split_at_spaces_are_not_joined(tokenizer):
    """The tests' word-level tokenizer drops spaces: nothing changes at the border."""
    assert count_joined_ends(tokenizer, ["the cat ", "a red dog "]) == 0


def test_the_warning_comes_once_with_the_count(gpt, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_joined_ends(gpt, ["Answer: ", "Answer:", "I ask. "] * 10, source="p.jsonl")
        warn_of_joined_ends(gpt, ["Answer:"] * 10, source="q.jsonl")
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("p.jsonl: 20 of 30 prompts end in white space")
