"""What a MetaRM step keeps: until the optimizer steps, and in checkpoints."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from shiftrm.core.meta import AdaptiveState
from shiftrm.trainers.sharding import sharded_like, whole_on_main

META_STATE_FILE = "meta_state.safetensors"
"""The checkpoint file with Adam's moments of grad J (meta_step "adaptive"), or with the length of
the last step ("effect")."""

LENGTH = "length"
"""The entry of that length."""


@dataclass
class MetaStepState:
    """State shared by the micro-batches of one optimizer step.

    Attributes:
        directions: the step made from grad J, one tensor per parameter.
        eta: what Eq. 3 multiplies them by.
        objective_gradient: grad J itself, kept only for the exact order.
        skipped: whether grad J was not finite; the directions are then zero.
        change: sum over micro-batches of grad L(theta') - grad L(theta) (meta_shift "midpoint").
        signs: signs of the reward differences in J at theta, by micro-batch.
        waiting: `.grad` left before the step by a streamed epoch, or None.
    """

    directions: list[Tensor]
    eta: float
    objective_gradient: list[Tensor] | None
    skipped: bool
    change: list[Tensor]
    signs: list[Tensor] = field(default_factory=list)
    waiting: list[Tensor] | None = None


def meta_state(moments: AdaptiveState, length: float, *, is_main: bool) -> dict[str, Tensor]:
    """Return what a checkpoint holds, by name; empty on other processes, which must call it, too.

    Args:
        length: of the last step; 0 if there was none.
    """
    kept = whole_on_main(moments.tensors(), is_main=is_main) if moments.steps else {}
    if length and is_main:
        kept[LENGTH] = torch.tensor(length, dtype=torch.float64)
    return kept


def read_meta_state(path: Path, parameters: Iterable[Tensor]) -> tuple[AdaptiveState, float]:
    """Return moments and length from a checkpoint's file, as `parameters` are sharded."""
    kept = load_file(path)
    length = float(kept.pop(LENGTH, 0.0))
    if not kept:
        return AdaptiveState(), length
    moments, parameters = AdaptiveState.from_tensors(kept), list(parameters)
    moments.first = sharded_like(moments.first, parameters)
    moments.second = sharded_like(moments.second, parameters)
    return moments, length
