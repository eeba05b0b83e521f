"""Samples as rows of tokens, and the passes of PPO's models over them.

Rows are `prompt + response`, padded on the right, so that absolute positions are the same as in
training. Only the last `A` columns are used, from the end of the shortest prompt on: column
`a` of every [B, A] tensor belongs to the token at `T - A + a` (its log-probability, the value of
the state before it). A mask marks the response tokens, including EOS. It is computed from lengths,
not from token ids, so pad may equal EOS.

The roll-outs of one prompt can share it: a pass then computes them in one row of `models.prefix`,
behind the prompt, which changes no number beyond rounding.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.core.likelihood import unwrapped
from shiftrm.models.prefix import SharedRows, cheap_split, model_inputs, pack
from shiftrm.models.rewards import pad_right, shared_token_values, token_values
from shiftrm.models.sampling import Sample
from shiftrm.policies.ppo_passes import Predictions, logits_at, predictions_at, vocabulary_of

LOGITS_AT_ONCE = 2**27
"""Most logits of one model held at once without gradient (512 MiB in fp32)."""

TOKENS_ON_CPU = 1536
"""Most tokens in one pass without gradient on a CPU, whose caches do not hold more activations."""

FEW_LOGITS = 2**20
"""Rows with fewer logits in all of their last A columns compute them all (4 MiB in fp32).

