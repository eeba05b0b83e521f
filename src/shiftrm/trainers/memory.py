"""Report out-of-memory errors in one line, with the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from shiftrm.errors import UserError

if TYPE_CHECKING:
    from shiftrm.trainers.settings import Settings

__all__ = ["explain_out_of_memory", "identity", "is_out_of_memory"]

HOW_DIVIDED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "forward_batch_size",
    "micro_batch_size",
    "gradient_checkpointing",
    "activation_checkpointing",
    "activation_offloading",
)
"""Settings that change how work is divided, not the result; they may change on resume."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means out of memory, on an accelerator or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = (
        "out of memory",
        "can't allocate memory",
        "DefaultCPUAllocator",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def explain_out_of_memory(chosen: "Settings") -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` that names the settings to lower.

    Raises:
        UserError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory; {_advice(chosen.args)}; given again so, the command continues from "
            "its last checkpoint, if there is one"
        ) from None


def _advice(args: Any) -> str:
    if not hasattr(args, "per_device_train_batch_size"):  # PPO
        micro = args.micro_batch_size or args.minibatch_size
        return (
            f"lower micro_batch_size (now {micro}, which changes memory only) or "
            f"forward_batch_size (now {args.forward_batch_size})"
        )
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size == 1:
        return (
            "per_device_train_batch_size is 1 already: use use_peft=true, dtype=bfloat16, a "
            "smaller max_length or more memory"
        )
    factor = 2 if size % 2 == 0 else size
    return (
        f"give per_device_train_batch_size={size // factor} "
        f"gradient_accumulation_steps={steps * factor}, which trains the same"
    )


def identity(chosen: "Settings") -> dict[str, Any]:
    """Return the settings that must be equal to resume a run: all but `HOW_DIVIDED`."""
    args = chosen.args
    kept = {key: value for key, value in chosen.given.items() if key not in HOW_DIVIDED}
    if hasattr(args, "per_device_train_batch_size"):
        kept["batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return kept
