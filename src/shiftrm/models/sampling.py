"""K responses per prompt from a policy, and group files made of them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.finite import broken_weight
from shiftrm.models.group_files import holds_groups, write_groups
from shiftrm.models.loading import check_vocabulary, explain_loading
from shiftrm.models.rendering import (
    Text,
    check_text,
    decode_response,
    encode_prompt,
    pin_template,
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
from shiftrm.models.rope import context_limit


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    The defaults are the policy's own distribution; temperature 0 takes the likeliest token each
    time. `PAPER_SAMPLING` holds MetaRM's settings.
    """

    max_new_tokens: int = _option(128, "longest response, in tokens")
    temperature: float = _option(1.0, "of sampling; below 1 is sharper, 0 the likeliest token")
    top_p: float = _option(1.0, "the likeliest tokens of this probability together are sampled")
    repetition_penalty: float = _option(1.0, "tokens that were there are less likely; 1: not")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and finite"
            )


PAPER_SAMPLING = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
"""Dou et al., arXiv 2405.00438: nucleus sampling, T 0.8, top-p 0.9, repetition penalty 1.1."""


@dataclass(frozen=True)
class Sample:
    """One sampled response as tokens.

    Attributes:
        prompt_ids: the prompt's tokens.
        response_ids: the response's tokens, the one that ended it included if there is one.
        finished: True if the policy closed the response itself; False if the length limit did.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool


def load_policy(path: str | Path, **model_options: Any) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Weights are in fp32 unless `dtype` is given. A tokenizer without a pad token pads with EOS,
    which is safe here: masks and lengths say what is padding, not the token. A template that asks
    for the date is pinned (`rendering.pin_template`), so that prompts have the same tokens on the
    day when their answers are sampled and on that when they are measured.

    Raises:
        UserError: nothing there, not a causal language model, or nothing that ends a response.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explain_loading(path, "a causal language model with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), output_loading_info=True, **{"dtype": torch.float32, **model_options}
        )
    if info["missing_keys"]:
        raise UserError(
            f"{path}: not a causal language model ({sorted(info['missing_keys'])[0]} is missing); "
            "give a policy, not a reward model"
        )
    check_vocabulary(model, tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    pin_template(tokenizer)
    return model.eval(), tokenizer


def _generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, settings: Any) -> torch.Tensor:
    """`model.generate`, in which weights that are not finite are one line."""
    try:
        if (
            settings.do_sample or broken_weight(model) is None
        ):  # the likeliest token of NaN would be some token, silently
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
    name = getattr(model.config, "name_or_path", "") or "the policy"
    raise UserError(
        f"{name}: the policy's probabilities are not finite, so nothing can be sampled; its "
        "weights are broken, or temperature is too low"
    )


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    config: SamplingConfig,
    num_responses: int = 1,
    seed: int,
) -> list[Sample]:
    """Sample responses to a batch of tokenised prompts with `model.generate`.

    Nothing but `config` shapes the distribution: what the checkpoint's generation config says
    (another temperature, `no_repeat_ngram_size`, ...) is left out, except for the tokens that end a
    response (`rendering.stop_token_ids`).

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with an EOS token; without a pad token, EOS pads.
        prompts: token ids, one list a prompt, of any lengths.
        num_responses: responses per prompt.
        seed: decides the draws; the global random state is left as it was.

    Returns:
        `len(prompts) * num_responses` samples; those of one prompt stand together.

    Raises:
        UserError: a prompt leaves no room for a response in the model's context, no EOS token, or
            probabilities that are not finite.
    """
    from transformers import GenerationConfig

    check_prompt_lengths(prompts, model.config, config.max_new_tokens)
    stop, pad = stop_token_ids(tokenizer, generation_config(model)), padding_token(tokenizer)
    device = next(model.parameters()).device
    T = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), T), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all responses start together
        ids[row, T - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, T - len(prompt) :] = 1
    greedy = config.temperature == 0
    same = num_responses if greedy else 1  # the likeliest response is drawn once
    drawing = {"do_sample": False, "repetition_penalty": config.repetition_penalty}
    if not greedy:
        drawing = {"do_sample": True, "top_k": 0, **asdict(config)}
    settings = GenerationConfig(
        **{**drawing, "max_new_tokens": config.max_new_tokens},
        num_return_sequences=num_responses // same,
        pad_token_id=pad,
        eos_token_id=list(stop),
    )
    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _without_generation_defaults(model):
        torch.manual_seed(seed)
        output = _generated(model, ids.to(device), mask.to(device), settings)
    model.train(was_training)
    rows = [row for row in output[:, T:].tolist() for _ in range(same)]
    return [
        Sample(list(prompts[i // num_responses]), *cut_at_stop(row, stop))
        for i, row in enumerate(rows)
    ]


def generation_config(model: Any) -> Any:
    """A policy's generation config, inside wrappers too; None if it has none."""
    held = (vars(module).get("generation_config") for module in model.modules())
    return next((config for config in held if config is not None), None)


