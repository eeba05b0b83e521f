"""Checks that weights and gradients are finite."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiftrm.errors import UserError


def broken_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite; None if all are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            return name
    return None


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model whose weights are not finite before its first pass fails less clearly.

    Raises:
        UserError: names the model (`name`) and the parameter.
    """
    weight = broken_weight(model)
    if weight is not None:
        raise UserError(
            f"{name}: its weight {weight} holds NaN or infinite numbers, because the training "
            "that made it failed; use an earlier checkpoint"
        )


def require_finite_gradient(
    trainer: Any,
    norm: Any,
    *,
    found: Callable[[], str] = str,
    advice: str = "Lower learning_rate or set max_grad_norm",
) -> None:
    """Refuse a gradient norm that is not finite; the optimizer has not stepped yet.

    Args:
        trainer: a transformers `Trainer`.
        norm: the gradient norm; None if there is none.
        found: returns what is known about the cause, in brackets; called only on failure.
        advice: what the user can do.

    Raises:
        UserError: names the step and the last checkpoint of an earlier step.
    """
    if norm is None or math.isfinite(float(norm)) or trainer.args.fp16:  # fp16's scaler skips it
        return
    raise UserError(
        f"step {trainer.state.global_step + 1}: the gradient is not finite{found()}; stopped "
        "before it reached the weights. Last good checkpoint: "
        f"{_last_good_checkpoint(trainer)}. {advice}"
    )


def _last_good_checkpoint(trainer: Any) -> str:
    """Return the last checkpoint before this step; one of this step would hold bad weights."""
    folders = Path(trainer.args.output_dir).glob("checkpoint-*")
    steps = [int(f.name[11:]) for f in folders if f.name[11:].isdigit()]
    good = [step for step in steps if step < trainer.state.global_step]
    if not good:
        return "none was saved"
    return str(Path(trainer.args.output_dir) / f"checkpoint-{max(good)}")
