"""A reward-model step on packed pairs, as OpenRLHF documents `--ds.packing_samples`.

Written from its documentation, not copied: the chosen sequences of all pairs and then the rejected
ones make one row of T tokens without padding; position ids restart, attention stays within a
sequence, and a reward is read at each sequence's end. No prompt is shared.

To be as fast as it can be, this is a bare loop: the data is tokenised before, the head sees the
ends only, and attention is the fastest that torch has for sequences of several lengths: causal
`scaled_dot_product_attention` for each on a CPU, `varlen_attn` (FlashAttention) on a GPU.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer

NAME = "packed_peer"

_lengths: list[int] = []
"""Tokens of each sequence of the pass; the layers read it."""

_ends = torch.zeros(0, dtype=torch.int32)
"""On a GPU: where the sequences begin and the last one ends, made once a pass."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: [1, T, heads, D] from [1, heads, T, D]."""
    gqa = query.shape[1] != key.shape[1]
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        states = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        longest = max(_lengths)
        run, options = _varlen()
        return run(*states, _ends, _ends, longest, longest, **options(scaling))[None], None
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        for q, k, v in zip(*(t.split(_lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


@cache
def _varlen() -> tuple[Callable[..., Tensor], Callable[[float], dict]]:
    """FlashAttention for sequences of several lengths, and its options in this torch."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    gqa = {"enable_gqa": True} if "enable_gqa" in takes else {}

    def options(scaling: float) -> dict:
        return causal | gqa | ({"scale": scaling} if "scale" in takes else {})

    return varlen_attn, options


def use(model: nn.Module) -> None:
    """Let the model's layers use this attention; it then gets no mask.

    A layer may have a configuration of its own, as in a model whose dropout was switched off.
    """
    AttentionInterface.register(NAME, attend)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME


def packed_rewards(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Rewards of the sequences in one pass, [N].

    On a GPU the row is filled up to a multiple of 128 tokens, which matrix products like.
    """
    global _ends
    device = model.device
    filled = sequences
    if device.type == "cuda" and (missing := -sum(map(len, sequences)) % 128):
        filled = [*sequences, [0] * missing]
    _lengths[:] = map(len, filled)
    ids = torch.tensor([[token for s in filled for token in s]], device=device)
    places = torch.cat([torch.arange(n) for n in _lengths])[None].to(device)
    _ends = torch.tensor([0, *_lengths], device=device).cumsum(0).to(torch.int32)
    ends = _ends[1 : len(sequences) + 1].long() - 1
    states = model.model(
        input_ids=ids, position_ids=places, attention_mask=None, use_cache=False
    ).last_hidden_state
    return F.linear(states[0, ends], model.score.weight).float()[:, 0]


@torch.no_grad()
def require_rewards(model: nn.Module, sequences: list[list[int]]) -> None:
    """Check the packed rewards against each sequence alone."""
    together = packed_rewards(model, sequences)
    alone = torch.cat([packed_rewards(model, [s]) for s in sequences])
    spread = float(alone.std())
    allowed = 0.3 if next(model.parameters()).dtype == torch.bfloat16 else 1e-3
    off = float((together - alone).abs().max())
    assert spread > 0, "rewards that are all alike would show nothing"
    assert off <= allowed * spread, f"the packed peer is off by {off}, its rewards vary by {spread}"


def steps(
    model: nn.Module,
    batches: Iterator[list[tuple[list[int], list[int]]]],
    trainer: Trainer,
    *,
    end_of_step: Callable[[], None],
) -> float:
    """Train on batches of (chosen, rejected) token ids; returns the last loss.

    Args:
        trainer: one of the other arms, not run; its settings give the optimizer and the precision.
        end_of_step: called after every optimizer step.
    """
    args = trainer.args
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = cls(model.parameters(), **options)
    model.train()
    use(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = torch.zeros(())
    for pairs in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(args.bf16)):
            rewards = packed_rewards(model, [s for side in zip(*pairs, strict=True) for s in side])
        chosen, rejected = rewards.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end_of_step()
    return float(loss.detach())
