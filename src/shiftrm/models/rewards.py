"""Read rewards from a model in fp32 at explicit positions, the last real token of each sequence.

The models' own pooling looks for pad tokens instead, which fails where pad equals EOS.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.packed import BLOCK, flat_inputs, flatten
from shiftrm.models.prefix import SharedRows, cheap_split, model_inputs, separate
from shiftrm.models.rope import forget_longest, frequency_class, frequency_limit


def pad_right(
    sequences: Sequence[Sequence[int]], *, pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right.

    Returns:
        `input_ids` and `attention_mask`, both int64 of shape [B, T].
    """
    T = max(len(s) for s in sequences)
    ids = torch.tensor([[*s, *[pad_token_id] * (T - len(s))] for s in sequences])
    lengths = torch.tensor([len(s) for s in sequences])
    mask = (torch.arange(T) < lengths[:, None]).long()
    return ids.long().to(device), mask.to(device)


def score_head(model: nn.Module) -> nn.Linear:
    """Return the linear layer that maps a hidden state to a reward, inside any wrapper (DDP, PEFT).

    Raises:
        UserError: the model has none (a causal language model, for example), or its head has more
            than one linear layer.
    """
    head = find_head(model)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"the score head of {type(model).__name__} is a {type(head).__name__}, not a linear "
            "layer; its rewards can be read, but not its weights"
        )
    return head


def find_head(model: nn.Module) -> nn.Module:
    """Return the module that maps hidden states to rewards, of any kind, inside any wrapper.

    Raises:
        UserError: the model has none.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("score", "classifier"):
            # PEFT keeps the trained copy of the head in `modules_to_save`.
            saved = getattr(module, "modules_to_save", None)
            if saved is not None:
                active = module.active_adapter
                return saved[active if isinstance(active, str) else active[0]]
            return module
    raise UserError(
        f"{type(model).__name__} has no score head: a reward model is a sequence-classification "
        "checkpoint with num_labels=1 (AutoModelForSequenceClassification)"
    )


def model_config(model: nn.Module) -> Any:
    """Return the configuration of a transformers model, inside any wrapper."""
    while not hasattr(model, "config"):
        model = model.module  # type: ignore[assignment]
    return model.config


@contextmanager
def _head_outputs(
    model: nn.Module, positions: Tensor | None, *, states_only: bool = False
) -> Iterator[list[Tensor]]:
    """Collect the head's values in fp32, at `positions` [B, P] of each row or everywhere.

    The head is applied inside its own forward hook, where its weights are available even when a
    wrapper shards them. If the head is not a plain linear layer (LoRA's, RoBERTa's, a quantised
    one), its own output is read. Encoders give their head one pooled state per row, or their head
    pools.

    Args:
        states_only: collect the head's input states, [B, P, H], instead.
    """
    collected: list[Tensor] = []

    def hook(head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        linear = None
        if isinstance(head, nn.Linear) and head.weight.is_floating_point():
            linear = head
        states = output if linear is None and not states_only else inputs[0]  # [B, T, H] or [B, H]
        states = _select(states, positions, name=type(model).__name__)
        with torch.autocast(device_type=states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            if states_only:
                collected.append(states)
                return
            if linear is not None:
                bias = None if linear.bias is None else linear.bias.to(states.dtype)
                states = F.linear(states, linear.weight.to(states.dtype), bias)
            collected.append(states[..., 0])

    handle = find_head(model).register_forward_hook(hook)
    try:
        yield collected
    finally:
        handle.remove()


def _select(states: Tensor, positions: Tensor | None, *, name: str) -> Tensor:
    """Return `states` [B, T, H] at `positions` [B, P]: [B, P, H]; pooled [B, H] as [B, 1, H]."""
    if states.dim() == 2:
        if positions is None or positions.shape[1] != 1:
            raise UserError(
                f"{name} pools by itself, so it has one reward a sequence and none at other "
                "positions; use a model with a score at every token (a decoder)"
            )
        return states[:, None]
    if positions is None:
        return states
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def rewards_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """Return rewards at given positions of each row.

    Args:
        model: a sequence-classification model with one label.
        input_ids, attention_mask: shape [B, T].
        positions: token indices into the row, shape [B, P]. An encoder that pools by itself (BERT)
            has one reward per row: P must be 1, and the index is ignored.

    Returns:
        Rewards, fp32 (fp64 for an fp64 model), shape [B, P].

    Raises:
        UserError: several positions of a model that pools by itself.
    """
    return _outputs(model, input_ids, attention_mask, positions)


def sequence_rewards(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return one reward per row, read at the last real token according to the mask; shape [B].

    The mask decides, not the token id: a sequence may end in pad == EOS.
    """
    T = input_ids.shape[1]
    last = T - 1 - attention_mask.flip(1).argmax(dim=1)
    return rewards_at(model, input_ids, attention_mask, last[:, None])[:, 0]


