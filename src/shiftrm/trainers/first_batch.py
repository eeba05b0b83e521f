"""Check a model on the first batch (noise, pooling, shared prefixes), and turn dropout off."""

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shiftrm.errors import UserError
from shiftrm.models.prefix import SharedRows, pack, separate
from shiftrm.models.probes import apart, require_own_reward, sharing_obstacle
from shiftrm.models.rewards import hidden_states, model_config
from shiftrm.models.rope import context_limit, frequency_limit
from shiftrm.trainers.pair_batches import shared_rows

USUAL_LENGTH = 1024
"""Tokens in the longest test pair if the configuration names no greater length."""

NOT_LENGTHS = ("size", "dim", "embd", "inner", "heads", "layers", "token", "max_position", "theta")
"""Parts of the names of configuration numbers that are not text lengths."""

ROUNDING = 1e-3
"""Largest difference between equal passes of kernels with nondeterministic summation order."""


def inspect_model(model: nn.Module, inputs: Mapping[str, Tensor], *, quiet: bool) -> None:
    """Refuse a model that would train silently to a wrong result.

    Args:
        inputs: a batch of `PairCollator` or of TRL's collator.
        quiet: whether training must be free of noise.

    Raises:
        UserError: see `require_own_reward` and `require_no_noise`.
    """
    require_own_reward(model)
    if quiet:
        if "segment_ids" in inputs:
            ids, mask = separate(shared_rows(inputs).take([0]), pad_token_id=0)
        else:
            ids, mask = inputs["input_ids"][:2], inputs["attention_mask"][:2]
        require_no_noise(model, ids, mask)


def first_obstacle(
    model: nn.Module, rows: SharedRows, *, max_length: int | None, packed: bool = False
) -> str | None:
    """Return why the model cannot share prefixes, from this batch and a pair of maximal length.

    Args:
        packed: as in `sharing_obstacle`.
    """
    longest = longest_rows(model_config(model), rows, max_length)
    # Always run both: every process must make the same number of passes.
    short, long = (sharing_obstacle(model, some, packed=packed) for some in (rows, longest))
    return short or long


def longest_rows(config: Any, rows: SharedRows, max_length: int | None) -> SharedRows:
    """Return a pair of maximal length from the batch's tokens, to expose attention windows.

    It has at most 1,024 tokens, or `max_length` if the configuration names a length beyond 1,024
    (a window, the keys that a token attends to, the context of rotary positions).
    """
    text = config.get_text_config()
    named = [n for n in _lengths(text.to_dict()) if n >= USUAL_LENGTH]
    usual = USUAL_LENGTH if not named else max(USUAL_LENGTH, 2 * max(named))
    limits = (max_length, context_limit(config), frequency_limit(config), usual)
    L = max(4, min(limit for limit in limits if limit))
    tokens = rows.input_ids[rows.segment_ids >= 0].tolist()
    tokens = (tokens * (L // len(tokens) + 1))[:L]
    P = 3 * L // 4
    # The second sequence's two tokens are far from the prefix in the row but follow it in position.
    pair = [tokens, [*tokens[:P], tokens[0], tokens[-1]]]
    longest = pack([pair], pad_token_id=0)
    return SharedRows(*(tensor.to(rows.input_ids.device) for tensor in longest))


def _lengths(options: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of a configuration that may be text lengths, in tokens."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and ("window" in name or not any(word in name for word in NOT_LENGTHS))
        ):
            yield value


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, wherever a layer stores it, and turn off every jitter.

    TRL's `disable_dropout` reaches `nn.Dropout` modules only. `attention_dropout` of Llama-like
    models is a float passed to the attention function, Falcon's layers read `hidden_dropout` from
    the configuration, and routers of experts (PhiMoE, Mixtral) jitter their inputs. The model's own
    configuration, which is saved with it, stays as it is.
    """
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_rates(module)
        if any(_is_rate(n, v, "jitter", "noise") for n, v in vars(module).items()):
            # A rate may control more than noise: PhiMoE's also decides which experts compete, even
            # in evaluation. So keep the rate and hold the module in evaluation mode.
            module.train = MethodType(_stay_in_evaluation, module)  # type: ignore[method-assign]
            module.train(module.training)
        config = vars(module).get("config")
        if config is not None and not isinstance(module, PreTrainedModel):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _zero_rates(quiet[id(config)])
            module.config = quiet[id(config)]


def _zero_rates(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if _is_rate(name, value, "drop"):
            setattr(owner, name, 0.0)


def _is_rate(name: str, value: Any, *words: str) -> bool:
    return isinstance(value, float) and value > 0 and any(word in name for word in words)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `module.train` so that the module stays in evaluation; its children follow `mode`."""
    nn.Module.train(module, mode)
    module.training = False
    return module


@torch.no_grad()
def require_no_noise(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Check that two passes in training mode are equal; rows [B, T] are padded on the right.

    Passes with the same random numbers show how much the kernels alone differ.

    Raises:
        UserError: passes with other random numbers differ more, or states are not finite.
    """
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            states = []
            for seed in (0, 0, 1, 2, 3):
                torch.manual_seed(seed)
                states.append(hidden_states(model, input_ids, attention_mask))
    finally:
        model.train(was_training)
        torch.clear_autocast_cache()  # as `probes.evaluating` does
    first, again, *others = states
    if not bool(first.isfinite().all()):
        raise UserError(
            f"{type(model).__name__} gives states that are not finite: its weights are broken, or "
            "too large for its precision; take another checkpoint, or load it in float32"
        )
    kernels, noise = apart(again, first), max(apart(other, first) for other in others)
    if kernels <= ROUNDING and noise <= 4 * kernels:
        return
    raise UserError(
        f"{type(model).__name__} draws random numbers in training mode that cannot be switched off "
        f"(the states of the same batch differ by {max(noise, kernels):.1e}); set its dropout, "
        "jitter or layer drop to 0 in config.json, or give disable_dropout=False to train with it"
    )
