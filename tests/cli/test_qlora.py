"""shiftrm train and adapt with QLoRA: what is written, resumed and refused."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

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
    quantised.stay_differentiable_(with_adapter)
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


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_policy_is_optimised_and_merged(method, shiftrm, files, bitsandbytes):
    """Gradients reach the adapters below quantised layers, also after the policy has sampled."""
    shiftrm(f"{TRAIN.replace('output out', 'output rm')} max_steps=1 learning_rate=0.1")
    own = {
        "ppo": "steps=1 prompts_per_step=2 rollouts_per_prompt=2 minibatch_size=4 kl_samples=0 "
        "max_new_tokens=4 reward_mean=0 reward_std=1",
        "grpo": "max_steps=1 per_device_train_batch_size=4 num_generations=2 kl_samples=0 "
        "max_completion_length=4",
    }
    status, said = shiftrm(
        f"optimise {method} --policy policy --reward rm --prompts prompts.jsonl --output out "
        f"{own[method]} learning_rate=0.05 use_peft=true load_in_4bit=true"
    )
    assert status == 0, said.err
    made = AutoModelForCausalLM.from_pretrained("out")
    assert not hasattr(made.config, "quantization_config")
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    held = AutoModelForCausalLM.from_pretrained(
        "policy",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    quantised.stay_differentiable_(held)
    ids = torch.tensor([[1, 5, 9, 4, 12]])
    with torch.no_grad():
        base = held(ids).logits.clone()
        adapted = PeftModel.from_pretrained(held, "out/adapter")(ids).logits
        torch.testing.assert_close(made(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, adapted, atol=1e-5)
