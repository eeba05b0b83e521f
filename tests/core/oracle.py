"""Tiny models and batches, and the hypergradient by autograd through the whole unroll."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shiftrm.core import hypergradient as bilevel
from shiftrm.core.hypergradient import (
    Hypergradient,
    InnerBatch,
    InnerProblem,
    InnerSettings,
    OuterBatch,
    Sequences,
)
from shiftrm.models.rewards import sequence_rewards

VOCABULARY = 23
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large, so that curvature matters
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8}


def in_fp64(model: nn.Module) -> nn.Module:
    """The model in fp64 throughout: transformers' RMSNorm computes in fp32, always."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model.double().eval()


def make_policy(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    if family == "llama":
        return in_fp64(LlamaForCausalLM(LlamaConfig(**{**GROUPED, **options})))
    if family == "qwen3":
        return in_fp64(Qwen3ForCausalLM(Qwen3Config(**{**GROUPED, **options})))
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **{**GROUPED, **options},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            experts_implementation="eager",
        )
        return in_fp64(Qwen3MoeForCausalLM(config))
    if family == "opt":  # ReLU
        shape = {**SHAPE, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0}
        del shape["intermediate_size"], shape["initializer_range"]
        return in_fp64(OPTForCausalLM(OPTConfig(**{**shape, **options})))
    if family == "gpt_neox":
        return in_fp64(GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, **options})))
    assert family == "gpt2"
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **options,
    )
    return in_fp64(GPT2LMHeadModel(config))


def make_reward_model() -> nn.Module:
    torch.manual_seed(2)
    config = LlamaConfig(**{**GROUPED, "vocab_size": 19, "initializer_range": 0.1}, num_labels=1)
    model = in_fp64(LlamaForSequenceClassification(config))
    nn.init.normal_(model.score.weight, std=0.1)
    return model


def make_sequences(B: int, generator: torch.Generator, *, longest: int = 9) -> Sequences:
    """Prompts and responses of unequal lengths; padding ids are arbitrary words.

    The pad token also stands inside sequences, as where pad is EOS.
    """

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (B,), generator=generator)

    prompt, length = draw(1, 4), draw(5, longest + 1)
    length[0] = longest
    columns = torch.arange(longest)[None]
    ids = torch.randint(0, VOCABULARY, (B, longest), generator=generator)
    attention = columns < length[:, None]
    response = (columns >= prompt[:, None]) & attention
    return Sequences(ids, attention.long(), response.long())


def make_problem(
    D: int, *, B: int = 3, seed: int = 0, ragged: bool = True
) -> tuple[list[InnerBatch], OuterBatch]:
    generator = torch.Generator().manual_seed(seed)
    inner = []
    for t in range(D):
        policy = make_sequences(B, generator, longest=9 - t % 2)
        reward_ids = torch.randint(0, 19, (B, 7), generator=generator)
        length = torch.randint(3, 8, (B, 1), generator=generator)
        inner.append(InnerBatch(policy, reward_ids, (torch.arange(7)[None] < length).long()))
    outer = OuterBatch(make_sequences(4, generator), make_sequences(4, generator, longest=7))
    return inner, outer


def hypergradient(
    policy: nn.Module,
    reward_model: nn.Module,
    inner_batches: list[InnerBatch],
    outer_batch: OuterBatch,
    *,
    return_adapted: bool = False,
    **settings: Any,
) -> Hypergradient:
    """Ours, with arguments as for `whole_unroll`."""
    problem = InnerProblem(policy, reward_model, inner_batches, sequence_rewards)
    return bilevel.hypergradient(
        problem, outer_batch, InnerSettings(**settings), return_adapted=return_adapted
    )


def whole_unroll(
    policy: nn.Module,
    reward_model: nn.Module,
    inner_batches: list[InnerBatch],
    outer_batch: OuterBatch,
    *,
    inner_learning_rate: float,
    beta: float,
    normalize_weights: bool = False,
    reduction: str = "sum",
    detach_before: int = 0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """L and dL/dphi, by holding the graph of all D steps. Written from the formulas alone.

    Steps before `detach_before` are taken, but not differentiated.
    """
    theta = {name: p.detach().clone().requires_grad_() for name, p in policy.named_parameters()}
    moving = [name for name, p in policy.named_parameters() if p.requires_grad]

    def log_likelihood(batch: Sequences) -> torch.Tensor:
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = functional_call(policy, theta, (), {**arguments, "use_cache": False}).logits
        token = F.log_softmax(logits[:, :-1], dim=-1)
        token = token.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        mask = batch.response_mask[:, 1:].to(token.dtype)
        total = (token * mask).sum(1)
        return total if reduction == "sum" else total / mask.sum(1)

    with sdpa_kernel(SDPBackend.MATH):
        for t, batch in enumerate(inner_batches):
            rows = torch.arange(len(batch.reward_input_ids))
            last = batch.reward_attention_mask.sum(1) - 1
            hidden = reward_model.model(
                input_ids=batch.reward_input_ids, attention_mask=batch.reward_attention_mask
            ).last_hidden_state
            rewards = reward_model.score(hidden)[rows, last, 0]
            weights = torch.exp(rewards / beta)
            if normalize_weights:
                weights = weights / weights.mean()
            loss = -(weights * log_likelihood(batch.policy)).mean()
            gradient = torch.autograd.grad(
                loss, [theta[n] for n in moving], create_graph=True, materialize_grads=True
            )
            for name, g in zip(moving, gradient, strict=True):
                theta[name] = theta[name] - inner_learning_rate * g
                if t < detach_before:
                    theta[name] = theta[name].detach().requires_grad_()
        margin = log_likelihood(outer_batch.chosen) - log_likelihood(outer_batch.rejected)
        outer = -F.logsigmoid(margin).mean()
        phi = {n: p for n, p in reward_model.named_parameters() if p.requires_grad}
        gradient = torch.autograd.grad(outer, list(phi.values()), materialize_grads=True)
    return outer.item(), dict(zip(phi, gradient, strict=True))


def relative_error(ours: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> float:
    """The worst over parameters of `||ours - oracle|| / ||oracle||`."""
    assert ours.keys() == oracle.keys()
    errors = [float((ours[n] - o).norm() / o.norm()) for n, o in oracle.items()]
    return max(errors)