@contextmanager
def _without_generation_defaults(model: Any) -> Iterator[None]:
    """Exchange the model's generation config, inside wrappers too, for an empty one meanwhile.

    `model.generate` fills every field left at None from it, whatever config it is given.
    """
    from transformers import GenerationConfig

    holders = [m for m in model.modules() if "generation_config" in vars(m)]
    kept = [m.generation_config for m in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, generation_config in zip(holders, kept, strict=True):
            module.generation_config = generation_config


def remember_stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Write all tokens that end a response into a policy's generation config, which is saved.

    So that whoever generates with the saved policy stops where we do.

    Returns:
        `rendering.stop_token_ids`.
    """
    config = generation_config(model)
    stop = list(stop_token_ids(tokenizer, config))
    if config is not None:
        config.eos_token_id = stop if len(stop) > 1 else stop[0]
    return stop


def padding_token(tokenizer: Any) -> int:
    """The id that pads; EOS where there is no pad token (masks and lengths say what is padding)."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def cut_at_stop(tokens: list[int], stop: Sequence[int]) -> tuple[list[int], bool]:
    """Drop what follows the first token that ends a response; say whether there was one."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1], True
    return tokens, False


def draw_seed(seed: int, place: int) -> int:
    """The seed of the draw at some place, below 2**56.

    Hashed: with `seed + place` neighbouring places and neighbouring seeds would share draws.
    """
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]],
    config: Any,
    room: int,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse prompts that leave less than `room` tokens of the model's context for a response.

    The message calls a prompt by its number, or by its name where there are any.
    """
    limit = context_limit(config)
    if limit is None:
        return
    for index, prompt in enumerate(prompts):
        if len(prompt) + room > limit:
            raise UserError(
                f"{names[index] if names else f'prompt {index}'} has {len(prompt)} tokens; with "
                f"{room} new tokens it exceeds the model's context of {limit}; shorten the prompt "
                "or lower max_new_tokens"
            )


def encode_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    room: int,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of prompts that `model` can continue by `room` tokens.

    Args:
        names: how errors call the prompts; "prompt 0" and so on by default.

    Raises:
        UserError: a prompt that is no text, has no tokens, or is too long; a tokenizer without
            EOS, or without a template for a chat.
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
    """`group_row`, one row a prompt, in memory.

    Args:
        prompts: strings or chat messages.
        num_responses: responses per prompt, one or more.
        batch_size: prompts a call of `generate`. The batch from prompt i on has the random seed
            `draw_seed(seed, i)`, so other batches are other draws.

    Raises:
        UserError: as `encode_prompts`; or num_responses or batch_size below one.
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
    """Sampled responses (`sample_rows`) as tokens again: those that were sampled.

    Rows from elsewhere are encoded anew, and so are those of another tokenizer.
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

    Rows go to `PATH.partial` batch by batch; the finished file is renamed into place. Every batch
    has a random seed of its own, so a resumed file equals one written in a single go.

    Args:
        path: the group file to write. If it holds groups of these prompts, nothing is done.
        num_responses: K, responses per prompt; one is a sample, and no group to adapt to.
        progress: called with (groups done, groups in all) after every batch.

    Raises:
        UserError: as `sample_rows`; no prompts; other groups under this name; or a partial file
            that was begun with other settings. All before anything is written.
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
    """Refuse no responses a prompt, and batches of none."""
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
    """The rows of one batch after the other, from prompt `first` on."""
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
    """A sampled response with its text and its tokens."""
    ids, done = sample.response_ids, sample.finished
    text = decode_response(tokenizer, sample.prompt_ids, ids, finished=done)
    return Response(prompt, text, done, ids, tokenizer_name(tokenizer))


def group_row(tokenizer: Any, prompt: Text, samples: Sequence[Sample]) -> Row:
    """The row of one prompt's samples: text for people, and the tokens that were sampled.

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
