"""Compute rewards of prompts with responses from a reward-model checkpoint."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.errors import UserError, shortened
from shiftrm.files import Row
from shiftrm.models.finite import broken_weight
from shiftrm.models.loading import (
    check_vocabulary,
    explain_loading,
    known_tokens,
    load_classifier,
    require_known_ids,
    to_accelerator,
)
from shiftrm.models.probes import require_own_reward
from shiftrm.models.rendering import Text, check_template_options, check_text, template_options
from shiftrm.models.responses import (
    Response,
    check_finished,
    check_prompt,
    check_responses,
    encode_response,
    group_responses,
)
from shiftrm.models.reward_functions import TokenReward, rewards_of
from shiftrm.models.rewards import find_head, pad_right, sequence_rewards
from shiftrm.models.rope import context_limit


def row_responses(row: Row, where: str) -> list[Response]:
    """Return a row's responses: `response`, `responses`, or `chosen` and `rejected`.

    Raises:
        UserError: the row has none of them, a response is not text, or the columns for the chat
            template are none.
    """
    check_prompt(row, where)
    check_template_options(row, where)
    prompt, options = row.get("prompt"), template_options(row)
    if "response" in row:
        check_text(row["response"], f"{where}: column 'response'")
        done = check_finished(row, "finished", where)
        return [Response(prompt, row["response"], done, template_options=options)]
    if "responses" in row:
        if not check_responses(row, where):
            raise UserError(f"{where}: column 'responses' is an empty list; remove the row")
        return group_responses(row)
    if "chosen" in row and "rejected" in row:
        for side in ("chosen", "rejected"):
            check_text(row[side], f"{where}: column {side!r}")
        return [
            Response(
                prompt,
                row[side],
                check_finished(row, f"{side}_finished", where),
                template_options=options,
            )
            for side in ("chosen", "rejected")
        ]
    raise UserError(
        f"{where}: nothing to score: expected a column 'response', 'responses', or 'chosen' and "
        f"'rejected'; the row has {', '.join(map(repr, row)) or 'no columns'}"
    )


class Scorer:
    """A reward model with its tokenizer, which maps text to rewards.

    >>> scorer = Scorer.from_pretrained("runs/demo/reward_model")   # doctest: +SKIP
    >>> scorer(["describe the garden :"], [" lovely roses bloom"])  # doctest: +SKIP
    [0.42]
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 64) -> None:
        find_head(model)
        labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if labels != 1:
            name = getattr(getattr(model, "config", None), "name_or_path", "") or "the model"
            raise UserError(f"{name} has num_labels={labels}; a reward model has num_labels=1")
        # Positions are explicit and the mask hides padding, so any token can pad.
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.pad_token_id: int = eos if pad is None else pad
        if self.pad_token_id is None:
            raise UserError(
                "the tokenizer has neither a pad nor an EOS token: set tokenizer.eos_token"
            )
        config: Any = model.config
        text_config = config.get_text_config()
        if text_config.pad_token_id is None:  # without one, transformers rejects batches
            text_config.pad_token_id = self.pad_token_id
        self.vocabulary = known_tokens(model)
        self.model = model.eval()
        require_own_reward(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, path: str | Path, **model_options: Any) -> "Scorer":
        """Load a checkpoint folder or hub name, as saved by our trainers, TRL or transformers.

        The folder may also be an ensemble or have a posterior (`models.combined`).

        Raises:
            UserError: the checkpoint has no trained score head (a causal language model, for
                example), or a part of it is missing or broken.
        """
        from shiftrm.models.combined import open_combined

        return open_combined(path, lambda part: cls._of_checkpoint(part, **model_options))

    @classmethod
    def _of_checkpoint(cls, path: str | Path, **model_options: Any) -> "Scorer":
        from transformers import AutoTokenizer
        from transformers.utils import find_adapter_config_file

        with explain_loading(path, "a reward model with its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(str(path))
            adapter = find_adapter_config_file(str(path)) is not None
            if adapter:  # its base may be a policy, whose head defaults to two labels
                # fp32, as in training: a base saved in bf16 would round the scores.
                model_options = {"num_labels": 1, "dtype": torch.float32, **model_options}
            model, missing, lost = load_classifier(path, quiet=adapter, **model_options)
        if missing:
            other = f", and its {lost[0]} is not read" if lost else ""
            raise UserError(
                f"{path}: the checkpoint has no score head ({missing[0]} is missing{other}), so it "
                "is not a trained reward model; train one with RewardTrainer first"
            )
        check_vocabulary(model, tokenizer, path)
        return cls(model, tokenizer)

    def _adopt(self, other: "Scorer") -> None:
        """Take over everything but the model."""
        self.tokenizer, self.vocabulary = other.tokenizer, other.vocabulary
        self.pad_token_id, self.batch_size = other.pad_token_id, other.batch_size

    def to_accelerator(self) -> "Scorer":
        """Move the model to this machine's accelerator, if there is one. Return self."""
        self.model = to_accelerator(self.model)
        return self

    def __call__(
        self,
        prompts: Sequence[Text | None],
        responses: Sequence[Text],
        *,
        finished: Sequence[bool] | None = None,
        batch_size: int | None = None,
    ) -> list[float]:
        """Return rewards of responses to prompts, in the given order.

        Args:
            prompts, responses: of equal length; see `rendering.encode`.
            finished: False where a response was cut off by a length limit. Default: all finished.
            batch_size: rows per forward pass; by default the scorer's. It changes speed and memory,
                not the rewards.

        Raises:
            UserError: lists of different lengths, or a response that `encode` rejects.
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
        given = map(Response, prompts, responses, finished)
        return self.score(list(given), batch_size=batch_size)

    def score(self, responses: Sequence[Response], *, batch_size: int | None = None) -> list[float]:
        """Return rewards of responses in the given order, using sampled tokens where available.

        Raises:
            UserError: as `encode`, or a reward is not finite.
        """
        sequences = [self.encode_response(r, name=f"response {i}") for i, r in enumerate(responses)]
        rewards = self.score_ids(sequences, batch_size=batch_size)
        self.require_finite(rewards, [f"response {i}" for i in range(len(rewards))])
        return rewards

    def encode(
        self, prompt: Text | None, response: Text, *, finished: bool = True, name: str = "response"
    ) -> list[int]:
        """Return `encode_response` of a text without tokens."""
        return self.encode_response(Response(prompt, response, finished), name=name)

    def encode_response(self, response: Response, *, name: str = "response") -> list[int]:
        """Return the token ids of a response with its prompt (`responses.encode_response`).

        Args:
            name: its name in error messages.

        Raises:
            UserError: not text, no tokens, or more tokens than the model's context holds.
        """
        try:
            sequence = encode_response(self.tokenizer, response, vocabulary=self.vocabulary)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not sequence:
            raise UserError(f"{name}: prompt and response are empty, so there is nothing to score")
        limit = context_limit(self.model.config)
        if limit is not None and len(sequence) > limit:
            raise UserError(
                f"{name}: prompt and response have {len(sequence)} tokens but the model's context "
                f"is {limit}; shorten or leave it out"
            )
        return sequence

    @torch.no_grad()
    def score_ids(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Return rewards of token sequences; rows of similar length share a batch.

        Args:
            progress: called with (done, total) after every batch.

        Raises:
            UserError: a token id has no embedding. Rewards may be NaN: see `require_finite`.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        for index, ids in enumerate(sequences):
            require_known_ids(ids, self.vocabulary, name=f"sequence {index}")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        device = next(self.model.parameters()).device
        rewards = [0.0] * len(sequences)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            rows, mask = pad_right(
                [sequences[i] for i in chunk], pad_token_id=self.pad_token_id, device=device
            )
            values = self._rewards(rows, mask, [sequences[i] for i in chunk])
            for i, value in zip(chunk, values.tolist(), strict=True):
                rewards[i] = value
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
        return rewards

    def _rewards(
        self, input_ids: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return the rewards of a batch, [B]; `sequences` are its rows without padding."""
        return sequence_rewards(self.model, input_ids, mask)

    def require_finite(self, rewards: Sequence[float], names: Sequence[str]) -> None:
        """Check that all rewards are finite; the error suggests causes.

        Args:
            names: names of the scored items in error messages.

        Raises:
            UserError: a reward is NaN or infinite.
        """
        for reward, name in zip(rewards, names, strict=True):
            if not math.isfinite(reward):
                weight = broken_weight(self.model)
                why = f"{weight} is not finite" if weight else "its activations overflow"
                raise UserError(
                    f"{name}: the reward is {reward}; the checkpoint is broken, or its dtype cannot"
                    f" hold its numbers ({why})"
                )


def function_rewards(
    reward_fn: Callable[..., Sequence[float]] | TokenReward, responses: Sequence[Response]
) -> list[float]:
    """Return what a function gives for responses (`rewards_of`), which must be finite.

    A comparison with NaN is false without a word, so a number that is none looks like a bad reward.

    Raises:
        UserError: a reward that is not finite, with its response; or as `rewards_of`.
    """
    rewards = rewards_of(reward_fn, responses)
    for response, reward in zip(responses, rewards, strict=True):
        if not math.isfinite(reward):
            raise UserError(
                f"reward_fn gave {reward} for the response {shortened(str(response.text))!r} to "
                f"{shortened(str(response.prompt))!r}; it must give finite numbers"
            )
    return rewards


def score_rows(scorer: Callable[..., Sequence[float]], rows: Sequence[Row]) -> list[list[float]]:
    """Return the rewards of all responses of each row, `{"prompt", "responses", "finished"}`.

    Args:
        scorer: a `Scorer`, or any callable with its signature.

    Raises:
        UserError: as `function_rewards`.
    """
    flat = iter(function_rewards(scorer, [r for row in rows for r in group_responses(row)]))
    return [[next(flat) for _ in row["responses"]] for row in rows]


def mean_and_spread(rewards: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return mean and standard deviation (never 0) over all responses of all rows."""
    flat = [r for row in rewards for r in row]
    mean = sum(flat) / len(flat)
    variance = sum((r - mean) ** 2 for r in flat) / max(1, len(flat) - 1)
    return mean, max(variance**0.5, 1e-8)
