"""Sample K responses per prompt from a policy, and write group files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.generation import (
    PAPER_SAMPLING,
    Sample,
    SamplingConfig,
    check_prompt_lengths,
    cut_at_stop,
    generate,
    generation_config,
    load_policy,
    padding_token,
    remember_stop_tokens,
)
from shiftrm.models.group_files import holds_groups, sampling_key, write_groups
from shiftrm.models.loading import weights_digest
from shiftrm.models.rendering import (
    Text,
    check_text,
    decode_response,
    encode_prompt,
    stop_token_ids,
)
from shiftrm.models.responses import (
    IDS,
    PROMPT_IDS,
    TOKENIZER,
    Response,
    encode_response,
    group_responses,
    sampled_ids,
    tokenizer_name,
)

__all__ = [
    "PAPER_SAMPLING",
    "Draws",
    "Sample",
    "Sampler",
    "SamplingConfig",
    "as_response",
    "as_samples",
    "check_prompt_lengths",
    "cut_at_stop",
    "draw_seed",
    "encode_prompts",
    "generate",
    "generation_config",
    "group_row",
    "load_policy",
    "padding_token",
    "remember_stop_tokens",
    "sample_groups",
    "sample_rows",
]


def draw_seed(seed: int, place: int) -> int:
    """Return the seed of the draw at a place, below 2**56.

    It is a hash, because with `seed + place` neighbouring places and seeds would share draws.
    """
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def encode_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    room: int,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts; `model` must have `room` tokens left to continue them.

    Args:
        names: the prompts' names in error messages; "prompt 0" and so on by default.

    Raises:
        UserError: a prompt is not text, has no tokens, or is too long; the tokenizer has no EOS, or
            no template for a chat.
    """
    stop_token_ids(tokenizer)
    names = names or [f"prompt {index}" for index in range(len(prompts))]
    encoded = []
    for name, prompt in zip(names, prompts, strict=True):
        check_text(prompt, name)
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not encoded[-1]:
            raise UserError(f"{name} is empty: there are no tokens to continue; leave it out")
    check_prompt_lengths(encoded, model.config, room, names=names)
    return encoded


@dataclass(frozen=True)
class Draws:
    """How many responses to sample, and how.

    Attributes:
        config: the distribution and the maximum length.
        num_responses: K, responses per prompt; a single one is not a group to adapt to.
        batch_size: prompts per call of `generate`; with a server, concurrent prompts.
        seed: the batch that begins at prompt i has the random seed `draw_seed(seed, i)`, so another
            batch size gives other draws. With a server every prompt has its own seed.

    Raises:
        UserError: on construction, if num_responses or batch_size is below one.
    """

    config: SamplingConfig = field(default_factory=SamplingConfig)
    num_responses: int = 5
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_responses", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Sampler:
    """Samples rows and group files. Subclasses define how the responses are drawn.

    Attributes:
        model: the policy, or the server that has it; its `config` states the context limit.
        tokenizer: the policy's own.
    """

    model: Any
    tokenizer: Any

    def batches(
        self, prompts: Sequence[Text], encoded: Sequence[list[int]], draws: Draws, first: int
    ) -> Iterator[list[Row]]:
        """Yield the rows of each batch in order, starting at prompt `first`."""
        raise NotImplementedError

    def batch_size(self, draws: Draws) -> int:
        """Return the number of rows in a batch of `batches`."""
        return draws.batch_size

    def settings(self, draws: Draws) -> list[Any]:
        """Return the JSON data that, with the prompts, determines the rows: policy and draws."""
        raise NotImplementedError

    def holds(self, prompts: Sequence[Text], path: str | Path, draws: Draws) -> bool:
        """Return whether `write` would find its groups in the file and do nothing.

        Raises:
            UserError: as `sample_groups`.
        """
        key = self._key(prompts, self._encoded(prompts, draws), draws)
        return holds_groups(path, prompts, num_responses=draws.num_responses, key=key)

    def rows(self, prompts: Sequence[Text], draws: Draws) -> list[Row]:
        """Do `sample_rows`."""
        batches = self.batches(prompts, self._encoded(prompts, draws), draws, 0)
        return [row for rows in batches for row in rows]

    def write(
        self,
        prompts: Sequence[Text],
        path: str | Path,
        draws: Draws,
        progress: Callable[[int, int], None] | None,
    ) -> Path:
        """Do `sample_groups`."""
        path = Path(path)
        if not prompts:
            raise UserError("there are no prompts to sample for")
        encoded = self._encoded(prompts, draws)
        key = self._key(prompts, encoded, draws)
        if holds_groups(path, prompts, num_responses=draws.num_responses, key=key):
            return path
        return write_groups(
            path,
            lambda done: self.batches(prompts, encoded, draws, done),
            key=key,
            total=len(prompts),
            batch_size=self.batch_size(draws),
            progress=progress,
        )

    def _key(self, prompts: Sequence[Text], encoded: Sequence[list[int]], draws: Draws) -> str:
        return sampling_key([*self.settings(draws), list(prompts), list(encoded)])

    def _encoded(self, prompts: Sequence[Text], draws: Draws) -> list[list[int]]:
        room = draws.config.max_new_tokens
        return encode_prompts(self.model, self.tokenizer, prompts, room=room)