def rewards_and_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the reward of each row and the hidden states under the head at every token.

    Args:
        model: a decoder with one label.
        input_ids, attention_mask: shape [B, T], padded on the right.

    Returns:
        Shapes [B] and [B, T, H], both in fp32 (fp64 for an fp64 model).

    Raises:
        UserError: the model pools by itself, or rotates positions by the longest row.
    """
    if frequency_limit(model_config(model)) is not None:
        raise UserError(
            f"{type(model).__name__} rotates positions by the longest sequence of a batch, so its "
            "hidden states depend on the other rows; use another model"
        )
    last = attention_mask.sum(1, keepdim=True) - 1
    with (
        _head_outputs(model, last) as rewards,
        _head_outputs(model, None, states_only=True) as states,
    ):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if states[0].shape[1] != input_ids.shape[1]:
        raise UserError(f"{type(model).__name__} pools by itself; use a decoder")
    return rewards[0][:, 0], states[0]


def token_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the head's value at every token, shape [B, T], for a critic.

    Raises:
        UserError: the model pools by itself, as encoders do.
    """
    return _outputs(model, input_ids, attention_mask, None)


def _outputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None,
    *,
    states_only: bool = False,
) -> Tensor:
    """Return the head's values (`_head_outputs`) independently of the other rows in the batch.

    Makes one pass, except for models whose rotary positions depend on the longest row (`rope`):
    rows of another frequency class get their own pass.
    """
    config = model_config(model)
    limit = frequency_limit(config)
    if limit is None:
        with _head_outputs(model, positions, states_only=states_only) as collected:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return collected[0]
    T = input_ids.shape[1]
    lengths = (T - attention_mask.flip(1).argmax(dim=1)).tolist()
    classes: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        classes.setdefault(frequency_class(config, length), []).append(row)
    _require_equal_passes(model, len(classes), limit)
    found, order = [], []
    for rows in classes.values():
        longest = max(lengths[row] for row in rows)
        forget_longest(getattr(model, "_policy", (model,))[0])
        some = None if positions is None else positions[rows]
        with _head_outputs(model, some, states_only=states_only) as collected:
            model(
                input_ids=input_ids[rows, :longest],
                attention_mask=attention_mask[rows, :longest],
                use_cache=False,
            )
        value = collected[0]
        if positions is None:  # at every token; padding has no values
            value = F.pad(value, (0, T - longest))
        found.append(value)
        order += rows
    return torch.cat(found)[torch.tensor(order, device=input_ids.device).argsort()]


