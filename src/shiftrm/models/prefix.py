"""Pack sequences with a common prefix into one row, so that the prefix is computed once.

The responses to one prompt (a preference pair, or K samples of a policy) share its tokens. A row is

    common prefix | rest of sequence 1 | rest of sequence 2 | ... | padding

Every rest attends to the prefix and itself (a block mask), and its positions continue from the end
of the prefix. The prefix is the longest common one in tokens, so this also works for data sets that
are already tokenised. Imports torch only.
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
        ends: index in the row of each sequence's last token, [B, K]; -1 where a row has fewer than
            K sequences.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    ends: Tensor

    @property
    def exists(self) -> Tensor:
        """Return which of the B x K sequences exist, bool [B, K]."""
        return self.ends >= 0

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each row without padding, [B]."""
        return (self.segment_ids >= 0).sum(1)

    @property
    def sequence_lengths(self) -> Tensor:
        """Return the number of tokens of each sequence with its prefix, [B, K]; 0 if missing."""
        last = self.position_ids.gather(1, self.ends.clamp(min=0))
        return torch.where(self.exists, last + 1, 0)

    def take(self, rows: Sequence[int] | Tensor) -> "SharedRows":
        """Return the given rows, cut to the longest of them."""
        index = torch.as_tensor(rows, device=self.input_ids.device)
        L = int(self.lengths[index].max())
        return SharedRows(
            self.input_ids[index, :L],
            self.position_ids[index, :L],
            self.segment_ids[index, :L],
            self.ends[index],
        )


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix that leaves every sequence at least one token."""
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
    """Pack each group of token sequences into one row.

    Args:
        groups: for each row, one or more non-empty sequences.
        pad_token_id: fills the rest of the row; any token works, since the mask hides it.
        pad_to_multiple_of: L is rounded up to a multiple of it.

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
    """Unpack the rows into single sequences, padded on the right (the plain path).

    Returns:
        `input_ids` and `attention_mask`, [N, T], of the N sequences that exist, row by row.
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
    """Return the attention mask, bool [B, L (queries), L (keys)].

    It takes B * L * L bytes; with a window, four times that more while it is made.

    Args:
        window: number of positions that a sliding-window layer sees, including the query's own,
            counted in the sequence and not in the row.
    """
    L = rows.input_ids.shape[1]
    index = torch.arange(L, device=rows.input_ids.device)
    queries, keys = rows.segment_ids[:, :, None], rows.segment_ids[:, None, :]
    sees = (index[:, None] >= index) & ((keys == 0) | (queries == keys))
    if window is not None:
        position_ids = rows.position_ids.to(torch.int32)
        distance = position_ids[:, :, None] - position_ids[:, None, :]
        sees &= (distance < window) | (queries == -1)  # padding must see something
    return sees


def _mask_function(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    """Return `visible` as flex_attention's function of one query and one key."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = rows.segment_ids[b, q], rows.segment_ids[b, k]
        allowed = (q >= k) & ((key == 0) | (query == key))
        if window is not None:
            distance = rows.position_ids[b, q] - rows.position_ids[b, k]
            allowed = allowed & ((distance < window) | (query == -1))
        return allowed

    return sees


def _one_mask(rows: SharedRows, window: int | None, implementation: str, dtype: Any) -> Any:
    """Return the mask in the format of an attention implementation of transformers."""
    if implementation == "flex_attention":  # kept as blocks; creating it needs an L x L tensor
        from torch.nn.attention.flex_attention import create_block_mask

        B, L = rows.input_ids.shape
        device = str(rows.input_ids.device)
        return create_block_mask(_mask_function(rows, window), B, None, L, L, device=device)
    sees = visible(rows, window=window)[:, None]  # [B, 1, L, L], the same for all heads
    if implementation == "eager":  # it adds its mask to the scores
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return sees


def model_inputs(rows: SharedRows, config: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs of a transformers decoder for these rows.

    Args:
        config: the model's configuration, with its sliding windows and attention implementation.
        dtype: the model's type, for additive masks.
    """
    implementation = config.get_text_config()._attn_implementation

    def mask(window: int | None) -> Any:
        return _one_mask(rows, window, implementation, dtype)

    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "attention_mask": masks_of_layers(config, mask),
    }


def masks_of_layers(config: Any, make: Callable[[int | None], Any]) -> Any:
    """Return the attention mask of a model: one, or one for each kind of layer.

    Args:
        make: makes the mask of a window; None is full attention.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    if layers is None:  # one kind of layer: a window applies to every layer
        return make(window)
    if "sliding_attention" in layers:
        return {"full_attention": make(None), "sliding_attention": make(window)}
    return make(None)


def obstacle(config: Any) -> str | None:
    """Return why a model of this configuration cannot share prefixes; None if no reason is known.

    `probes.sharing_obstacle` detects other reasons by a comparison with the plain path.
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
    """Split a batch so that rows of similar length are computed together.

    The split has the lowest cost in tokens: a part costs its rows with padding, at least `least`,
    plus `overhead`. Dynamic programming over the rows in order of length finds it.

    Args:
        lengths: length of each row, in tokens.
        overhead: cost of one more forward and backward pass, in tokens.
        least: passes with fewer tokens than this are not faster (the GPU is not full).

    Returns:
        The row indices of each part; together all rows.
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
    """The fixed cost of a forward and backward pass on one kind of device.

    Attributes:
        operations: cost independent of the size of the pass (launching kernels, Python), in
            floating-point operations.
        tokens: cost of reading and writing every weight and gradient once, in tokens. This cost and
            that of a token both grow with the model, so one number serves all models.
        least: a pass of fewer tokens does not fill the device.
    """

    operations: float
    tokens: float
    least: float


PASS_COSTS = {"cpu": PassCost(operations=3e9, tokens=32, least=0)}
ANY_GPU = PassCost(operations=1e13, tokens=512, least=8192)

WORTHWHILE = 0.1
"""The share of a batch's tokens, padding included, that one more part must save.

Fewer passes also help on a shared machine, because threads wait for each other in every pass.
"""


def cheap_split(lengths: Sequence[int], *, parameters: int, device: str) -> list[list[int]]:
    """Call `like_lengths` with costs for the size of the model.

    The costs are not measured: a resumed run must split the same batch in the same way.

    Args:
        lengths: length of each row, in tokens.
        parameters: number of model parameters.
        device: a kind of torch device, such as "cpu" or "cuda".
    """
    fixed = PASS_COSTS.get(device, ANY_GPU)
    # 6: operations per parameter and token of a forward and backward pass.
    overhead = fixed.tokens + fixed.operations / (6 * parameters)
    whole = len(lengths) * max(lengths)
    return like_lengths(lengths, overhead=max(overhead, WORTHWHILE * whole), least=fixed.least)