class PolicySampler(Sampler):
    """Draws with `generate`, which reads a prompt once for its K responses.

    The order of the prompts decides their draws, so batches are not ordered by length; `generate`
    reads short and long prompts of a batch apart where that saves padding.
    """

    def settings(self, draws: Draws) -> list[Any]:
        model = self.model
        weights = weights_digest([*model.named_parameters(), *model.named_buffers()])
        ends = stop_token_ids(self.tokenizer, generation_config(model))
        policy = [weights, str(model.dtype), list(ends), _adapters(model)]
        K = draws.num_responses
        return [policy, asdict(draws.config), K, draws.batch_size, draws.seed]

    def batches(
        self, prompts: Sequence[Text], encoded: Sequence[list[int]], draws: Draws, first: int
    ) -> Iterator[list[Row]]:
        K = draws.num_responses
        for start in range(first, len(prompts), draws.batch_size):
            batch = slice(start, start + draws.batch_size)
            samples = generate(
                self.model,
                self.tokenizer,
                encoded[batch],
                config=draws.config,
                num_responses=K,
                seed=draw_seed(draws.seed, start),
            )
            yield [
                group_row(self.tokenizer, prompt, samples[i * K : (i + 1) * K])
                for i, prompt in enumerate(prompts[batch])
            ]


def _adapters(model: Any) -> list[str]:
    """Return which adapters of PEFT's the layers use, and how strongly."""
    layers = [m for m in model.modules() if hasattr(m, "disable_adapters")]
    used = {
        repr((m.disable_adapters, m.active_adapters, getattr(m, "scaling", None))) for m in layers
    }
    return sorted(used)


def sample_rows(model: Any, tokenizer: Any, prompts: Sequence[Text], draws: Draws) -> list[Row]:
    """Sample responses and return one `group_row` per prompt.

    The responses to a prompt share its prefill, as `generate` says.

    Args:
        prompts: strings or chat messages.

    Raises:
        UserError: as `encode_prompts`.
    """
    return PolicySampler(model, tokenizer).rows(prompts, draws)


def sample_groups(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    path: str | Path,
    draws: Draws,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the rows of `sample_rows` as JSON lines; an interrupted call resumes.

    Rows go to `PATH.partial` batch by batch; the finished file is renamed. Every batch has its own
    random seed, so a resumed file equals one written without interruption.

    Args:
        path: the group file to write. If it already holds groups of these prompts, this policy and
            these draws, nothing is done.
        progress: called with (groups done, total groups) after every batch.

    Raises:
        UserError: as `sample_rows`; no prompts; other groups in this file; or a partial file with
            other settings. Nothing is written then.
    """
    return PolicySampler(model, tokenizer).write(prompts, path, draws, progress)


def as_samples(tokenizer: Any, rows: Sequence[Row]) -> list[Sample]:
    """Return the sampled tokens of rows from `sample_rows`.

    Rows from elsewhere or with another tokenizer are encoded again.
    """
    samples = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        for response in group_responses(row):
            ids = sampled_ids(tokenizer, response, prompt)
            if ids is None:
                ids = encode_response(tokenizer, response)[len(prompt) :]
            samples.append(Sample(prompt, ids, response.finished))
    return samples


def as_response(tokenizer: Any, prompt: Text, sample: Sample) -> Response:
    """Return a sampled response with its text and its tokens."""
    ids, done = sample.response_ids, sample.finished
    text = decode_response(tokenizer, sample.prompt_ids, ids, finished=done)
    return Response(prompt, text, done, ids, tokenizer_name(tokenizer))


def group_row(tokenizer: Any, prompt: Text, samples: Sequence[Sample]) -> Row:
    """Return the row of one prompt's samples, with text and sampled tokens.

    Returns:
        `{"prompt", "responses", "finished", "prompt_ids", "response_ids", "tokenizer"}`.
    """
    responses = [as_response(tokenizer, prompt, sample) for sample in samples]
    return {
        "prompt": prompt,
        "responses": [r.text for r in responses],
        "finished": [r.finished for r in responses],
        PROMPT_IDS: list(samples[0].prompt_ids),
        IDS: [list(sample.response_ids) for sample in samples],
        TOKENIZER: tokenizer_name(tokenizer),
    }
