"""Sequences with a common prefix as one row: the prefix is computed once.

The responses to one prompt (a preference pair, or K samples of a policy) share its tokens. A row is

    common prefix | rest of sequence 1 | rest of sequence 2 | ... | padding

where every rest sees the prefix and itself (a block mask), and its positions go on from the
prefix's end, as if it stood there alone. The prefix is the longest one in tokens, so data sets that
others tokenised work as they are. Imports torch only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SharedRows(NamedTuple):
    """B rows of up to K sequences each, padded on the right.

    Attributes:
        input_ids: token ids, [B, L].
        position_ids: each token's position in its own sequence, [B, L]; 0 at padding.
        segment_ids: 0 in the common prefix, k in the rest of the row's k-th sequence (from 1), -1
            at padding, [B, L].
        ends: where in the row each sequence's last token stands, [B, K]; -1 where a row has fewer
            than K sequences.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    ends: Tensor

    @property
    def exists(self) -> Tensor:
        """Which of the B x K sequences are there, bool [B, K]."""
        return self.ends >= 0

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row without padding, [B]."""
        return (self.segment_ids >= 0).sum(1)

    @property
    def sequence_lengths(self) -> Tensor:
        """Tokens of each sequence, its prefix included, [B, K]; 0 where there is none."""
        last = self.position_ids.gather(1, self.ends.clamp(min=0))
        return torch.where(self.exists, last + 1, 0)

    def take(self, rows: Sequence[int] | Tensor) -> "SharedRows":
        """Some of the rows, cut to the longest of them."""
        index = torch.as_tensor(rows, device=self.input_ids.device)
        L = int(self.lengths[index].max())
        return SharedRows(
            self.input_ids[index, :L],
            self.position_ids[index, :L],
            self.segment_ids[index, :L],
            self.ends[index],
        )


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with; every sequence keeps at least one of its own."""
    ordered = [list(s) for s in sequences]
    first, last = min(ordered), max(ordered)  # the two that differ earliest
    shared = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(len(s) for s in sequences) - 1)


