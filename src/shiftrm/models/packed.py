"""Compute all rows of a pass as one flat row without padding.

`SharedRows` pads its rows to a rectangle. `flatten` puts the same rows one after another instead,

    row 1's prefix | its rests | row 2's prefix | its rests | ...

and attention stays inside a row. On a CPU it runs row by row, so that there is no work between
rows and no mask of the batch; on a GPU FlexAttention skips the blocks between rows.

Both travel as the attention mask of an ordinary forward pass: transformers hands a mask of four
dimensions to every layer as it is, also where activation checkpointing runs a layer again. The
function registered for "sdpa" attention looks at the mask's type; other masks get transformers'
own. So neither a model nor its configuration changes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.models import prefix
from shiftrm.models.prefix import SharedRows

BLOCK = 128
"""On a GPU the flat row is filled up to a multiple of FlexAttention's block."""

PACKED_FROM = {"cpu": 1_000_000, "cuda": 1_000_000_000}
"""Parameters from which a packed pass is used, by device. On a CPU it is slower for small models
(docs/benchmarks.md), because attention is called for every row. FlexAttention is compiled, which
takes a minute, so it is used where steps take long."""

DEAREST = 1.1
"""How much more work one call for all rests of a row may be than one call for each of them."""


class FlatRows(NamedTuple):
    """The rows of a pass, one after another, T tokens.

    Attributes:
        input_ids: token ids, [1, T].
        position_ids: each token's position in its own sequence, [1, T].
        segment_ids: 0 in a row's prefix, k in the rest of its k-th sequence, [1, T].
        row_ids: the token's row, [1, T]; -1 where T was filled up.
        ends: index of each sequence's last token, row by row, [1, N].
        sizes: for each row, the number of tokens of the prefix and of each rest.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    row_ids: Tensor
    ends: Tensor
    sizes: list[list[int]]


def flatten(rows: SharedRows, *, multiple: int = 1) -> FlatRows:
    """Return these rows without padding.

    Args:
        multiple: T is filled up to a multiple of it, with a row that no sequence is part of.
    """
    real = rows.segment_ids >= 0
    row, column = real.nonzero(as_tuple=True)
    starts = real.sum(1).cumsum(0) - real.sum(1)  # [B]
    ends = (rows.ends + starts[:, None])[rows.exists]
    parts = torch.arange(rows.ends.shape[1] + 1, device=row.device)
    counts = (rows.segment_ids[..., None] == parts).sum(1)  # [B, K + 1]
    present = rows.exists.sum(1).tolist()
    sizes = [part[: K + 1] for part, K in zip(counts.tolist(), present, strict=True)]
    fill = -len(row) % multiple

    def flat(values: Tensor, filled: int) -> Tensor:
        return F.pad(values[row, column], (0, fill), value=filled)[None]

    return FlatRows(
        flat(rows.input_ids, 0),
        flat(rows.position_ids, 0),
        flat(rows.segment_ids, 0),
        F.pad(row, (0, fill), value=-1)[None],
        ends[None],
        sizes,
    )


def flat_inputs(flat: FlatRows, config: Any) -> dict[str, Any]:
    """Return the inputs of a transformers decoder for these rows; see `packing_obstacle`."""
    _register()
    make = _row_mask if flat.input_ids.device.type == "cpu" else _block_mask
    return {
        "input_ids": flat.input_ids,
        "position_ids": flat.position_ids,
        "attention_mask": prefix.masks_of_layers(config, lambda window: make(flat, window)),
    }


def packing_obstacle(config: Any, *, parameters: int, device: str) -> str | None:
    """Return why the rows of a model are padded instead; None if no reason is known.

    The choice depends on the model alone, so that a resumed run makes the same passes.

    Args:
        parameters: number of model parameters.
        device: a kind of torch device, such as "cpu" or "cuda".
    """
    implementation = config.get_text_config()._attn_implementation or "eager"
    if device == "cuda" and implementation == "flex_attention":
        return None
    if device not in PACKED_FROM:
        return f"not on this kind of device ({device})"
    if implementation != "sdpa":
        return f"attn_implementation is {implementation!r} ('sdpa' can)"
    if parameters < PACKED_FROM[device]:
        return f"not faster for a model of {parameters:,} parameters"
    return None


# -- a CPU: row by row -----------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of attention: some queries of a row and all that they may see.

    Attributes:
        pieces: which pieces of the keys it takes, by index.
        sizes: the tokens of a prefix and of each rest among its keys.
        start: index of the first query among the keys.
    """

    pieces: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


class Calls(NamedTuple):
    """Attention of flat rows as calls.

    Attributes:
        queries: tokens of each call's queries; together T, in order.
        keys: tokens of each piece of keys; together T, in order.
        calls: in the order of their queries.
    """

    queries: list[int]
    keys: list[int]
    calls: list[Call]


def plan_calls(sizes: Sequence[Sequence[int]]) -> Calls:
    """Divide each row into few calls with little masked work.

    A row is either its prefix and all rests together, or its first sequence and every other rest.
    The first sequence (or prefix) is plainly causal.
    """
    plan = Calls([], [], [])
    for P, *rests in sizes:
        at = len(plan.keys)
        if _together(P, rests):
            plan.queries.extend((P, sum(rests)))
            plan.keys.extend((P, sum(rests)))
            plan.calls.append(Call((at,), (0, P), 0))
            plan.calls.append(Call((at, at + 1), (P, *rests), P))
            continue
        plan.queries.extend((P + rests[0], *rests[1:]))
        plan.keys.extend((P, *rests))
        plan.calls.append(Call((at, at + 1), (P, rests[0]), 0))
        plan.calls.extend(Call((at, at + k), (P, n), P) for k, n in enumerate(rests[1:], start=2))
    return plan


