"""Decode a batch of responses: each prompt is read once, and finished responses leave the batch.

`decode` is a `custom_generate` of transformers' `model.generate`, which prepares the inputs, the
logits processors and the stopping criteria as for its own loop.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shiftrm.models.rope import frequency_limit

STAYING_SHARE = 0.75
"""Finished rows leave when the others are at most this share of the batch; it copies the cache."""

FEWEST_ROWS = 16
"""Below this the batch is not made smaller: nothing is gained, and few rows round otherwise."""

PASS_TOKENS = 256
"""Prompts of different lengths are read in passes of their own where this saves more padding."""

INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class NotShared(Exception):
    """The model or its cache does not allow `decode`; the message is the reason."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room for more tokens.

    `DynamicLayer` copies all of them for every new token.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self._buffers: list[torch.Tensor] = []  # of keys and values, while they are current

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; return all."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._buffers = [
                _with_room(t, end + max(32, end // 4)) for t in (self.keys, self.values)
            ]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        super().reorder_cache(beam_idx)
        self._buffers = []


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    rows, heads, filled, width = states.shape
    buffer = states.new_empty(rows, heads, length, width)
    buffer[:, :, :filled] = states
    return buffer


def require_shareable(model: Any, length: int, inputs: dict[str, Any]) -> None:
    """Refuse models and caches whose state `decode` cannot copy from one row to another.

    Args:
        length: longest possible sequence, in tokens.
        inputs: what `model.generate` prepared for the forward pass.

    Raises:
        NotShared: with the reason.
    """
    cache: Any = inputs.get("past_key_values")
    if model.config.is_encoder_decoder:
        raise NotShared("an encoder-decoder has a second cache")
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotShared(f"{type(cache).__name__} is not a plain cache of keys and values")
    if odd := {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise NotShared(f"{odd.pop().__name__} holds more than keys and values")
    if unknown := inputs.keys() - INPUTS:
        raise NotShared(f"the model is given {min(unknown)}")
    prepares = "prepare_inputs_for_generation"
    own = getattr(type(model), prepares) is not getattr(GenerationMixin, prepares)
    if own or prepares in vars(model) or model.is_remote_code():
        raise NotShared("the model prepares its inputs itself")
    limit = frequency_limit(model.config)
    if limit is not None and length > limit:
        raise NotShared("positions are rotated by the longest row of the batch")
    if _is_sharded(model):
        raise NotShared("all processes must make the same number of passes")


def _is_sharded(model: Any) -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def decode(
    model: Any,
    input_ids: torch.Tensor,
    *,
    prompt_of_row: Sequence[int],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **inputs: Any,
) -> torch.Tensor:
    """Return what transformers' own loop would for the same random state: prompts and responses.

    The keys and values of a prompt are computed once for all rows that have it. Rows that have
    finished leave the forward pass, but random numbers are drawn for all rows of the batch, so the
    tokens of a row do not depend on what became of the others. Logits agree with those of
    transformers' loop up to rounding.

    Args:
        input_ids: padded on the left, [N, T].
        prompt_of_row: N numbers; rows with the same number have the same prompt.

    Raises:
        NotShared: see `require_shareable`; no random number was drawn.
    """
    require_shareable(model, generation_config.max_length, inputs)
    batch = _Batch(model, input_ids, inputs)
    logits_LV = batch.prefill(prompt_of_row)
    probabilities_NV = torch.zeros_like(logits_LV)
    finished_N = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        scores_LV = logits_processor(input_ids[batch.live], logits_LV)
        if generation_config.do_sample:
            # Those that left keep their last probabilities, so that the others' draws stay.
            probabilities_NV[batch.live] = scores_LV.softmax(-1)
            drawn_N = torch.multinomial(probabilities_NV, 1).squeeze(1)
        else:
            drawn_N = torch.zeros_like(input_ids[:, 0])
            drawn_N[batch.live] = scores_LV.argmax(-1)
        tokens_N = torch.where(finished_N, generation_config.pad_token_id, drawn_N)
        input_ids = torch.cat([input_ids, tokens_N[:, None]], dim=1)
        finished_N |= stopping_criteria(input_ids, None)
        unfinished = int((~finished_N).sum())
        if not unfinished:
            return input_ids
        if len(batch.live) > FEWEST_ROWS and unfinished <= STAYING_SHARE * len(batch.live):
            kept_L = batch.drop(finished_N)
            logits_processor = _of_rows(logits_processor, kept_L)
        logits_LV = batch.step(tokens_N)


class _Batch:
    """The rows that are in the forward pass, with their cache.

    Attributes:
        live: their numbers among all rows, [L].
    """

    def __init__(self, model: Any, input_ids: torch.Tensor, inputs: dict[str, Any]):
        self.model, self.ids, self.cache = model, input_ids, inputs["past_key_values"]
        self.mask, self.positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self.extra = {k: inputs[k] for k in ("use_cache", "logits_to_keep") if k in inputs}
        self.live = torch.arange(len(input_ids), device=input_ids.device)

    def prefill(self, prompt_of_row: Sequence[int]) -> torch.Tensor:
        """Read every prompt once; return the logits of all rows after it, [N, V]."""
        row_of_prompt = {prompt: row for row, prompt in enumerate(prompt_of_row)}
        place = {prompt: i for i, prompt in enumerate(row_of_prompt)}
        device = self.ids.device
        distinct_P = torch.tensor(list(row_of_prompt.values()), device=device)
        place_N = torch.tensor([place[prompt] for prompt in prompt_of_row], device=device)
        logits_PV = self._read(distinct_P)
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                self.cache.layers[i] = RoomyLayer(layer)
        self.cache.reorder_cache(place_N)
        if self.positions is not None:
            self.positions = self.positions[:, -1:]
        return logits_PV[place_N]

    def _read(self, rows_P: torch.Tensor) -> torch.Tensor:
        """Fill the cache with these rows, in passes of similar lengths; return their logits."""
        lengths_P = self.ids.new_full((len(rows_P),), self.ids.shape[1])
        if self.mask is not None:
            lengths_P = self.mask[rows_P].sum(1)
        parts = [list(range(len(rows_P)))]
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            parts = passes(lengths_P.tolist())
        if len(parts) == 1:
            return self._forward(*self._inputs(rows_P, 0), self.cache)
        caches, found = [copy.deepcopy(self.cache) for _ in parts], []
        for part, cache in zip(parts, caches, strict=True):
            start = self.ids.shape[1] - int(lengths_P[part].max())
            found.append(self._forward(*self._inputs(rows_P[part], start), cache))
        layers = zip(*(cache.layers for cache in caches), strict=True)
        self.cache.layers = [_joined(same) for same in layers]
        order_P = torch.tensor([i for part in parts for i in part], device=rows_P.device).argsort()
        self.cache.reorder_cache(order_P)
        return torch.cat(found)[order_P]

    def _inputs(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, Any, Any]:
        """Return ids, mask and positions of these rows' prompts from a column on."""
        mask = None if self.mask is None else self.mask[rows, start:]
        if mask is not None and start and bool(mask.all()):
            mask = None  # as transformers does without padding
        positions = None if self.positions is None else self.positions[rows, start:]
        return self.ids[rows, start:], mask, positions

    def step(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Read the last tokens; return the logits of the rows in the pass, [L, V]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if self.positions is not None:
            self.positions = self.positions + 1
        return self._forward(tokens_N[self.live, None], self.mask, self.positions, self.cache)

    def _forward(self, ids: torch.Tensor, mask: Any, positions: Any, cache: Any) -> torch.Tensor:
        inputs = {"attention_mask": mask, "position_ids": positions}
        inputs = {key: value for key, value in inputs.items() if value is not None}
        output = self.model(
            input_ids=ids, past_key_values=cache, return_dict=True, **inputs, **self.extra
        )
        return output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)

    def drop(self, finished_N: torch.Tensor) -> torch.Tensor:
        """Drop finished rows, down to `FEWEST_ROWS`; return the places in `live` of the others."""
        done_L = finished_N[self.live]
        first_L = done_L.sort(stable=True).indices  # those that are not finished
        kept_L = first_L[: max(FEWEST_ROWS, int((~done_L).sum()))].sort().values
        self.cache.reorder_cache(kept_L)
        self.live = self.live[kept_L]
        self.mask = None if self.mask is None else self.mask[kept_L]
        self.positions = None if self.positions is None else self.positions[kept_L]
        return kept_L


def passes(lengths: Sequence[int]) -> list[list[int]]:
    """Divide prompts into passes, each padded to its longest, with the fewest tokens in all.

    A pass costs as much as `PASS_TOKENS` more tokens.

    Returns:
        places in `lengths`, a list for each pass.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if len(lengths) * max(lengths) - sum(lengths) <= PASS_TOKENS:
        return [list(range(len(lengths)))]
    # best[j]: tokens of the j shortest prompts, and where the last of their passes begins.
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[i][0] + PASS_TOKENS + (end - i) * longest, i) for i in range(end)))
    parts, end = [], len(order)
    while end:
        parts.append(order[best[end][1] : end])
        end = best[end][1]
    return parts


def _joined(layers: Sequence[Any]) -> DynamicLayer:
    """Return one layer with the rows of all, padded on the left to the longest."""
    joined = DynamicLayer()
    if layers[0].is_initialized:
        joined.update(*(_stacked([getattr(x, n) for x in layers]) for n in ("keys", "values")))
    return joined


def _stacked(states: Sequence[torch.Tensor]) -> torch.Tensor:
    longest = max(part.shape[-2] for part in states)
    return torch.cat([F.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in states])


def _of_rows(processors: Any, kept_L: torch.Tensor) -> Any:
    """Return the processors for these rows: a repetition penalty knows where each row begins."""
    chosen = [copy.copy(processor) for processor in processors]
    for processor in chosen:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            start = processor.prompt_ignore_length
            if isinstance(start, torch.Tensor):
                processor.prompt_ignore_length = start[kept_L]
    return type(processors)(chosen)
