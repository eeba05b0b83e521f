"""Sample K responses per prompt from a policy, and write group files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
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
from shiftrm.models.group_files import holds_groups, write_groups
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
    "Sample",
    "SamplingConfig",
    "as_response",
    "as_samples",
    "check_counts",
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


def sample_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    config: SamplingConfig,
    num_responses: int,
    batch_size: int,
    seed: int,
) -> list[Row]:
    """Sample responses and return one `group_row` per prompt.

    Args:
        prompts: strings or chat messages.
        num_responses: responses per prompt, one or more.
        batch_size: prompts per call of `generate`. The batch that begins at prompt i has the random
            seed `draw_seed(seed, i)`, so another batch size gives other draws.

    Raises:
        UserError: as `encode_prompts`, or num_responses or batch_size is below one.
    """
    check_counts(num_responses, batch_size)
    encoded = encode_prompts(model, tokenizer, prompts, room=config.max_new_tokens)
    batches = _sample_batches(
        model,
        tokenizer,
        prompts,
        encoded,
        config=config,
        num_responses=num_responses,
        batch_size=batch_size,
        seed=seed,
    )
    return [row for rows in batches for row in rows]


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


def sample_groups(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    path: str | Path,
    *,
    config: SamplingConfig,
    num_responses: int = 5,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the rows of `sample_rows` as JSON lines; an interrupted call resumes.

    Rows go to `PATH.partial` batch by batch; the finished file is renamed. Every batch has its own
    random seed, so a resumed file equals one written without interruption.

    Args:
        path: the group file to write. If it already holds groups of these prompts, nothing is done.
        num_responses: K, responses per prompt; a single one is not a group to adapt to.
        progress: called with (groups done, total groups) after every batch.

    Raises:
        UserError: as `sample_rows`; no prompts; other groups in this file; or a partial file with
            other settings. Nothing is written then.
    """
    path = Path(path)
    check_counts(num_responses, batch_size)
    if not prompts:
        raise UserError("there are no prompts to sample for")
    if holds_groups(path, prompts, num_responses=num_responses):
        return path
    encoded = encode_prompts(model, tokenizer, prompts, room=config.max_new_tokens)
    return write_groups(
        path,
        lambda done: _sample_batches(
            model,
            tokenizer,
            prompts,
            encoded,
            config=config,
            num_responses=num_responses,
            batch_size=batch_size,
            seed=seed,
            first=done,
        ),
        settings=[list(prompts), asdict(config), num_responses, batch_size, seed],
        total=len(prompts),
        batch_size=batch_size,
        progress=progress,
    )


def check_counts(num_responses: int, batch_size: int) -> None:
    """Check that the responses per prompt and the batch size are positive."""
    if num_responses < 1:
        raise UserError(f"num_responses is {num_responses}; it must be at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")


def _sample_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    encoded: Sequence[list[int]],
    *,
    config: SamplingConfig,
    num_responses: int,
    batch_size: int,
    seed: int,
    first: int = 0,
) -> Iterator[list[Row]]:
    """Yield the rows of each batch, starting at prompt `first`."""
    K = num_responses
    for start in range(first, len(prompts), batch_size):
        samples = generate(
            model,
            tokenizer,
            encoded[start : start + batch_size],
            config=config,
            num_responses=K,
            seed=draw_seed(seed, start),
        )
        yield [
            group_row(tokenizer, prompt, samples[i * K : (i + 1) * K])
            for i, prompt in enumerate(prompts[start : start + batch_size])
        ]


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
