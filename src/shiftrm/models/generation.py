"""Load a policy and draw responses to tokenised prompts with `model.generate`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shiftrm.errors import UserError
from shiftrm.models.filled import load_filled
from shiftrm.models.finite import broken_weight
from shiftrm.models.loading import check_vocabulary, explain_loading
from shiftrm.models.rendering import pin_template, stop_token_ids
from shiftrm.models.rope import context_limit


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    The defaults are the policy's own distribution; temperature 0 takes the likeliest token each
    time. `PAPER_SAMPLING` holds MetaRM's settings.
    """

    max_new_tokens: int = _option(128, "maximum response length, in tokens")
    temperature: float = _option(1.0, "sampling temperature; below 1 is sharper, 0 is greedy")
    top_p: float = _option(1.0, "sample from the likeliest tokens with this total probability")
    repetition_penalty: float = _option(1.0, "makes repeated tokens less likely; 1: off")

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
    """Return a causal language model in evaluation mode, and its tokenizer.

    Weights are in fp32 unless `dtype` is given. A tokenizer without a pad token pads with EOS,
    which is safe because masks and lengths mark the padding. A template that uses the date is
    pinned (`rendering.pin_template`), so that prompts have the same tokens on every day.

    Raises:
        UserError: nothing there, not a causal language model, or nothing that ends a response.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explain_loading(path, "a causal language model with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model, missing, _ = load_filled(
            AutoModelForCausalLM, path, quiet=False, **{"dtype": torch.float32, **model_options}
        )
    if missing:
        raise UserError(
            f"{path}: not a causal language model ({missing[0]} is missing); give a policy, not a "
            "reward model"
        )
    _require_causal(path, model)
    check_vocabulary(model, tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    pin_template(tokenizer)
    return model.eval(), tokenizer


def _require_causal(path: str | Path, model: Any) -> None:
    """Refuse an encoder, whose tokens see those that come later, and a reward model's adapter."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_causal = getattr(model.config, "is_decoder", getattr(model.config, "causal", False))
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not is_causal:
        raise UserError(
            f"{path}: is an encoder ({model.config.model_type}), whose tokens see the later ones; "
            "give a causal language model"
        )
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.task_type == "SEQ_CLS":
            raise UserError(f"{path}: is the adapter of a reward model; give a policy")


def _generated(
    model: Any, prompts: Sequence[list[int]], settings: Any, *, share: bool
) -> torch.Tensor:
    """Return what `model.generate` appends to prompts, as rows of tokens.

    Raises:
        UserError: weights or probabilities are not finite.
    """
    ids, mask = _pad_left(prompts, settings.pad_token_id)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    try:
        # Without sampling, generate takes some token of NaN logits without an error.
        if settings.do_sample or broken_weight(model) is None:
            return _continued(model, prompts, inputs, settings, share)[:, ids.shape[1] :]
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
    name = getattr(model.config, "name_or_path", "") or "the policy"
    raise UserError(
        f"{name}: the policy's probabilities are not finite, so nothing can be sampled; its "
        "weights are broken, or temperature is too low"
    )


def _continued(
    model: Any,
    prompts: Sequence[list[int]],
    inputs: dict[str, torch.Tensor],
    settings: Any,
    share: bool,
) -> torch.Tensor:
    """Call `model.generate`: with our loop if it may share and can, else with its own."""
    from shiftrm.models.decoding import NotShared, decode

    if share:
        number = {tuple(prompt): index for index, prompt in enumerate(prompts)}
        rows = [number[tuple(p)] for p in prompts for _ in range(settings.num_return_sequences)]
        loop = partial(decode, prompt_of_row=rows)
        with suppress(NotShared):
            return model.generate(**inputs, generation_config=settings, custom_generate=loop)
    return model.generate(**inputs, generation_config=settings)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    config: SamplingConfig,
    num_responses: int = 1,
    seed: int,
    share_prompts: bool = True,
) -> list[Sample]:
    """Sample responses to a batch of tokenised prompts with `model.generate`.

    Only `config` shapes the distribution: the checkpoint's generation config (another temperature,
    `no_repeat_ngram_size`, ...) is ignored, except for the tokens that end a response
    (`rendering.stop_token_ids`).

    The responses to a prompt share its prefill: its keys and values are computed once. Equal
    prompts of a batch count as one, short and long prompts are read in passes of their own where
    that saves padding, and finished responses leave the batch. Models whose state is more than
    keys and values (recurrent or hybrid layers, encoder-decoders), that prepare their inputs
    themselves, or that are sharded over processes read the prompt for every response
    (`decoding.require_shareable`). The same seed gives the same tokens on both paths, but for
    draws so close that the rounding of the logits decides them.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with an EOS token; without a pad token, EOS pads.
        prompts: token ids, one list per prompt, of any length.
        num_responses: responses per prompt.
        seed: determines the draws; the global random state is restored.
        share_prompts: False reads every prompt once a response, with transformers' own loop.

    Returns:
        `len(prompts) * num_responses` samples; those of one prompt are adjacent.

    Raises:
        UserError: a prompt leaves no room for a response in the model's context, no EOS token, or
            probabilities that are not finite.
    """
    from transformers import GenerationConfig

    check_prompt_lengths(prompts, model.config, config.max_new_tokens)
    stop, pad = stop_token_ids(tokenizer, generation_config(model)), padding_token(tokenizer)
    device = next(model.parameters()).device
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
        output = _generated(model, prompts, settings, share=share_prompts)
    model.train(was_training)
    rows = [row for row in output.tolist() for _ in range(same)]
    return [
        Sample(list(prompts[i // num_responses]), *cut_at_stop(row, stop))
        for i, row in enumerate(rows)
    ]


def _pad_left(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, T], padded on the left so that all responses start at T."""
    T = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), T), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, T - len(prompt) :] = 1
    return ids, mask


def generation_config(model: Any) -> Any:
    """Return a policy's generation config, also inside wrappers; None if it has none."""
    held = (vars(module).get("generation_config") for module in model.modules())
    return next((config for config in held if config is not None), None)


@contextmanager
def _without_generation_defaults(model: Any) -> Iterator[None]:
    """Replace the model's generation config, also inside wrappers, by an empty one in the block.

    `model.generate` fills fields that are None from it, whatever config it is given.
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
    """Write all tokens that end a response into the policy's generation config, which is saved.

    Generation with the saved policy then stops where ours does.

    Returns:
        `rendering.stop_token_ids`.
    """
    config = generation_config(model)
    stop = list(stop_token_ids(tokenizer, config))
    if config is not None:
        config.eos_token_id = stop if len(stop) > 1 else stop[0]
    return stop


def padding_token(tokenizer: Any) -> int:
    """Return the pad token's id, or EOS without one (masks and lengths mark the padding)."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def cut_at_stop(tokens: list[int], stop: Sequence[int]) -> tuple[list[int], bool]:
    """Drop what follows the first token that ends a response; also return whether there is one."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1], True
    return tokens, False


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]],
    config: Any,
    room: int,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse prompts that leave less than `room` tokens of the model's context for a response.

    The message refers to a prompt by its name in `names`, or by its number.
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
