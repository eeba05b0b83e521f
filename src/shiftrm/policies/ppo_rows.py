"""Samples as rows of tokens, and the passes of PPO's models over them.

Rows are `prompt + response`, padded on the right, so that absolute positions are the same as in
training. Only the last `A` columns are used, from the end of the shortest prompt on: column
`a` of every [B, A] tensor belongs to the token at `T - A + a` (its log-probability, the value of
the state before it). A mask marks the response tokens, including EOS. It is computed from lengths,
not from token ids, so pad may equal EOS.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.core.likelihood import unwrapped
from shiftrm.models.rewards import pad_right, token_values
from shiftrm.models.sampling import Sample
from shiftrm.policies.ppo_passes import Predictions, logits_at, predictions_at, vocabulary_of

LOGITS_AT_ONCE = 2**27
"""Most logits of one model held at once without gradient (512 MiB in fp32)."""

TOKENS_ON_CPU = 1536
"""Most tokens in one pass without gradient on a CPU, whose caches do not hold more activations."""

FEW_LOGITS = 2**20
"""Rows with fewer logits in all of their last A columns compute them all (4 MiB in fp32)."""


@dataclass(frozen=True)
class Rows:
    """Samples as right-padded rows; see the module docstring.

    Attributes:
        input_ids, attention_mask: int64, shape [B, T].
        response_mask: bool, shape [B, A]; the columns are the last A of T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

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
        return Rows(self.input_ids[rows], self.attention_mask[rows], self.response_mask[rows])

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
        return self._of_few(model) if self._are_few(model) else logits_at(model, *self._inputs())

    def predictions(self, model: Any) -> Predictions:
        """What the model predicts at the response tokens; see `predictions_at`."""
        if self._are_few(model):
            return Predictions(self._of_few(model), vocabulary_of(model))
        return predictions_at(model, *self._inputs())

    def logprobs(self, model: Any) -> Tensor:
        """Log-probabilities of the last A tokens, shape [B, A]; 0 where the mask is False."""
        return self.spread(self.predictions(model).logprobs(self.tokens))

    def _inputs(self) -> tuple[dict[str, Tensor], Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}, self.places

    def _are_few(self, model: Any) -> bool:
        return self.response_mask.numel() * vocabulary_of(model) <= FEW_LOGITS

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
        """Yield parts for passes without gradient, of at most this many rows.

        Args:
            vocabulary: logits per token, if the pass returns logits.
        """
        if vocabulary is not None:
            most = min(most, self.within(LOGITS_AT_ONCE, vocabulary))
        if self.input_ids.device.type == "cpu":
            most = min(most, max(1, TOKENS_ON_CPU // self.input_ids.shape[1]))
        return self.chunks(most)

    def within(self, logits: int, vocabulary: int) -> int:
        """Number of rows, at least 1, that together have at most this many logits."""
        longest = int(self.response_mask.sum(dim=1).max()) if len(self) else 0
        return max(1, logits // max(1, longest * vocabulary))

    def values(self, critic: nn.Module) -> Tensor:
        """The critic's value of the state before each of the last A tokens, shape [B, A]."""
        A = self.response_mask.shape[1]
        return token_values(critic, self.input_ids, self.attention_mask)[:, -(A + 1) : -1]
