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

from shiftrm.data.groups import check_prompt, check_responses
from shiftrm.errors import UserError
from shiftrm.rendering import Text, check_text, encode


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
        UserError: the model has none, as when a causal language model is given, or its head is
            more than one linear layer.
    """
    head = _find_head(model)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"the score head of {type(model).__name__} is a {type(head).__name__}, not a linear "
            "layer; its rewards can be read, but not its weights"
        )
    return head


def _find_head(model: nn.Module) -> nn.Module:
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


@contextmanager
def _head_outputs(model: nn.Module, positions: Tensor | None):  # type: ignore[no-untyped-def]
    """Collect the head's values in fp32, at `positions` [B, P] of each row or everywhere.

    The head is applied inside its own forward hook, where its weights are at hand even when a
    wrapper shards them. Of a head that is not a plain linear layer (LoRA's, RoBERTa's, a quantised
    one) the own output is read. Encoders hand their head one pooled state a row, or their head
    pools.
    """
    collected: list[Tensor] = []

    def hook(head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        linear = None
        if isinstance(head, nn.Linear) and head.weight.is_floating_point():
            linear = head
        states = output if linear is None else inputs[0]  # [B, T, H], or [B, H] if pooled already
        states = _select(states, positions, name=type(model).__name__)
        with torch.autocast(device_type=states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            if linear is not None:
                bias = None if linear.bias is None else linear.bias.to(states.dtype)
                states = F.linear(states, linear.weight.to(states.dtype), bias)
            collected.append(states[..., 0])

    handle = _find_head(model).register_forward_hook(hook)
    try:
        yield collected
    finally:
        handle.remove()


def _select(states: Tensor, positions: Tensor | None, *, name: str) -> Tensor:
    """`states` [B, T, H] at `positions` [B, P]: [B, P, H]. A pooled state [B, H] is [B, 1, H]."""
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
    """Rewards at given positions of each row.

    Args:
        model: a sequence-classification model with one label.
        input_ids, attention_mask: shape [B, T].
        positions: token indices into the row, shape [B, P]. An encoder that pools by itself (BERT)
            has one reward a row: P must be 1, and the index says nothing.

    Returns:
        Rewards, fp32 (fp64 for an fp64 model), shape [B, P].

    Raises:
        UserError: several positions of a model that pools by itself.
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
    """The head's value at every token, shape [B, T]; what a critic is.

    Raises:
        UserError: the model pools by itself, as encoders do.
    """
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
        UserError: the row has none of them, or what should be text is something else.
    """
    check_prompt(row, where)
    prompt = row.get("prompt")
    if "response" in row:
        check_text(row["response"], f"{where}: column 'response'")
        return [Scorable(prompt, row["response"], _flag(row, "finished", where))]
    if "responses" in row:
        responses = check_responses(row, where)
        if not responses:
            raise UserError(f"{where}: column 'responses' is an empty list; remove the row")
        flags = row.get("finished") or [True] * len(responses)
        return [Scorable(prompt, r, f) for r, f in zip(responses, flags, strict=True)]
    if "chosen" in row and "rejected" in row:
        for side in ("chosen", "rejected"):
            check_text(row[side], f"{where}: column {side!r}")
        return [
            Scorable(prompt, row[side], _flag(row, f"{side}_finished", where))
            for side in ("chosen", "rejected")
        ]
    raise UserError(
        f"{where}: nothing to score: expected a column 'response', 'responses', or 'chosen' and "
        f"'rejected'; the row has {', '.join(map(repr, row)) or 'no columns'}"
    )


def _flag(row: dict[str, Any], column: str, where: str) -> bool:
    """Whether a response is finished; it is where the row does not say."""
    value = row.get(column)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise UserError(f"{where}: column {column!r} is {value!r}; expected true or false")
    return value


class Scorer:
    """A reward model with its tokenizer: text in, rewards out.

    >>> scorer = Scorer.from_pretrained("runs/demo/reward_model")   # doctest: +SKIP
    >>> scorer(["describe the garden :"], [" lovely roses bloom"])  # doctest: +SKIP
    [0.42]
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        _find_head(model)
        labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if labels != 1:
            raise UserError(f"the model has num_labels={labels}; a reward model has num_labels=1")
        # Positions are explicit and the mask hides padding, so any token may pad.
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._pad_token_id: int = eos if pad is None else pad
        if self._pad_token_id is None:
            raise UserError(
                "the tokenizer has neither a pad nor an EOS token: set tokenizer.eos_token"
            )
        config: Any = model.config
        text_config = config.get_text_config()
        if text_config.pad_token_id is None:  # without one, transformers refuses batches
            text_config.pad_token_id = self._pad_token_id
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

        Raises:
            UserError: lists of other lengths, or a response that `encode` refuses.
        """
        for name, texts in (("prompts", prompts), ("responses", responses)):
            if isinstance(texts, str):
                raise UserError(f"{name} is one string; give a list of them")
        finished = finished if finished is not None else [True] * len(responses)
        if not len(prompts) == len(responses) == len(finished):
            raise UserError(
                f"{len(prompts)} prompts, {len(responses)} responses and {len(finished)} entries "
                "of finished; they must be as many"
            )
        sequences = [
            self.encode(prompt, response, finished=done, name=f"response {index}")
            for index, (prompt, response, done) in enumerate(
                zip(prompts, responses, finished, strict=True)
            )
        ]
        return self.score_ids(sequences, batch_size=batch_size)

    def encode(
        self, prompt: Text | None, response: Text, *, finished: bool = True, name: str = "response"
    ) -> list[int]:
        """Token ids of a response with its prompt, as `rendering.encode` makes them.

        Args:
            name: how errors call it.

        Raises:
            UserError: not text, no tokens, or more of them than the model's context holds.
        """
        try:
            sequence = encode(self.tokenizer, prompt, response, finished=finished)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not sequence:
            raise UserError(f"{name}: prompt and response are empty, so there is nothing to score")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(sequence) > limit:
            raise UserError(
                f"{name}: prompt and response have {len(sequence)} tokens but the model's context "
                f"is {limit}; shorten or leave it out"
            )
        return sequence

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], *, batch_size: int = 64) -> list[float]:
        """Rewards of token sequences. Rows of like length share a batch, so padding stays small."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        device = next(self.model.parameters()).device
        rewards = [0.0] * len(sequences)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            ids, mask = pad_right(
                [sequences[i] for i in chunk], pad_token_id=self._pad_token_id, device=device
            )
            values = sequence_rewards(self.model, ids, mask)
            for i, value in zip(chunk, values.tolist(), strict=True):
                rewards[i] = value
        return rewards
