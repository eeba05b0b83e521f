"""The model a reward trainer starts from: a trained head is kept, a new one is small and seeded."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.checkpoints import unread_heads
from shiftrm.models.rewards import find_head, quiet_loading, score_head

__all__ = ["load_reward_model", "new_head_"]


def load_reward_model(path: str | Path, *, seed: int, **model_options: Any) -> Any:
    """A sequence-classification model with one label, from a reward model or a policy.

    Args:
        path: checkpoint folder or hub name. If it has no score head, `new_head_` makes one.
        seed: of a new head.
        model_options: for `from_pretrained`; `dtype` is float32 unless given.

    Raises:
        UserError: the checkpoint has a trained head under another name, which would be lost.
        OSError, ValueError, RuntimeError: as `from_pretrained` (nothing there, no classifier of
            this architecture, a head with other than one label).
    """
    dtype = model_options.get("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; give auto, float32, bfloat16 or float16")
        dtype = getattr(torch, dtype)
    options = {
        # As TRL does: on one accelerator the model goes straight to it; several processes place it.
        "device_map": "auto" if _one_accelerator() else None,
        **model_options,
        "dtype": dtype,
        "num_labels": 1,
    }
    with quiet_loading():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(path), output_loading_info=True, **options
        )
    if any("score" in key or "classifier" in key for key in info["missing_keys"]):
        lost = unread_heads(info["unexpected_keys"])
        if lost:
            raise UserError(
                f"{path}: has a head of its own ({lost[0]}) that {type(model).__name__} does not "
                "read, so training would start from a new one; rename it to "
                f"{_head_name(model)}.weight if it is one linear layer, or remove it to start anew"
            )
        new_head_(score_head(model), seed=seed)
    return model


def _head_name(model: nn.Module) -> str:
    head = find_head(model)
    return next(name for name, module in model.named_modules() if module is head)


def _one_accelerator() -> bool:
    state = PartialState()
    return state.num_processes == 1 and state.device.type not in ("cpu", "mps")


@torch.no_grad()
def new_head_(head: nn.Linear, *, seed: int) -> None:
    """Weights from N(0, 1/H^2), H the width, in place; a bias becomes zero.

    Of normalised hidden states the first rewards are then about 1/sqrt(H): every pair starts near
    ln 2, whatever the model's own initialisation is. The draws depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(head.weight.shape, generator=generator) / head.in_features
    head.weight.copy_(draws.to(head.weight.dtype))
    if head.bias is not None:
        head.bias.zero_()
