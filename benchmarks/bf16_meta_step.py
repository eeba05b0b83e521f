"""Which ways of taking the meta step survive bf16: each one's change of grad L against the truth.

    python benchmarks/bf16_meta_step.py

Truth is `grad L(theta + eta d) - grad L(theta)` in fp64 at the same theta and d. Prints the tables
of docs/bf16-meta-step.md; about a minute on one core.
"""

import argparse
import copy
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from process_memory import peak_bytes, resident_bytes
from shiftrm.core.losses import bradley_terry_loss, difference_loss
from shiftrm.core.meta import (
    look_ahead,
    midpoint_change,
    midpoint_change_by_differences,
)
from shiftrm.core.meta_direction import global_norm, inner_product
from shiftrm.models.scoring import score_head, sequence_rewards

Gradient = list[Tensor]
STEPS = {"eta = 5e-6, sgd": None, "rho = 0.01": 0.01, "rho = 0.05": 0.05, "rho = 0.5": 0.5}


class Case:
    """A model, its pairs and groups, the trainable parameters and their gradients."""

    def __init__(self, model: nn.Module, *, autocast: bool = False, T: int = 32, B: int = 16):
        self.model, self.autocast = model, autocast
        generator = torch.Generator().manual_seed(1)
        self.pairs = torch.randint(1, 256, (2 * B, T), generator=generator)
        self.groups = torch.randint(1, 256, (8 * 4, T), generator=generator)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def wider(self, dtype: torch.dtype) -> "Case":
        case = copy.copy(self)
        case.model, case.autocast = copy.deepcopy(self.model).to(dtype), False
        case.parameters = [p for p in case.model.parameters() if p.requires_grad]
        return case

    def _rewards(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return sequence_rewards(self.model, ids, torch.ones_like(ids))

    def loss(self) -> Tensor:
        return bradley_terry_loss(*self._rewards(self.pairs).chunk(2)).mean()

    def objective(self) -> Tensor:
        return difference_loss(self._rewards(self.groups).view(8, 4)).mean()

    def gradient(self, function: Callable[[], Tensor] | None = None) -> Gradient:
        value = (function or self.loss)()
        return list(torch.autograd.grad(value, self.parameters, materialize_grads=True))


# -- candidates: (case, directions, eta) -> change of grad L -------------------------------------


def in_place(case: Case, directions: Gradient, eta: float) -> Gradient:
    base = case.gradient()
    with look_ahead(case.parameters, directions, meta_learning_rate=eta):
        return minus(case.gradient(), base)


def fp32_copy(case: Case, directions: Gradient, eta: float) -> Gradient:
    return in_place(case.wider(torch.float32), directions, eta)


def virtual(case: Case, directions: Gradient, eta: float) -> Gradient:
    base = case.gradient()
    with virtual_shift(case, directions, eta):
        return minus(case.gradient(), base)


@contextmanager
def virtual_shift(case: Case, directions: Gradient, eta: float) -> Iterator[None]:
    """Every leaf returns leaf(x) + eta * leaf(x; parameters = d), x not detached.

    The score head is read through its weight (shiftrm.models.scoring), so it moves in place.
    """
    by_id = {id(p): d for p, d in zip(case.parameters, directions, strict=True)}
    head = score_head(case.model)
    with ExitStack() as stack:
        for module in case.model.modules():
            own = dict(module.named_parameters(recurse=False))
            if module is head or not any(id(p) in by_id for p in own.values()):
                continue
            shift = {
                n: eta * by_id[id(p)].to(p.dtype) if id(p) in by_id else torch.zeros_like(p)
                for n, p in own.items()
            }

            def hook(
                leaf: nn.Module, args: tuple[Tensor, ...], output: Tensor, shift: dict = shift
            ) -> Tensor:
                with torch.nn.utils.stateless._reparametrize_module(leaf, shift):
                    return output + leaf.forward(*args)

            stack.callback(module.register_forward_hook(hook).remove)
        on_head = [
            d if p is head.weight else torch.zeros_like(d)
            for p, d in zip(case.parameters, directions, strict=True)
        ]
        stack.enter_context(look_ahead(case.parameters, on_head, meta_learning_rate=eta))
        yield


def linearised(case: Case, directions: Gradient, eta: float) -> Gradient:
    from shiftrm.core.curvature import hessian_vector_product

    return [eta * h for h in hessian_vector_product(case.loss, case.parameters, directions)]


def midpoint(case: Case, directions: Gradient, eta: float) -> Gradient:
    return midpoint_change(
        case.loss,
        case.parameters,
        directions,
        meta_learning_rate=eta,
        largest_influence=math.inf,
    )


def midpoint_or_in_place(case: Case, directions: Gradient, eta: float) -> Gradient:
    return midpoint_change(case.loss, case.parameters, directions, meta_learning_rate=eta)


def amplified(case: Case, directions: Gradient, eta: float) -> Gradient:
    change, _ = midpoint_change_by_differences(
        case.gradient,
        case.parameters,
        directions,
        meta_learning_rate=eta,
        compute_type=torch.bfloat16,
    )
    return change


CANDIDATES = {
    "in place": in_place,
    "virtual": virtual,
    "fp32 copy, fp32 arithmetic": fp32_copy,
    "linearised at theta": linearised,
    "midpoint alone": midpoint,
    "`midpoint_change`": midpoint_or_in_place,
    "`midpoint_change_by_differences`": amplified,
}


# -- the tables ----------------------------------------------------------------------------------


def minus(left: Gradient, right: Gradient) -> Gradient:
    return [a.double() - b.double() for a, b in zip(left, right, strict=True)]


def compare(change: Gradient, truth: Gradient) -> str:
    size = global_norm(change) * global_norm(truth)
    cosine = float(inner_product(change, truth) / size) if size > 0 else 0.0
    error = float(global_norm(minus(change, truth)) / global_norm(truth))
    return f"{cosine:.3f} / {error:.2g}"


def table(name: str, case: Case) -> list[str]:
    ascent = case.gradient(case.objective)
    length = float(global_norm(ascent))
    unit = [g.float() / length for g in ascent]
    truth_case = case.wider(torch.float64)
    base = truth_case.gradient()
    truths, influences = {}, []
    for label, rho in STEPS.items():
        change = in_place(truth_case, unit, rho or 5e-6 * length)
        truths[label] = change
        influences.append(f"{float(global_norm(change) / global_norm(base)):.1e}")
    rows = [f"**{name}**: {sum(p.numel() for p in case.parameters):,} trainable parameters", ""]
    rows += [f"| | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    rows.append(f"| influence | {' | '.join(influences)} |")
    for candidate, run in CANDIDATES.items():
        cells = []
        for label, rho in STEPS.items():
            change = run(case, unit, rho or 5e-6 * length)
            cells.append(compare(change, truths[label]))
        rows.append(f"| {candidate} | {' | '.join(cells)} |")
    return [*rows, ""]


@contextmanager
def norms_in_fp64() -> Iterator[None]:
    """Llama's RMSNorm casts to fp32 whatever it is given; inside, an fp64 model keeps fp64."""
    plain = LlamaRMSNorm.forward

    def forward(norm: LlamaRMSNorm, states: Tensor) -> Tensor:
        if states.dtype != torch.float64:
            return plain(norm, states)
        scale = (states.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        return norm.weight * states * scale

    LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = plain


def models() -> dict[str, Case]:
    """Random models, trained for ten steps in fp32, so that their gradients are not degenerate."""
    llama, gpt2 = warmed_up(llama_model()), warmed_up(gpt2_model())
    return {
        "Llama, bf16 weights": Case(copy.deepcopy(llama).to(torch.bfloat16)),
        "GPT-2, bf16 weights": Case(gpt2.to(torch.bfloat16)),
        "Llama, fp32 weights under bf16 autocast": Case(llama, autocast=True),
        "Llama, bf16 LoRA over bf16": Case(with_lora(llama, torch.bfloat16)),
        "Llama, fp32 LoRA over bf16": Case(with_lora(llama, torch.float32)),
    }


def llama_model(width: int = 64, layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.1,
    )
    return LlamaForSequenceClassification(config)


def gpt2_model() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=64,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2ForSequenceClassification(config)


def warmed_up(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        ids = torch.randint(1, 256, (64, 32), generator=generator)
        rewards = sequence_rewards(model, ids, torch.ones_like(ids))
        optimizer.zero_grad()
        bradley_terry_loss(*rewards.chunk(2)).mean().backward()
        optimizer.step()
    return model


def with_lora(model: nn.Module, adapter_type: torch.dtype) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(copy.deepcopy(model).to(torch.bfloat16), config)
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            if "lora_B" in name:  # as after some training; at zero the A's have no gradient
                torch.nn.init.normal_(p, std=0.05)
            if "lora_" in name:  # the head stays in the base's type
                p.data = p.data.to(adapter_type)
    return adapted


def cost() -> list[str]:
    """CPU seconds and peak memory of one micro-batch, each in a process of its own."""
    case = Case(llama_model(width=128).to(torch.bfloat16), T=256, B=4)
    unit = [g / 1.0 for g in case.gradient(case.objective)]
    ways: dict[str, Callable[[], Sequence[Tensor]]] = {"plain gradient of L": case.gradient}
    for name, run in CANDIDATES.items():
        ways[name] = lambda run=run: run(case, unit, 1e-3)
    measured = {name: in_child(way) for name, way in ways.items()}
    seconds, memory = measured["plain gradient of L"]
    rows = ["| | time | memory |", "|---|---|---|"]
    for name, (s, m) in measured.items():
        rows.append(f"| {name} | {s / seconds:.1f} | {m / memory:.1f} |")
    return rows


def in_child(way: Callable[[], object]) -> tuple[float, float]:
    """Least CPU seconds of three runs, and the growth of the peak resident size, in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resident_bytes()
        seconds = []
        for _ in range(3):
            start = time.process_time()
            way()
            seconds.append(time.process_time() - start)
        grown = (peak_bytes() - before) // 1024
        os.write(writer, f"{min(seconds)} {grown}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    s, m = os.read(reader, 100).split()
    return float(s), float(m)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's use of an old name
    logging.getLogger("transformers").setLevel(logging.ERROR)
    costs = cost()
    with norms_in_fp64():
        for name, case in models().items():
            print("\n".join(table(name, case)), flush=True)
    print("\n".join(costs))


if __name__ == "__main__":
    main()
