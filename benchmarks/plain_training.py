"""The plain training loop of the studies: AdamW, warm-up, linear decay, early stopping."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        every: steps between two looks at what is watched.
    """

    steps: int
    rate: float
    warmup: int = 0
    every: int = 25


@dataclass(frozen=True)
class Watched:
    """What early stopping saw: the watched loss by step, and the step that was kept."""

    losses: dict[int, float]
    best: int


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    watch: Callable[[], float] | None = None,
    on_norm: Callable[[float], None] | None = None,
) -> Watched:
    """Train in place; with `watch`, keep the parameters with the lowest watched loss.

    Args:
        loss: of a step, from 0. A loss without a graph has put its gradient into `.grad` itself.
        on_norm: called in every step with the norm of the gradient, which is then clipped to 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, weight_decay=0.0)
    kept, losses, best = None, {}, 0
    if watch is not None:
        losses[0], kept = watch(), copy.deepcopy(model.state_dict())
    for step in range(schedule.steps):
        left = (schedule.steps - step) / max(1, schedule.steps - schedule.warmup)
        warm = (step + 1) / schedule.warmup if schedule.warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * min(left, warm)
        optimizer.zero_grad()
        value = loss(step)
        if value.requires_grad:
            value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if on_norm is not None:
            on_norm(float(norm))
        optimizer.step()
        done = step + 1
        if watch is not None and (done % schedule.every == 0 or done == schedule.steps):
            losses[done] = watch()
            if losses[done] < losses[best] or math.isnan(losses[best]):
                best, kept = done, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    optimizer.zero_grad()
    return Watched(losses, best if watch is not None else schedule.steps)