As the gold worlds do: with other shapes their sums round differently, and their runs would change.
"""

LEAST_SHARED, LEAST_SHARE = 32, 0.3
"""Rows share their prompts where that saves this many tokens a row, and this share of all."""

LONGEST_PACKED = 4096
"""Most tokens of a prompt with its responses: attention computes all pairs and masks most."""


class Packed(NamedTuple):
    """Rows that share their prompts, and the places of `Rows.places` in them."""

    rows: SharedRows
    places: Tensor


@dataclass(frozen=True)
class Rows:
    """Samples as right-padded rows; see the module docstring.

    Attributes:
        input_ids, attention_mask: int64, shape [B, T].
        response_mask: bool, shape [B, A]; the columns are the last A of T.
        shares: whether a pass may share prompts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    shares: bool = False

    @classmethod
    def pack(cls, samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> "Rows":
        """Pack samples, each with at least one prompt and one response token."""
        ids, attention = pad_right(
            # Any token works as padding: causal attention does not look to the right.
            [s.prompt_ids + s.response_ids for s in samples],
            pad_token_id=0,
            device=device,
        )
        prompt_B = torch.tensor([len(s.prompt_ids) for s in samples], device=device)
        start = int(prompt_B.min())
        mask = attention[:, start:].bool()
        return cls(
            ids,
            attention,
            mask & (torch.arange(start, ids.shape[1], device=device) >= prompt_B[:, None]),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Sequence[int] | slice) -> "Rows":
        return Rows(
            self.input_ids[rows], self.attention_mask[rows], self.response_mask[rows], self.shares
        )

    def chunks(self, size: int) -> Iterator["Rows"]:
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    @property
    def places(self) -> Tensor:
        """Index among the B * T tokens of the state before each of the N response tokens, [N]."""
        T, A = self.input_ids.shape[1], self.response_mask.shape[1]
        row, column = self.response_mask.nonzero(as_tuple=True)
        return row * T + column + (T - A - 1)

    @property
    def tokens(self) -> Tensor:
        """The response tokens of all rows, row by row, shape [N]."""
        return self.input_ids[:, -self.response_mask.shape[1] :][self.response_mask]

    def spread(self, values_N: Tensor) -> Tensor:
        """Return values of the response tokens at their places, shape [B, A]; 0 elsewhere."""
        zeros = values_N.new_zeros(self.response_mask.shape)
        return zeros.masked_scatter(self.response_mask, values_N)

    def logits(self, model: Any) -> Tensor:
        """Unmodified logits of the response tokens, as the model gives them, shape [N, V].

        The model may be wrapped (DDP, FSDP).
        """
        if self._are_few(model):
            return self._of_few(model)
        return logits_at(model, *self._inputs(model))

    def predictions(self, model: Any) -> Predictions:
        """What the model predicts at the response tokens; see `predictions_at`."""
        if self._are_few(model):
            return Predictions(self._of_few(model), vocabulary_of(model))
        return predictions_at(model, *self._inputs(model))

    def logprobs(self, model: Any) -> Tensor:
        """Log-probabilities of the last A tokens, shape [B, A]; 0 where the mask is False."""
        return self.spread(self.predictions(model).logprobs(self.tokens))

    def _inputs(self, model: Any) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs of a pass and the places of its N states."""
        if self.packed is None:
            ids, mask = self._without_padding()
            T, longest = self.input_ids.shape[1], ids.shape[1]
            places = self.places // T * longest + self.places % T
            return {"input_ids": ids, "attention_mask": mask}, places
        inner: Any = unwrapped(model)
        dtype = next(model.parameters()).dtype
        return model_inputs(self.packed.rows, inner.config, dtype=dtype), self.packed.places

    def _without_padding(self) -> tuple[Tensor, Tensor]:
        """Return ids and mask without the columns that are padding in all rows."""
        longest = int(self.attention_mask.sum(dim=1).max())
        return self.input_ids[:, :longest], self.attention_mask[:, :longest]

    def _are_few(self, model: Any) -> bool:
        """Whether a pass is so small that its order of sums is kept instead of saving work."""
        few = self.response_mask.numel() * vocabulary_of(model) <= FEW_LOGITS
        return few and self.packed is None

    def _of_few(self, model: Any) -> Tensor:
        """`logits` from those of the last A tokens: one product where there is little to save."""
        A = self.response_mask.shape[1]
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
            options["logits_to_keep"] = A + 1
        logits: Tensor = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            use_cache=False,
            **options,
        ).logits[:, -(A + 1) : -1]
        return logits[self.response_mask]

    def portions(self, most: int, vocabulary: int | None = None) -> Iterator["Rows"]:
        """Yield parts for passes without gradient, of at most this many rows, in order.

        Args:
            vocabulary: logits per token, if the pass returns logits.
        """
        if vocabulary is not None:
            most = min(most, self.within(LOGITS_AT_ONCE, vocabulary))
        on_cpu = self.input_ids.device.type == "cpu"
        if self.packed is not None:
            return self._whole_groups(most, TOKENS_ON_CPU if on_cpu else None)
        if on_cpu:
            most = min(most, max(1, TOKENS_ON_CPU // self.input_ids.shape[1]))
        return self.chunks(most)

    def within(self, logits: int, vocabulary: int) -> int:
        """Number of rows, at least 1, that together have at most this many logits."""
        longest = int(self.response_mask.sum(dim=1).max()) if len(self) else 0
        return max(1, logits // max(1, longest * vocabulary))

    def micro_batches(self, ix: Sequence[int], size: int, model: nn.Module) -> list[list[int]]:
        """Split rows of a backward pass into parts of at most `size`; all rows, in some order.

        Parts are split further so that their rows have similar lengths, where that costs less than
        the padding. Rows that share prompts are in the order of their prompts before.

        Args:
            model: the policy, whose size decides what a further pass costs.
        """
        shares = self.select(ix).packed is not None
        ordered = sorted(ix, key=lambda i: self._prompt_numbers[i]) if shares else list(ix)
        slices = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        parameters = sum(p.numel() for p in model.parameters())
        device, found = self.input_ids.device.type, []
        for some in slices:
            if self.select(some)._are_few(model):
                found.append(some)
                continue
            groups = self._groups(some) if shares else [[i] for i in some]
            lengths = [self._packed_length(group) for group in groups]
            for part in cheap_split(lengths, parameters=parameters, device=device):
                found.append([i for g in sorted(part) for i in groups[g]])
        return found

    def values(self, critic: nn.Module) -> Tensor:
        """The critic's value of the state before each of the last A tokens, shape [B, A]."""
        if self.packed is not None:
            values = shared_token_values(critic, self.packed.rows)
            return self.spread(values.flatten()[self.packed.places])
        if self._are_few(critic):
            values = token_values(critic, self.input_ids, self.attention_mask)
        else:
            ids, mask = self._without_padding()
            padding = self.input_ids.shape[1] - ids.shape[1]
            values = F.pad(token_values(critic, ids, mask), (0, padding))
        A = self.response_mask.shape[1]
        return values[:, -(A + 1) : -1]

    # Shared prompts

    def sharing(self) -> "Rows":
        """Return these rows, and allow passes to share their prompts."""
        return replace(self, shares=True)

    def example(self, prompts: int, rows: int) -> SharedRows:
        """Return a few rows of a few prompts behind these, to compare with plain rows."""
        groups = self._groups(range(len(self)))[:prompts]
        some = [[self._sequences[i] for i in group[:rows]] for group in groups]
        device = self.input_ids.device
        return SharedRows(*(tensor.to(device) for tensor in pack(some, pad_token_id=0)))

    @cached_property
    def packed(self) -> Packed | None:
        """The rows behind shared prompts, as a pass computes them; None where that saves little."""
        if not self.shares or sum(self._prompt_lengths) < LEAST_SHARED * max(1, len(self)):
            return None
        groups = self._groups(sorted(range(len(self)), key=lambda i: self._prompt_numbers[i]))
        saved = sum(self._prompt_lengths[group[0]] * (len(group) - 1) for group in groups)
        if saved < max(LEAST_SHARED * len(self), LEAST_SHARE * sum(map(len, self._sequences))):
            return None
        return self._pack(groups)

    def _pack(self, groups: list[list[int]]) -> Packed:
        device, places = self.input_ids.device, {}
        rows = pack([[self._sequences[i] for i in group] for group in groups], pad_token_id=0)
        L = rows.input_ids.shape[1]
        for number, group in enumerate(groups):
            shared = int((rows.segment_ids[number] == 0).sum())
            start = shared  # of the rest of each sequence
            for i in group:
                states = range(self._prompt_lengths[i] - 1, len(self._sequences[i]) - 1)
                places[i] = [number * L + (j if j < shared else start + j - shared) for j in states]
                start += len(self._sequences[i]) - shared
        flat = torch.tensor([place for i in range(len(self)) for place in places[i]])
        return Packed(SharedRows(*(tensor.to(device) for tensor in rows)), flat.to(device))

    @cached_property
    def _prompt_lengths(self) -> list[int]:
        T, A = self.input_ids.shape[1], self.response_mask.shape[1]
        lengths: list[int] = (self.response_mask.int().argmax(dim=1) + (T - A)).tolist()
        return lengths

    @cached_property
    def _sequences(self) -> list[list[int]]:
        lengths = self.attention_mask.sum(dim=1).tolist()
        return [ids[:n] for ids, n in zip(self.input_ids.tolist(), lengths, strict=True)]

    @cached_property
    def _prompt_numbers(self) -> list[int]:
        """A number for the prompt of each row, equal for equal prompts."""
        known: dict[tuple[int, ...], int] = {}
        prompts = zip(self._sequences, self._prompt_lengths, strict=True)
        return [known.setdefault(tuple(ids[:n]), len(known)) for ids, n in prompts]

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Return consecutive rows of one prompt, at most `LONGEST_PACKED` tokens of them."""
        groups: list[list[int]] = []
        for i in rows:
            same = bool(groups) and self._prompt_numbers[groups[-1][0]] == self._prompt_numbers[i]
            if same and self._packed_length([*groups[-1], i]) <= LONGEST_PACKED:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _packed_length(self, group: Sequence[int]) -> int:
        """Tokens of rows behind their shared prompt."""
        prompt = self._prompt_lengths[group[0]]
        return prompt + sum(len(self._sequences[i]) - prompt for i in group)

    def _whole_groups(self, most: int, tokens: int | None) -> Iterator["Rows"]:
        """Yield consecutive rows, cut between prompts where these limits allow."""
        part: list[int] = []
        count = longest = 0
        for run in self._groups(range(len(self))):
            for start in range(0, len(run), most):
                group = run[start : start + most]
                length = self._packed_length(group)
                padded = (count + 1) * max(longest, length)
                if part and (len(part) + len(group) > most or padded > (tokens or padded)):
                    yield self.select(part)
                    part, count, longest = [], 0, 0
                part, count, longest = part + group, count + 1, max(longest, length)
        yield self.select(part)
