"""Short forward passes that check a model's own rewards and its support of shared prefixes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.prefix import SharedRows, obstacle, separate
from shiftrm.models.rewards import (
    find_head,
    hidden_states,
    model_config,
    packed_states,
    plain_states,
    rotated_alike,
    sequence_rewards,
    shared_states,
)
from shiftrm.models.rope import context_limit, frequency_limit

FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""Allowed rounding error of hidden states, relative to their norm: two units in the last place of
half precision."""

NOISE = 3.0
"""Allowed distance of the two paths, in multiples of the plain path's distance from itself."""

FEW = 4
"""Number of compared rows; more would not change the result."""

ROWS, TOKENS = 4, 8
"""Size of the batch of `require_own_reward`."""


States = Callable[[nn.Module, SharedRows], Tensor]


@torch.no_grad()
def sharing_obstacle(model: nn.Module, rows: SharedRows, *, packed: bool = False) -> str | None:
    """Return why this model must not share prefixes; None if both paths agree on these rows.

    Compares the hidden states under the head for each sequence: rewards of a new head are too small
    and too similar to show an error. The allowed distance is the plain path's distance from itself
    when rows are reordered and padded differently, so it fits the run's precision and autocast.
    Costs a few forward passes of `FEW` rows, in evaluation mode.

    Args:
        packed: compute the rows as one flat row (`models.packed`) and not padded.
    """
    states = packed_states if packed else shared_states
    known = obstacle(model_config(model))
    if known is not None:
        return known
    rows = rows.take(rows.lengths.argsort(descending=True)[:FEW])
    if not rotated_alike(model, rows):  # such batches are never shared
        limit = frequency_limit(model_config(model)) or 0
        short = rows.sequence_lengths.amax(1) <= limit
        if not bool(short.any()):
            return "rotary positions depend on the longest sequence of a batch"
        rows = rows.take(short.nonzero()[:, 0])
    with evaluating(model):
        with precision_of(model) as precision:
            theirs = plain_states(model, rows)
        try:
            ours = states(model, rows)
            ignored = _positions_are_ignored(model, rows, states)
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
    """Return the largest distance of two hidden states [N, H], relative to their norm."""
    distance = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
    return float(distance.max())


def _noise(model: nn.Module, rows: SharedRows, states: Tensor) -> float:
    """Return how much the plain path's states [N, H] change with the batch around a sequence.

    Compares the reverse order with other padding, and the longest sequence alone without padding,
    for which attention has separate kernels.
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
    """Return the length up to which padding a row does not change its result."""
    config = model_config(model)
    limits = (context_limit(config), frequency_limit(config))
    return min((n for n in limits if n is not None), default=None)


def _positions_are_ignored(model: nn.Module, rows: SharedRows, states: States) -> bool:
    """Whether the states stay the same when the sequences' positions are spread out.

    If the model uses positions, its states change more than between two equal passes (which agree
    exactly if kernels are deterministic).
    """
    row = rows.take([0])
    stretched = row._replace(position_ids=_stretched(model, row.position_ids))
    first, again, other = (states(model, r) for r in (row, row, stretched))
    return apart(other, first) <= 2 * apart(again, first)


def _stretched(model: nn.Module, position_ids: Tensor) -> Tensor:
    """Return other positions within the context: the second half moved up, or down if no room."""
    half = (position_ids.max() + 1) // 2
    context = _context(model)
    later = position_ids >= half
    if context is not None and int(position_ids.max()) + 3 >= context:
        return torch.where(later, position_ids - half, position_ids)
    return torch.where(later, position_ids + 3, position_ids)


@torch.no_grad()
def require_own_reward(model: nn.Module) -> None:
    """Check that our rewards of a few rows without padding equal the model's own logits.

    The rows contain no pad token, which the model's own pooling would look for, and EOS only at
    their end, where encoder-decoders pool. Costs two short passes in evaluation mode. The allowed
    distance is relative to the rewards or, if that is larger, to what the products in them would
    sum to if their signs were random: rounding does not shrink where the products cancel.

    Raises:
        UserError: they differ, for example because the model averages over tokens and we read the
            last one.
    """
    ids = _rows(model_config(model).get_text_config())
    if ids is None:
        return
    ids = ids.to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    with evaluating(model), precision_of(model) as precision, _sizes(model) as sizes:
        logits = getattr(model(input_ids=ids, attention_mask=mask, use_cache=False), "logits", None)
        if logits is None or logits.shape != (ROWS, 1):  # not a transformers classifier
            return
        ours = sequence_rewards(model, ids, mask)
    theirs = logits[:, 0].to(ours.dtype)
    scale = max(1e-6, float(theirs.abs().max()), *sizes)
    worst = int((ours - theirs).abs().argmax())
    if not float((ours - theirs).abs().max()) > FLOOR[precision[0]] * scale:
        return
    raise UserError(
        f"{type(model).__name__} pools in a way of its own: its reward of a text is "
        f"{float(theirs[worst]):.4g} where its last token's score is {float(ours[worst]):.4g}; use "
        "a model that scores the last token, as decoders do, or the first, as BERT does"
    )


@contextmanager
def _sizes(model: nn.Module) -> Iterator[list[float]]:
    """Collect, by pass, the largest norm of the products w_i h_i in a linear head's last rewards.

    A reward is the sum of these products. Rounding a factor or a partial sum changes it by about
    the unit roundoff times this norm, also where the sum is 0.
    """
    found: list[float] = []

    def hook(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            return  # its output is read, which does not round again
        states = inputs[0] if inputs[0].dim() == 2 else inputs[0][:, -1]  # pooled, or all tokens
        found.append(float((states.float() * head.weight.float()).norm(dim=-1).max()))

    handle = find_head(model).register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _rows(config: Any) -> Tensor | None:
    """Return token ids [ROWS, TOKENS]; None if the vocabulary has no ordinary token."""
    ends = _listed(config.eos_token_id)
    special = {config.pad_token_id, config.bos_token_id, *ends}
    size = config.vocab_size
    words = [i for i in range(min(size, 8 * ROWS * TOKENS)) if i not in special]
    if not words:
        return None
    words = (words * ROWS * TOKENS)[: ROWS * TOKENS]
    ids = torch.tensor(words).view(ROWS, TOKENS)
    end = next((i for i in ends if i != config.pad_token_id and 0 <= i < size), None)
    if end is not None:
        ids[:, -1] = end
    return ids


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


@contextmanager
def precision_of(model: nn.Module) -> Iterator[list[torch.dtype]]:
    """Record the compute dtype of the passes inside the block.

    It is read at the head, because forward may enter autocast.
    """
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
    """Put the model in evaluation mode, and restore its mode afterwards.

    Autocast's copies of weights are forgotten: a version of torch that keeps those made without
    gradients would train with them.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        torch.clear_autocast_cache()
