"""Whether a model can share prefixes: shown by its hidden states, in the run's own precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.prefix import SharedRows, obstacle, separate
from shiftrm.models.rewards import (
    find_head,
    hidden_states,
    model_config,
    plain_states,
    rotated_alike,
    shared_states,
)
from shiftrm.models.rope import frequency_limit

__all__ = ["FLOOR", "apart", "evaluating", "precision_of", "sharing_obstacle"]

FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""What rounding alone may make of hidden states, relative to their length: in half precision two
units in the last place."""

NOISE = 3.0
"""How many times further apart the two paths may be than the plain path is from itself."""

FEW = 4
"""Rows that are compared; more would say the same."""


@torch.no_grad()
def sharing_obstacle(model: nn.Module, rows: SharedRows) -> str | None:
    """Why this model must not share prefixes; None if both paths agree on these rows.

    The hidden states under the head are compared, sequence by sequence: rewards of a new head are
    too small and too alike to tell right from wrong. How far apart they may be is measured: as far
    as the plain path is from itself when rows stand in another order and are padded otherwise. So
    it does not matter which precision the run has, or where autocast is entered. Costs a few
    forward passes of `FEW` rows, in evaluation mode.
    """
    known = obstacle(model_config(model))
    if known is not None:
        return known
    rows = rows.take(rows.lengths.argsort(descending=True)[:FEW])
    if not rotated_alike(model, rows):  # such batches are computed alone anyway
        limit = frequency_limit(model_config(model)) or 0
        short = rows.sequence_lengths.amax(1) <= limit
        if not bool(short.any()):
            return "rotary positions depend on the longest sequence of a batch"
        rows = rows.take(short.nonzero()[:, 0])
    with evaluating(model):
        with precision_of(model) as precision:
            theirs = plain_states(model, rows)
        try:
            ours = shared_states(model, rows)
            ignored = _positions_are_ignored(model, rows)
        except (
            UserError,
            TypeError,
            ValueError,
            RuntimeError,
            IndexError,
            AttributeError,
        ) as error:
            message = (str(error).splitlines() or [""])[0]
            return f"it does not take a block mask ({type(error).__name__}: {message[:120]})"
        if ignored:
            return "its forward ignores position_ids"
        noise = _noise(model, rows, theirs)
        floor = FLOOR[precision[0]]
    found = apart(ours, theirs)
    if found <= max(floor, NOISE * noise):
        return None
    return (
        f"its hidden states then differ by {found:.1e} of their length (by {noise:.1e} between two "
        "orders of the same rows)"
    )


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two hidden states [N, H], relative to their length."""
    distance = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
    return float(distance.max())


def _noise(model: nn.Module, rows: SharedRows, states: Tensor) -> float:
    """How far the plain path's states [N, H] are from those in other company.

    In the reverse order with other padding, and the longest sequence alone without any, for which
    attention has kernels of its own.
    """
    ids, mask = separate(rows, pad_token_id=0)
    longest = int(mask.sum(1).argmax())
    own = ids[longest : longest + 1]
    alone = hidden_states(model, own, torch.ones_like(own))
    room = (_context(model) or 2**31) - ids.shape[1]
    ids, mask = (F.pad(t.flip(0), (0, max(0, min(5, room)))) for t in (ids, mask))
    reverse = hidden_states(model, ids, mask).flip(0)
    return max(apart(reverse, states), apart(alone, states[longest : longest + 1]))


def _context(model: nn.Module) -> int | None:
    """The length up to which a row may be padded without another meaning."""
    config = model_config(model)
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (own, frequency_limit(config)) if n is not None), default=None)


def _positions_are_ignored(model: nn.Module, rows: SharedRows) -> bool:
    """Whether the states stay as they are when the sequences' positions are pulled apart.

    A model that uses them moves by more than two equal passes differ, and these differ by nothing
    where kernels are deterministic.
    """
    row = rows.take([0])
    stretched = row._replace(position_ids=_stretched(model, row.position_ids))
    first, again, other = (shared_states(model, r) for r in (row, row, stretched))
    return apart(other, first) <= 2 * apart(again, first)


def _stretched(model: nn.Module, position_ids: Tensor) -> Tensor:
    """Other positions within the context: the second half moved on, or back where it is full."""
    half = (position_ids.max() + 1) // 2
    context = _context(model)
    later = position_ids >= half
    if context is not None and int(position_ids.max()) + 3 >= context:
        return torch.where(later, position_ids - half, position_ids)
    return torch.where(later, position_ids + 3, position_ids)


@contextmanager
def precision_of(model: nn.Module) -> Iterator[list[torch.dtype]]:
    """What the passes inside compute in; asked at the head, because forward may enter autocast."""
    seen: list[torch.dtype] = []

    def hook(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        device = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device)
        seen.append(torch.get_autocast_dtype(device) if autocast else inputs[0].dtype)

    handle = find_head(model).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
