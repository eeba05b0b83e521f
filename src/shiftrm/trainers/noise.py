"""Turn off training noise: dropout, router jitter and other random draws."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shiftrm.errors import UserError
from shiftrm.models.probes import apart
from shiftrm.models.rewards import hidden_states

__all__ = ["require_no_noise", "switch_off_dropout"]

ROUNDING = 1e-3
"""Largest difference between equal passes of kernels with nondeterministic summation order."""


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, wherever a layer stores it, and turn off every jitter.

    TRL's `disable_dropout` reaches `nn.Dropout` modules only. `attention_dropout` of Llama-like
    models is a float passed to the attention function, Falcon's layers read `hidden_dropout` from
    the configuration, and routers of experts (PhiMoE, Mixtral) jitter their inputs. The model's own
    configuration, which is saved with it, stays as it is.
    """
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_rates(module)
        if any(_is_rate(n, v, "jitter", "noise") for n, v in vars(module).items()):
            # A rate may control more than noise: PhiMoE's also decides which experts compete, even
            # in evaluation. So keep the rate and hold the module in evaluation mode.
            module.train = MethodType(_stay_in_evaluation, module)  # type: ignore[method-assign]
            module.train(module.training)
        config = vars(module).get("config")
        if config is not None and not isinstance(module, PreTrainedModel):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _zero_rates(quiet[id(config)])
            module.config = quiet[id(config)]


def _zero_rates(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if _is_rate(name, value, "drop"):
            setattr(owner, name, 0.0)


def _is_rate(name: str, value: Any, *words: str) -> bool:
    return isinstance(value, float) and value > 0 and any(word in name for word in words)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `module.train` so that the module stays in evaluation; its children follow `mode`."""
    nn.Module.train(module, mode)
    module.training = False
    return module


@torch.no_grad()
def require_no_noise(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Check that two passes in training mode are equal; rows [B, T] are padded on the right.

    Passes with the same random numbers show how much the kernels alone differ.

    Raises:
        UserError: passes with other random numbers differ more, or states are not finite.
    """
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            states = []
            for seed in (0, 0, 1, 2, 3):
                torch.manual_seed(seed)
                states.append(hidden_states(model, input_ids, attention_mask))
    finally:
        model.train(was_training)
    first, again, *others = states
    if not bool(first.isfinite().all()):
        raise UserError(
            f"{type(model).__name__} gives states that are not finite: its weights are broken, or "
            "too large for its precision; take another checkpoint, or load it in float32"
        )
    kernels, noise = apart(again, first), max(apart(other, first) for other in others)
    if kernels <= ROUNDING and noise <= 4 * kernels:
        return
    raise UserError(
        f"{type(model).__name__} draws random numbers in training mode that cannot be switched off "
        f"(the states of the same batch differ by {max(noise, kernels):.1e}); set its dropout, "
        "jitter or layer drop to 0 in config.json, or give disable_dropout=False to train with it"
    )
