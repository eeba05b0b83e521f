"""From a reward-model checkpoint to rewards of (prompt, response).

Rewards are read in fp32 at explicit positions, the last real token of each sequence. The models'
own pooling looks for pad tokens instead, and reads the wrong one where pad equals EOS.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.rendering import Text, encode


def pad_right(
    sequences: Sequence[Sequence[int]], *, pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right.

    Returns:
        `input_ids` and `attention_mask`, both int64 of shape [B, T].
    """
    T = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), T), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer that turns a hidden state into a reward, inside any wrapper (DDP, PEFT).

    Raises:
        UserError: the model has none, as when a causal language model is given.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("score", "classifier"):
            # PEFT keeps the trained copy of the head in `modules_to_save`.
            saved = getattr(module, "modules_to_save", None)
            if saved is not None:
                active = module.active_adapter
                module = saved[active if isinstance(active, str) else active[0]]
            if isinstance(module, nn.Linear):
                return module
    raise UserError(
        f"{type(model).__name__} has no score head: a reward model is a sequence-classification "
        "checkpoint with num_labels=1 (AutoModelForSequenceClassification)"
    )


@contextmanager
def _head_outputs(model: nn.Module, positions: Tensor | None):  # type: ignore[no-untyped-def]
    """Collect the head's values in fp32, at `positions` [B, P] of each row or everywhere.

    The head is applied inside its own forward hook, where its weights are at hand even when a
    wrapper shards them.
    """
    collected: list[Tensor] = []

    def hook(head: nn.Linear, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        hidden = inputs[0]
        if positions is not None:
            index = positions[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            bias = None if head.bias is None else head.bias.to(dtype)
            collected.append(F.linear(hidden.to(dtype), head.weight.to(dtype), bias)[..., 0])

    handle = score_head(model).register_forward_hook(hook)
    try:
        yield collected
    finally:
        handle.remove()


def rewards_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """Rewards at given positions of each row.

    Args:
        model: a sequence-classification model with one label.
        input_ids, attention_mask: shape [B, T].
        positions: token indices into the row, shape [B, P].

    Returns:
        Rewards, fp32 (fp64 for an fp64 model), shape [B, P].
    """
    with _head_outputs(model, positions) as collected:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return collected[0]


def sequence_rewards(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One reward a row, read at the last token the mask marks as real; shape [B].

    The mask decides, not the token's identity: a sequence may end in pad == EOS.
    """
    T = input_ids.shape[1]
    last = T - 1 - attention_mask.flip(1).argmax(dim=1)
    return rewards_at(model, input_ids, attention_mask, last[:, None])[:, 0]


def token_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's value at every token, shape [B, T]; what a critic is."""
    with _head_outputs(model, None) as collected:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return collected[0]


class Scorable(NamedTuple):
    """One response to score, with its prompt; `finished` as in `rendering.encode`."""

    prompt: Text | None
    response: Text
    finished: bool = True


def scorable_texts(row: dict[str, Any], where: str) -> list[Scorable]:
    """The responses of a row: `response`, `responses`, or `chosen` and `rejected`, in this order.

    Raises:
        UserError: the row has none of them.
    """
    prompt = row.get("prompt")
    if "response" in row:
        return [Scorable(prompt, row["response"], bool(row.get("finished", True)))]
    if "responses" in row:
        finished = row.get("finished") or [True] * len(row["responses"])
        return [Scorable(prompt, r, f) for r, f in zip(row["responses"], finished, strict=True)]
    if "chosen" in row and "rejected" in row:
        return [Scorable(prompt, row["chosen"]), Scorable(prompt, row["rejected"])]
    raise UserError(
        f"{where}: nothing to score: expected a column 'response', 'responses', or 'chosen' and "
        f"'rejected'; the row has {', '.join(map(repr, row)) or 'no columns'}"
    )


class Scorer:
    """A reward model with its tokenizer: text in, rewards out.

    >>> scorer = Scorer.from_pretrained("runs/demo/reward_model")   # doctest: +SKIP
    >>> scorer(["describe the garden :"], [" lovely roses bloom"])  # doctest: +SKIP
    [0.42]
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        score_head(model)
        labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if labels != 1:
            raise UserError(f"the model has num_labels={labels}; a reward model has num_labels=1")
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token: set tokenizer.pad_token, then score")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | Path, **model_options: Any) -> "Scorer":
        """Load a checkpoint folder or hub name, as saved by our trainers, TRL or transformers.

        Raises:
            UserError: the checkpoint has no trained score head (a causal language model, say).
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(path), output_loading_info=True, **model_options
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be loaded as a reward model with its tokenizer "
                f"({str(error).splitlines()[0]})"
            ) from None
        missing = [key for key in info["missing_keys"] if "score" in key or "classifier" in key]
        if missing:
            raise UserError(
                f"{path}: the checkpoint has no score head ({missing[0]} is missing), so it is not "
                "a trained reward model; train one with RewardTrainer first"
            )
        return cls(model, tokenizer)

    def __call__(
        self,
        prompts: Sequence[Text | None],
        responses: Sequence[Text],
        *,
        finished: Sequence[bool] | None = None,
        batch_size: int = 64,
    ) -> list[float]:
        """Rewards of responses to prompts, in the order given.

        Args:
            prompts, responses: of equal length; see `rendering.encode`.
            finished: False where a response was cut off by a length limit. Default: all finished.
            batch_size: rows a forward pass. It changes speed and memory, not the rewards.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        finished = finished if finished is not None else [True] * len(responses)
        sequences = [
            encode(self.tokenizer, prompt, response, finished=done)
            for prompt, response, done in zip(prompts, responses, finished, strict=True)
        ]
        self._check_lengths(sequences)
        return self.score_ids(sequences, batch_size=batch_size)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], *, batch_size: int = 64) -> list[float]:
        """Rewards of token sequences. Rows of like length share a batch, so padding stays small."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        device = next(self.model.parameters()).device
        rewards = [0.0] * len(sequences)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            ids, mask = pad_right(
                [sequences[i] for i in chunk],
                pad_token_id=self.tokenizer.pad_token_id,
                device=device,
            )
            values = sequence_rewards(self.model, ids, mask)
            for i, value in zip(chunk, values.tolist(), strict=True):
                rewards[i] = value
        return rewards

    def _check_lengths(self, sequences: Sequence[Sequence[int]]) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None:
            return
        for index, sequence in enumerate(sequences):
            if len(sequence) > limit:
                raise UserError(
                    f"response {index}: prompt and response have {len(sequence)} tokens but the "
                    f"model's context is {limit}; shorten or leave it out"
                )
