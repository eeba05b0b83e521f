"""K responses per prompt from a policy, and group files made of them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, json_line
from shiftrm.rendering import Text, decode_response, encode_prompt


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    The defaults are the policy's own distribution. `PAPER_SAMPLING` holds MetaRM's settings.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


PAPER_SAMPLING = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
"""Dou et al., arXiv 2405.00438: nucleus sampling, T 0.8, top-p 0.9, repetition penalty 1.1."""


@dataclass(frozen=True)
class Sample:
    """One sampled response as tokens.

    Attributes:
        prompt_ids: the prompt's tokens.
        response_ids: the response's tokens, the closing EOS included if there is one.
        finished: True if the policy closed the response itself; False if the length limit did.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool


def load_policy(path: str | Path, **model_options: Any) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Weights are in fp32 unless `dtype` is given. A tokenizer without a pad token pads with EOS,
    which is safe here: masks and lengths say what is padding, not the token.

    Raises:
        UserError: nothing there, not a causal language model, or a tokenizer without EOS.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), output_loading_info=True, **{"dtype": torch.float32, **model_options}
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be loaded as a causal language model with its tokenizer "
            f"({str(error).splitlines()[0]})"
        ) from None
    if info["missing_keys"]:
        raise UserError(
            f"{path}: not a causal language model ({sorted(info['missing_keys'])[0]} is missing); "
            "give a policy, not a reward model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


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

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with pad and EOS tokens.
        prompts: token ids, one list a prompt, of any lengths.
        num_responses: responses per prompt.
        seed: decides the draws; the global random state is left as it was.

    Returns:
        `len(prompts) * num_responses` samples; those of one prompt stand together.

    Raises:
        UserError: a prompt leaves no room for a response in the model's context.
    """
    check_prompt_lengths(prompts, model.config, config.max_new_tokens)
    device = next(model.parameters()).device
    T = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), T), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all responses start together
        ids[row, T - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, T - len(prompt) :] = 1
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=True,
            num_return_sequences=num_responses,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            repetition_penalty=config.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    rows = output[:, T:].tolist()
    return [
        Sample(list(prompts[i // num_responses]), *_cut_at_eos(row, tokenizer.eos_token_id))
        for i, row in enumerate(rows)
    ]


def _cut_at_eos(tokens: list[int], eos_token_id: int) -> tuple[list[int], bool]:
    """Drop what follows the first EOS (padding); say whether there was one."""
    if eos_token_id in tokens:
        return tokens[: tokens.index(eos_token_id) + 1], True
    return tokens, False


def check_prompt_lengths(prompts: Sequence[Sequence[int]], config: Any, room: int) -> None:
    """Refuse prompts that leave less than `room` tokens of the model's context for a response."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return
    for index, prompt in enumerate(prompts):
        if len(prompt) + room > limit:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; with {room} new tokens it exceeds the "
                f"model's context of {limit}; shorten the prompt or lower max_new_tokens"
            )


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
    """Write one group of sampled responses per prompt as JSON lines; an interrupted call resumes.

    Each row is `{"prompt", "responses", "finished"}`. Rows go to `PATH.partial` batch by batch;
    the finished file is renamed into place. Every batch has a random seed of its own, so a
    resumed file equals one written in a single go.

    Args:
        prompts: strings or chat messages.
        path: the group file to write. If it exists, nothing is done.
        num_responses: K, responses per prompt.
        batch_size: prompts a call of `generate`.
        progress: called with (groups done, groups in all) after every batch.

    Raises:
        UserError: fewer than two responses asked for, no prompts, a prompt longer than the
            context, or a partial file that was begun with other settings.
    """
    if num_responses < 2:
        raise UserError(f"num_responses is {num_responses}; a group needs at least two responses")
    if not prompts:
        raise UserError("there are no prompts to sample for")
    path = Path(path)
    if path.exists():
        return path
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_prompt_lengths(encoded, model.config, config.max_new_tokens)
    partial = path.with_name(path.name + ".partial")
    header = {"settings": _settings_key(prompts, config, num_responses, batch_size, seed)}
    done = _resume(partial, header, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not partial.exists():
        atomic_write_text(partial, json_line(header))
    with open(partial, "a", encoding="utf-8") as handle:
        for start in range(done, len(prompts), batch_size):
            for row in _group_rows(
                model,
                tokenizer,
                prompts[start : start + batch_size],
                encoded[start : start + batch_size],
                config=config,
                num_responses=num_responses,
                seed=seed + start,
            ):
                handle.write(json_line(row))
            handle.flush()
            if progress:
                progress(min(start + batch_size, len(prompts)), len(prompts))
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    atomic_write_text(path, "".join(lines[1:]))
    partial.unlink()
    return path


def _group_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    encoded: Sequence[list[int]],
    *,
    config: SamplingConfig,
    num_responses: int,
    seed: int,
) -> Iterator[Row]:
    samples = generate(
        model, tokenizer, encoded, config=config, num_responses=num_responses, seed=seed
    )
    for i, prompt in enumerate(prompts):
        group = samples[i * num_responses : (i + 1) * num_responses]
        yield {
            "prompt": prompt,
            "responses": [decode_response(tokenizer, s.prompt_ids, s.response_ids) for s in group],
            "finished": [s.finished for s in group],
        }


def _settings_key(
    prompts: Sequence[Text], config: SamplingConfig, num_responses: int, batch_size: int, seed: int
) -> str:
    settings = [list(prompts), asdict(config), num_responses, batch_size, seed]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _resume(partial: Path, header: Row, batch_size: int) -> int:
    """How many groups of an interrupted call are whole batches; the rest is cut off the file."""
    if not partial.exists():
        return 0
    text = partial.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines or json.loads(lines[0]) != header:
        raise UserError(
            f"{partial}: begun with other prompts or settings; delete it, or repeat the old ones"
        )
    done = (len(lines) - 1) // batch_size * batch_size
    atomic_write_text(partial, "".join(lines[: done + 1]))
    return done
