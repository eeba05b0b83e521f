"""What a pass of a model costs a token: operations, and bytes that wait for the backward pass.

Counted on the network itself, on tensors without data (the device "meta"). So whatever the
architecture, the adapters and the layers they leave out are counted as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Passes", "count_passes", "guess_passes"]


@dataclass(frozen=True)
class Passes:
    """The costs of one token, in fp32.

    Attributes:
        forward: operations of the layers in a pass without gradient.
        training: of a pass with gradient and the backward pass.
        head: operations of the logits of one token.
        kept: bytes that a forward pass keeps for the backward pass.
        kept_inputs: the same if only the layers' inputs are kept (gradient checkpointing).
        moment: bytes alive at one time in a pass without gradient.
        cache: bytes of keys and values.
        vocabulary: logits of one token.
    """

    forward: float
    training: float
    head: float
    kept: float
    kept_inputs: float
    moment: float
    cache: float
    vocabulary: int


def guess_passes(parameters: int, adapters: int | None) -> Passes:
    """Return 2 operations a parameter and token, 6 or with adapters 4 in training; no memory."""
    train = 6 if adapters is None else 4
    return Passes(2.0 * parameters, float(train * parameters), 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def count_passes(model: Any, parameters: int, adapters: int | None, *, tokens: int) -> Passes:
    """Count the passes of a causal language model on the device "meta", adapters included.

    Args:
        tokens: of the row that is counted; what attention costs a token grows with it, a little.

    Returns:
        `guess_passes` where a model of this architecture cannot run without data.
    """
    config = model.config.get_text_config()
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    kept: dict[Any, int] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta").tril()
    was_training = model.training
    model.eval()
    try:
        with (
            FlopCounterMode(display=False) as operations,
            saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            states = inner.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            forward = operations.get_total_flops()
            states.sum().backward()
        training = operations.get_total_flops()
    except Exception:  # whatever an architecture does with numbers that are not there
        return guess_passes(parameters, adapters)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    cached = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    whole = sum(kept.values()) / tokens
    reached = min(1.0, (training - forward) / max(1, forward)) if adapters is not None else 1.0
    return Passes(
        forward=forward / tokens,
        training=training / tokens,
        head=2.0 * hidden * config.vocab_size,
        kept=whole,
        kept_inputs=min(whole, 4 * hidden * layers * reached + whole / max(1, layers * reached)),
        moment=4.0 * (6 * hidden + 3 * width),
        cache=4.0 * cached,
        vocabulary=config.vocab_size,
    )
