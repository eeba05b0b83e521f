"""Reward models in fp64 throughout, for tests of the meta step."""

from contextlib import contextmanager

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@contextmanager
def norms_in_fp64():
    """Llama's RMSNorm casts to fp32 whatever it is given; inside, an fp64 model keeps fp64."""
    plain = LlamaRMSNorm.forward

    def forward(norm, states):
        if states.dtype != torch.float64:
            return plain(norm, states)
        scale = (states.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        return norm.weight * states * scale

    LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = plain
