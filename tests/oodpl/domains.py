"""Small domains in the words of tests/conftest.py, and models in fp64 that read them."""

from dataclasses import replace

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.data.domains import Domain, DomainSplit, write_domains
from shiftrm.oodpl.trainer import OODPLTrainer
from tests.conftest import llama_config
from tests.core.oracle import in_fp64

ANIMALS = {"cats": "cat", "dogs": "dog", "birds": "bird", "fishes": "fish"}
COLOURS = ("red", "blue", "green")


def write_animals(folder) -> None:
    """Write all animals: two sources, one validation domain and one held out."""
    write_domains(
        folder, [make_domain(name) for name in ANIMALS], held_out=["fishes"], validation=["birds"]
    )


def interrupt_training(monkeypatch, *, at: int) -> list[int]:
    """Interrupt meta-training once, at its step of this number; returns the steps it makes."""
    ordinary, steps = OODPLTrainer.training_step, []

    def interrupted(self, *rest):
        steps.append(self.state.global_step)
        if len(steps) == at:
            raise KeyboardInterrupt
        return ordinary(self, *rest)

    monkeypatch.setattr(OODPLTrainer, "training_step", interrupted)
    return steps


def make_domain(name: str, *, rows: int = 8) -> Domain:
    animal = ANIMALS[name]

    def text(i: int) -> str:
        return f" {('runs', 'sits', 'flies', 'swims')[i % 4]} {'small ' * (i % 3)}the {animal}"

    prompts = [f"the {colour} {animal}" for colour in COLOURS]
    return Domain(
        name=name,
        support=tuple(
            {"prompt": prompts[i % 3], "response": text(i), "finished": i % 4 != 3}
            for i in range(rows)
        ),
        query=tuple(
            {"prompt": prompts[i % 3], "chosen": text(i), "rejected": text(i + 1) + " a"}
            for i in range(rows)
        ),
        eval_pairs=tuple(
            {"prompt": f"a large {animal}", "chosen": text(i), "rejected": text(i + 2)}
            for i in range(5)
        ),
        prompts=(f"a large {animal}", f"a small {animal}"),
    )


def make_split(**changes) -> DomainSplit:
    cats, dogs, birds, fishes = (make_domain(name) for name in ANIMALS)
    return replace(DomainSplit(source=(cats, dogs, birds), held_out=(fishes,)), **changes)


def make_models():
    """A reference policy and a reward model, in fp64 throughout."""
    torch.manual_seed(3)
    policy = in_fp64(LlamaForCausalLM(llama_config(initializer_range=0.2)))
    torch.manual_seed(4)
    reward_model = in_fp64(LlamaForSequenceClassification(llama_config(num_labels=1)))
    return policy, reward_model
