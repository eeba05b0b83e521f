"""Small real models and tokenizers, built here: there is no model hub on a test machine."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

WORDS = "the a red blue green small large cat dog bird fish runs sits flies swims user assistant"
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + ' ' + m['role'] + ' ' + m['content'] }}"
    "{% if not (loop.last and continue_final_message) %}{{ ' </s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with pad, BOS, EOS and a chat template; ids are stable."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = TEMPLATE
    return fast


LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def move_weights(folder) -> None:
    """Change one tensor of a checkpoint in place, as a training into the same folder would."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 0.01
    save_file(weights, path, {"format": "pt"})


def llama_config(vocabulary: int = 32, **options) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": vocabulary,
            **LLAMA_SIZES,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )


@pytest.fixture
def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama_config(num_labels=1)).eval()


@pytest.fixture
def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """Twelve preference rows of different lengths."""
    return [
        {"prompt": f"the {a} cat", "chosen": f" runs {b} the fish", "rejected": f" sits {c}"}
        for a in ("red", "blue")
        for b in ("small", "large", "green")
        for c in ("a dog", "the red bird flies")
    ]


@pytest.fixture
def groups() -> list[dict]:
    """Six groups of two to four responses."""
    return [
        {"prompt": f"a {a} dog", "responses": [" runs", " sits the", " swims a fish", " flies"][:k]}
        for a in ("red", "blue", "green")
        for k in (2, 4)
    ]


@pytest.fixture
def in_process(monkeypatch):
    """Run stages here: this saves ten seconds of imports in a worker."""
    from shiftrm.pipeline import engine

    def pool(run, waiting, finished, workers, threads):
        for stage in waiting:
            engine.execute(stage, run.root, run.keys[stage.name], run.seed)

    monkeypatch.setattr(engine, "_run_pool", pool)
