"""Models of real shapes with random weights, on a CUDA device; everything here is skipped without.

`python -m pytest tests/gpu -s` also prints what was measured. `SHIFTRM_GPU_TESTS=cpu` runs them on
a CPU, to try them (the real shapes take long there).
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer

DEVICE = os.environ.get("SHIFTRM_GPU_TESTS", "cuda")

SHAPES = {
    # SmolLM2-135M's.
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # Little to compile.
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # Drivers and compilers warn of what is not ours.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available() and DEVICE == "cuda":
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def config(shape="smol", **options):
    return LlamaConfig(
        **{
            **SHAPES[shape],
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )


def _made(cls, made):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = cls(made)
    with torch.no_grad():  # random models hardly attend: make what attention adds count
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(2.0)
    return model.eval()


def reward_model(shape="smol", *, attention="sdpa", dtype=torch.float32):
    made = config(shape, num_labels=1)
    made._attn_implementation = attention
    return _made(LlamaForSequenceClassification, made).to(dtype)


def policy(shape="smol", *, vocabulary, dtype=torch.float32):
    """A policy that knows only the tokenizer's words, so that every sample is a text."""
    return _made(LlamaForCausalLM, config(shape, vocab_size=vocabulary)).to(dtype)


def word_rows(prompt_words, response_words, *, rows, seed=0):
    """Pairs of random known words, of 0.6 to 1.4 times the lengths named."""
    from tests.conftest import WORDS

    generator = torch.Generator().manual_seed(seed)
    words = WORDS.split()

    def text(n):
        n = max(1, int(n * (0.6 + 0.8 * torch.rand((), generator=generator))))
        picks = torch.randint(len(words), (n,), generator=generator).tolist()
        return " " + " ".join(words[i] for i in picks)

    return [
        {
            "prompt": text(prompt_words),
            "chosen": text(response_words),
            "rejected": text(response_words),
        }
        for _ in range(rows)
    ]


def group_rows(pairs):
    return [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " the red cat"]}
        for row in pairs
    ]


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """make(model, cls, train=rows, **config) -> trainer"""
    from datasets import Dataset

    def make(model, cls=MetaRMTrainer, *, train, **options):
        args = MetaRMConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "use_cpu": DEVICE == "cpu",
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_steps": 1,
                "learning_rate": 1e-5,
                "bf16": False,
                "activation_checkpointing": False,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                **options,
            }
        )
        extra = {}
        if cls is MetaRMTrainer:
            extra["meta_dataset"] = group_rows(train)
        return cls(
            model,
            args,
            train_dataset=Dataset.from_list(train),
            processing_class=copy.deepcopy(tokenizer),
            **extra,
        )

    return make