def pack(
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> SharedRows:
    """Token sequences as rows, one a group.

    Args:
        groups: for each row its one or more sequences, none of them empty.
        pad_token_id: what fills the rest of the row; any token will do, the mask hides it.
        pad_to_multiple_of: L becomes a multiple of it.

    Raises:
        ValueError: a group without sequences, or an empty sequence.
    """
    if not groups or any(not group or any(not s for s in group) for group in groups):
        raise ValueError("a group needs a sequence, and a sequence a token")
    ids, positions, segments, ends = [], [], [], []
    for group in groups:
        P = common_prefix_length(group)
        row, place, segment, end = list(group[0][:P]), list(range(P)), [0] * P, []
        for k, sequence in enumerate(group, start=1):
            row += sequence[P:]
            place += range(P, len(sequence))
            segment += [k] * (len(sequence) - P)
            end.append(len(row) - 1)
        ids.append(row)
        positions.append(place)
        segments.append(segment)
        ends.append(end)
    L = max(map(len, ids))
    if pad_to_multiple_of:
        L += -L % pad_to_multiple_of
    return SharedRows(
        _filled(ids, L, pad_token_id),
        _filled(positions, L, 0),
        _filled(segments, L, -1),
        _filled(ends, max(map(len, ends)), -1),
    )


def _filled(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def separate(rows: SharedRows, *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The sequences one by one again, padded on the right: the plain path.

    Returns:
        `input_ids` and `attention_mask`, [N, T]: the N sequences that exist, row by row.
    """
    row, k = rows.exists.nonzero(as_tuple=True)
    segments = rows.segment_ids[row]
    own = (segments == 0) | (segments == k[:, None] + 1)  # [N, L]
    n, column = own.nonzero(as_tuple=True)
    position = rows.position_ids[row[n], column]
    T = int(rows.sequence_lengths.max())
    ids = rows.input_ids.new_full((len(row), T), pad_token_id)
    mask = torch.zeros_like(ids)
    ids[n, position] = rows.input_ids[row[n], column]
    mask[n, position] = 1
    return ids, mask


def visible(rows: SharedRows, *, window: int | None = None) -> Tensor:
    """Which token sees which, bool [B, L (queries), L (keys)].

    Its memory grows as B * L * L bytes; with a window, while it is made, four times that more.

    Args:
        window: sliding-window layers see so many positions back, themselves included, counted in
            the sequence and not in the row.
    """
    L = rows.input_ids.shape[1]
    index = torch.arange(L, device=rows.input_ids.device)
    queries, keys = rows.segment_ids[:, :, None], rows.segment_ids[:, None, :]
    sees = (index[:, None] >= index) & ((keys == 0) | (queries == keys))
    if window is not None:
        position_ids = rows.position_ids.to(torch.int32)
        distance = position_ids[:, :, None] - position_ids[:, None, :]
        sees &= (distance < window) | (queries == -1)  # padding must see something, whatever
    return sees


def _mask_function(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    """`visible` as flex_attention's function of one query and one key."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = rows.segment_ids[b, q], rows.segment_ids[b, k]
        allowed = (q >= k) & ((key == 0) | (query == key))
        if window is not None:
            distance = rows.position_ids[b, q] - rows.position_ids[b, k]
            allowed = allowed & ((distance < window) | (query == -1))
        return allowed

    return sees


def _one_mask(rows: SharedRows, window: int | None, implementation: str, dtype: Any) -> Any:
    """The mask as an attention implementation of transformers wants it."""
    if implementation == "flex_attention":  # kept as blocks; making it takes an L x L tensor once
        from torch.nn.attention.flex_attention import create_block_mask

        B, L = rows.input_ids.shape
        device = str(rows.input_ids.device)
        return create_block_mask(_mask_function(rows, window), B, None, L, L, device=device)
    sees = visible(rows, window=window)[:, None]  # [B, 1, L, L], the same for all heads
    if implementation == "eager":  # it adds its mask to the scores
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return sees


def model_inputs(rows: SharedRows, config: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    """What a transformers decoder takes to compute these rows.

    Args:
        config: the model's configuration; it says which layers have a sliding window, and how
            attention is computed.
        dtype: the model's, for masks that are added.
    """
    text = config.get_text_config()
    implementation = text._attn_implementation
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)

    def mask(window: int | None) -> Any:
        return _one_mask(rows, window, implementation, dtype)

    if layers is None:  # one kind of layer: the window, if there is one, is every layer's
        attention_mask = mask(window)
    elif "sliding_attention" in layers:
        attention_mask = {"full_attention": mask(None), "sliding_attention": mask(window)}
    else:
        attention_mask = mask(None)
    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "attention_mask": attention_mask,
    }


def obstacle(config: Any) -> str | None:
    """Why a model of this configuration cannot share prefixes; None if nothing is known.

    What is not known here, a comparison with the plain path shows (`rewards.sharing_obstacle`).
    """
    text = config.get_text_config()
    implementation = text._attn_implementation or "eager"
    if "flash" in implementation:
        return (
            f"{implementation} takes no block mask (attn_implementation='sdpa' or "
            "'flex_attention' does)"
        )
    others = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has {sorted(others)[0]} layers, which do not look back through a mask"
    if "local" in str(getattr(text, "attention_layers", "")):
        return "its local layers (GPT-Neo) count their window in the row"
    if getattr(text, "alibi", False):
        return "its positions are distances in the row (ALiBi)"
    if getattr(text, "is_encoder_decoder", False):
        return "it has an encoder, which reads a sequence as a whole"
    return None


def like_lengths(lengths: Sequence[int], *, overhead: float, least: float = 0.0) -> list[list[int]]:
    """Split a batch so that rows of like length are computed together.

    The split that costs the fewest tokens: a part costs its rows, padding included, but not less
    than `least`, plus `overhead`. A dynamic programme over the rows in order of length.

    Args:
        lengths: of each row, in tokens.
        overhead: what one more forward and backward pass costs, in tokens.
        least: fewer tokens than these do not make a pass faster (a GPU that is not full).

    Returns:
        Indices of the rows of each part; together all of them.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost = [0.0] + [float("inf")] * len(order)
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        for begin in range(end):
            total = cost[begin] + max((end - begin) * longest, least) + overhead
            if total < cost[end]:
                cost[end], start[end] = total, begin
    parts, end = [], len(order)
    while end:
        parts.append(order[start[end] : end])
        end = start[end]
    return parts[::-1]


class PassCost(NamedTuple):
    """What a forward and backward pass costs beside its tokens, on one kind of device.

    Attributes:
        operations: work that stands for what a pass costs whatever its size (launching kernels,
            Python), in floating-point operations.
        tokens: the same for reading and writing every weight and gradient once, in tokens: it grows
            with the model as their cost does, so it is one number for all models.
        least: a pass of fewer tokens does not fill the device.
    """

    operations: float
    tokens: float
    least: float


PASS_COSTS = {"cpu": PassCost(operations=3e9, tokens=32, least=0)}
ANY_GPU = PassCost(operations=1e13, tokens=512, least=8192)

WORTHWHILE = 0.1
"""The share of a batch's tokens, padding included, that one more part must save.

Few passes matter on a machine that others use, too: threads wait for each other in every one.
"""


def cheap_split(lengths: Sequence[int], *, parameters: int, device: str) -> list[list[int]]:
    """`like_lengths` by the size of the model.

    Nothing is timed: the same batch must be split in the same way in an interrupted run.

    Args:
        lengths: of each row, in tokens.
        parameters: how many the model has.
        device: a kind of torch device, as "cpu" or "cuda".
    """
    fixed = PASS_COSTS.get(device, ANY_GPU)
    # 6: the operations a parameter and token of a forward and backward pass.
    overhead = fixed.tokens + fixed.operations / (6 * parameters)
    whole = len(lengths) * max(lengths)
    return like_lengths(lengths, overhead=max(overhead, WORTHWHILE * whole), least=fixed.least)
