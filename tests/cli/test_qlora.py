"""shiftrm train and adapt with QLoRA: what is written, resumed and refused."""

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from shiftrm.models.scoring import Scorer
from shiftrm.trainers import quantised
from tests.cli.conftest import refused
from tests.conftest import llama_config
from tests.trainers.test_quantised import SIZES, four_bits

TRAIN = "train --model policy --pairs pairs.jsonl --output out"


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**SIZES)).eval()


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")


def test_the_checkpoint_scores_as_the_trained_model(
    shiftrm, files, bitsandbytes, tokenizer, pairs
):  # fmt: skip
    status, said = shiftrm(
        f"{TRAIN} --eval-pairs pairs.jsonl max_steps=3 learning_rate=0.05",
        *("use_peft=true", "--lora-r", "4", "load_in_4bit=true"),
    )
    assert status == 0
    assert "Training 1,856 of" in said.out
    texts = [p["prompt"] for p in pairs], [p["chosen"] for p in pairs]
    whole_model = Scorer.from_pretrained("out")
    assert {p.dtype for p in whole_model.model.parameters()} == {torch.float32}
    with_adapter = PeftModel.from_pretrained(four_bits("policy"), "out/adapter")
    quantised._stay_differentiable_(with_adapter)
    trained_scores = Scorer(with_adapter, tokenizer)(*texts)
    assert whole_model(*texts) == pytest.approx(trained_scores, abs=1e-5)
    on_original = Scorer.from_pretrained("out/adapter")(*texts)
    assert on_original != pytest.approx(trained_scores, abs=1e-4)  # the rounding of the base
    card = (files / "out" / "README.md").read_text()
    assert "The base was held in 4 bits: its dequantised weights with LoRA merged are here" in card


def test_an_interrupted_run_goes_on(shiftrm, files, stopping, bitsandbytes):
    words = f"{TRAIN} max_steps=6 save_steps=2 learning_rate=0.01 use_peft=true load_in_4bit=true"
    assert shiftrm(words.replace("output out", "output straight"))[0] == 0
    stopping(4, KeyboardInterrupt())
    assert shiftrm(words)[0] == 130
    stopping(None)
    status, said = shiftrm(words)
    assert (status, "Continuing from" in said.out) == (0, True)
    one, other = (Scorer.from_pretrained(name).model.state_dict() for name in ("straight", "out"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("method", ["metarm", "contrast", "warm"])
def test_adapt_takes_it_too(method, shiftrm, files, bitsandbytes):
    shiftrm(f"{TRAIN.replace('output out', 'output first')} max_steps=1")
    status, said = shiftrm(
        "adapt --model first --pairs pairs.jsonl --groups groups.jsonl --output out"
        " --eval-groups groups.jsonl"
        f" --method {method} max_steps=2 use_peft=true load_in_4bit=true"
    )
    assert status == 0, said.err
    assert len(Scorer.from_pretrained("out")(["the red"], [" cat"])) == 1


def test_quantisation_without_adapters_is_refused(shiftrm):
    refused(shiftrm, f"{TRAIN} load_in_4bit=true", "load_in_4bit=true: quantised weights are not")


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("bitsandbytes", "load_in_4bit=true needs the package bitsandbytes: pip install 'shiftrm"),
        ("peft", "use_peft=true needs the package peft: pip install 'shiftrm[peft]'"),
    ],
)
def test_a_missing_package_is_named(package, words, shiftrm, monkeypatch):
    monkeypatch.setattr(quantised, f"is_{package}_available", lambda: False)
    refused(shiftrm, f"{TRAIN} use_peft=true load_in_4bit=true", words)