def _require_equal_passes(model: nn.Module, passes: int, limit: int) -> None:
    """Check that processes that train together make the same number of passes."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if passes > 1 and several and torch.is_grad_enabled():
        raise UserError(
            f"{type(model).__name__} rotates positions by the longest sequence of a batch once it "
            f"is longer than {limit} tokens, which several processes cannot train alike; set "
            f"max_length={limit} or use one process"
        )


# -- groups: several sequences per row -------------------------------------------------------------


def group_rewards(
    model: nn.Module, rows: SharedRows, *, shared: bool, split: bool, packed: bool = False
) -> Tensor:
    """Return rewards of every sequence of every row.

    Args:
        model: a sequence-classification model with one label.
        rows: B rows of up to K sequences.
        shared: compute common prefixes once; the model must support it (`sharing_obstacle`). If
            False, every sequence is its own row.
        split: compute rows of similar length together, in several passes if that saves padding. Not
            for several processes, which must make the same number of passes.
        packed: with `shared`, compute all rows as one flat row without padding, in one pass; the
            model must support it (`sharing_obstacle`).

    Returns:
        Rewards, fp32 (fp64 for an fp64 model), [B, K]; 0 where there is no sequence.
    """
    if shared and packed and _can_be_flat(model, rows):
        values = _flat_values(model, rows)
        return values.new_zeros(rows.ends.shape).masked_scatter(rows.exists, values)
    parts = [list(range(len(rows.ends)))]
    if split and len(rows.ends) > 1:
        parameters = sum(p.numel() for p in model.parameters())
        device = rows.input_ids.device.type
        parts = cheap_split(rows.lengths.tolist(), parameters=parameters, device=device)
    if len(parts) == 1:
        return _part_rewards(model, rows, shared=shared)
    K = rows.ends.shape[1]
    values = torch.cat([_part_rewards(model, rows.take(part), shared=shared) for part in parts])
    order = torch.tensor([i for part in parts for i in part], device=values.device)
    return torch.zeros_like(values).index_copy(0, order, values).view(-1, K)


def _part_rewards(model: nn.Module, rows: SharedRows, *, shared: bool) -> Tensor:
    if shared and rotated_alike(model, rows):
        return _shared_values(model, rows).masked_fill(~rows.exists, 0.0)
    values = sequence_rewards(model, *separate(rows, pad_token_id=0))
    return values.new_zeros(rows.ends.shape).masked_scatter(rows.exists, values)


def rotated_alike(model: nn.Module, rows: SharedRows) -> bool:
    """Whether all sequences of these rows are in the same frequency class."""
    config = model_config(model)
    if frequency_limit(config) is None:
        return True
    lengths = rows.sequence_lengths[rows.exists].tolist()
    return len({frequency_class(config, length) for length in lengths}) == 1


def _can_be_flat(model: nn.Module, rows: SharedRows) -> bool:
    """Whether one flat row gives these rows' rewards and, where they are needed, their gradients.

    FlexAttention cannot be differentiated twice (`core.curvature.twice_differentiable`).
    """
    if rows.input_ids.device.type != "cpu" and not torch.backends.cuda.flash_sdp_enabled():
        return False
    return rotated_alike(model, rows)


def packed_states(model: nn.Module, rows: SharedRows) -> Tensor:
    """Return `shared_states` computed as one flat row."""
    return _flat_values(model, rows, states_only=True)


def _flat_values(model: nn.Module, rows: SharedRows, *, states_only: bool = False) -> Tensor:
    """Return the head's value at the N sequences' ends, [N]."""
    on_cpu = rows.input_ids.device.type == "cpu"
    flat = flatten(rows, multiple=1 if on_cpu else BLOCK)
    inputs = flat_inputs(flat, model_config(model))
    if frequency_limit(model_config(model)) is not None:
        forget_longest(model)
    with _head_outputs(model, flat.ends, states_only=states_only) as collected:
        model(**inputs, use_cache=False)
    return collected[0][0]


def shared_states(model: nn.Module, rows: SharedRows) -> Tensor:
    """Return hidden states under the head at each sequence's end, by shared prefixes; [N, H]."""
    return _shared_values(model, rows, states_only=True)[rows.exists]


def shared_token_values(model: nn.Module, rows: SharedRows) -> Tensor:
    """Return the head's value at every token of packed rows, shape [B, L], for a critic."""
    inputs = model_inputs(rows, model_config(model), dtype=_dtype(model))
    with _head_outputs(model, None) as collected:
        model(**inputs, use_cache=False)
    return collected[0]


def plain_states(model: nn.Module, rows: SharedRows) -> Tensor:
    """Return `shared_states` computed with every sequence as its own row."""
    return hidden_states(model, *separate(rows, pad_token_id=0))


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return hidden states under the head at the last token of each row, padded on the right."""
    last = attention_mask.sum(1, keepdim=True) - 1
    return _outputs(model, input_ids, attention_mask, last, states_only=True)[:, 0]


def _shared_values(model: nn.Module, rows: SharedRows, *, states_only: bool = False) -> Tensor:
    inputs = model_inputs(rows, model_config(model), dtype=_dtype(model))
    if frequency_limit(model_config(model)) is not None:
        forget_longest(model)
    with _head_outputs(model, rows.ends.clamp(min=0), states_only=states_only) as collected:
        model(**inputs, use_cache=False)
    return collected[0]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