def _together(P: int, rests: Sequence[int]) -> bool:
    if P == 0 or len(rests) == 1:
        return False
    together = P * P + sum(rests) * (P + sum(rests))
    apart = (P + rests[0]) ** 2 + sum(n * (P + n) for n in rests[1:])
    return together <= DEAREST * apart


class RowMask(Tensor):
    """Stands for the mask of flat rows, bool [1, 1, T, T], without its memory.

    Attributes:
        plan: the calls of attention.
        window: the sliding window of the layers that take this mask.
        made: masks of calls made so far; all layers use the same ones.
    """

    plan: Calls
    window: int | None
    made: dict[Any, Tensor | None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # a copy of the same shape (on detaching, moving) still stands for these rows
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        mask = args[0] if args and isinstance(args[0], RowMask) else None
        if mask is None or not isinstance(found, Tensor) or found.dim() != 4:
            return found
        if found.dtype != torch.bool or found.numel() != mask.plan_tokens**2:
            return found
        return _standing_for(found, mask.plan, mask.window, mask.made)

    @property
    def plan_tokens(self) -> int:
        return sum(self.plan.queries)


def _standing_for(
    visible: Tensor, plan: Calls, window: int | None, made: dict[Any, Tensor | None]
) -> RowMask:
    mask = visible.as_subclass(RowMask)
    mask.plan, mask.window, mask.made = plan, window, made
    return mask


def _row_mask(flat: FlatRows, window: int | None) -> RowMask:
    T = flat.input_ids.shape[1]
    nothing = torch.zeros((), dtype=torch.bool).expand(1, 1, T, T)
    return _standing_for(nothing, plan_calls(flat.sizes), window, {})


def attend_by_rows(
    mask: RowMask, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """Return attention of flat rows, [1, T, heads, D], from [1, heads, T, D].

    Args:
        options: `dropout_p` and `scale` of `scaled_dot_product_attention`.
    """
    plan = mask.plan
    if options.get("enable_gqa") is None:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    queries = query.split(plan.queries, dim=2)
    keys, values = key.split(plan.keys, dim=2), value.split(plan.keys, dim=2)
    outputs = []
    for own, call in zip(queries, plan.calls, strict=True):
        sees = _call_mask(mask, call, query.dtype)
        outputs.append(
            F.scaled_dot_product_attention(
                own,
                _joined(keys, call.pieces),
                _joined(values, call.pieces),
                attn_mask=sees,
                is_causal=sees is None,
                **options,
            )
        )
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _joined(pieces: Sequence[Tensor], which: tuple[int, ...]) -> Tensor:
    taken = [pieces[i] for i in which if pieces[i].shape[2]]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)


def _call_mask(mask: RowMask, call: Call, dtype: torch.dtype) -> Tensor | None:
    """Return a call's mask, to be added to the scores; None if it is plainly causal."""
    key = (call.sizes, call.start, dtype)
    if key not in mask.made:
        mask.made[key] = _additive(call, mask.window, dtype)
    return mask.made[key]


def _additive(call: Call, window: int | None, dtype: torch.dtype) -> Tensor | None:
    P, *rests = call.sizes
    L = P + sum(rests)
    if call.start == 0 and len(rests) == 1 and (window is None or window >= L):
        return None
    segments = [0] * P + [k for k, n in enumerate(rests, start=1) for _ in range(n)]
    positions = [*range(P), *(P + i for n in rests for i in range(n))]
    tensors = (torch.tensor([row]) for row in ([0] * L, positions, segments, [L - 1]))
    sees = prefix.visible(SharedRows(*tensors), window=window)[0, call.start :]
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))


# -- a GPU: FlexAttention --------------------------------------------------------------------------


def flat_mask_function(flat: FlatRows, window: int | None) -> Callable[..., Tensor]:
    """Return the rule of `visible`, and that a row sees itself only, for one query and one key."""
    row, segment, position = flat.row_ids[0], flat.segment_ids[0], flat.position_ids[0]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (row[q] == row[k]) & ((segment[k] == 0) | (segment[q] == segment[k]))
        return (q >= k) & same

    if window is None:
        return sees
    size = window

    def sees_in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(b, h, q, k) & ((position[q] - position[k] < size) | (row[q] == -1))

    return sees_in_window


def _block_mask(flat: FlatRows, window: int | None) -> Any:
    """Return FlexAttention's mask, which all layers share; no T x T tensor is made on a GPU."""
    device, T = flat.input_ids.device, flat.input_ids.shape[1]
    make = _compiled_block_mask() if device.type == "cuda" else _create_block_mask()
    return make(flat_mask_function(flat, window), 1, None, T, T, device=str(device))


def _create_block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask


@cache
def _compiled_block_mask() -> Any:
    return torch.compile(_create_block_mask())


# -- the attention function of transformers --------------------------------------------------------


@cache
def _register() -> None:
    """Let "sdpa" attention take the masks above; every other mask goes where it went."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import AttentionInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    theirs = AttentionInterface._global_mapping["sdpa"]

    @torch.compiler.disable  # in a compiled layer every batch's row lengths would be compiled anew
    def row_by_row(*tensors: Any, **options: Any) -> Tensor:
        return attend_by_rows(*tensors, **options)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        tensors = (query, key, value, attention_mask)
        if isinstance(attention_mask, RowMask):
            _refuse(options)
            found = row_by_row(attention_mask, query, key, value, dropout_p=dropout, scale=scaling)
            return found, None
        if isinstance(attention_mask, BlockMask):
            return flex_attention_forward(
                module, *tensors, dropout=dropout, scaling=scaling, **options
            )
        return theirs(module, *tensors, dropout=dropout, scaling=scaling, **options)

    AttentionInterface.register("sdpa", attend)


def _refuse(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name} is not computed row by row")
