"""Fit training to the machine: accelerator, bf16, activation memory, out-of-memory errors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import is_torch_bf16_gpu_available

from shiftrm.errors import UserError
from shiftrm.models.loading import accelerator
from shiftrm.models.rewards import sequence_rewards

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base

    from shiftrm.trainers.settings import Settings
else:
    _Base = object

CGROUP = Path("/sys/fs/cgroup")


def fit_machine(args: Any) -> None:
    """Adapt TRL's defaults, which assume an accelerator with bf16, to this machine.

    Args:
        args: TRL's training arguments before their `__post_init__`; set values are kept.
    """
    if accelerator() is None:
        args.use_cpu = True
    if args.bf16 is None and not args.fp16:
        args.bf16 = not args.use_cpu and is_torch_bf16_gpu_available()


def free_memory(device: torch.device) -> int | None:
    """Return the free memory in bytes; None if the device does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    try:  # a container may have less than the machine
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def activation_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes a forward pass keeps for its backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        value = run()  # keep alive until counted, so that no storage is reused
    total = sum(kept.values())
    del value
    return total


def activations_fit(
    model: nn.Module, *, sequences: int, longest: int, copies: int, device: torch.device
) -> bool:
    """Return whether the activations of a training step fit the memory without checkpointing.

    Measures one sequence, ignores shared prefixes and keeps a fifth of the free memory in reserve.

    Args:
        model: the model, on its training device.
        sequences: number of sequences in one forward and backward pass.
        longest: length of the longest sequence in tokens.
        copies: additional fp32 copies of the trained weights: gradient, optimizer, meta step.
    """
    free = free_memory(device)
    if free is None:
        return False
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    room = 0.8 * free - 4.0 * copies * trained
    ids = torch.zeros((1, longest), dtype=torch.long, device=device)

    def run() -> Tensor:
        return sequence_rewards(model, ids, torch.ones_like(ids))

    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            kept = activation_bytes(run, model.parameters())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.train(was_training)
    return sequences * kept <= room


class FitsMemory(_Base):
    """A trainer mixin that chooses activation checkpointing by the free memory."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.choose_checkpointing()
        return super().train(*args, **kwargs)

    def choose_checkpointing(self) -> None:
        """Turn on checkpointing if activations would not fit, unless the user chose.

        Sharded models keep TRL's default (on): one process's free memory does not decide there.
        """
        args = self.args
        if getattr(args, "checkpointing_given", True):
            return
        args.checkpointing_given = True
        sequences, longest, copies = self._largest_pass()
        most = getattr(args, "max_tokens_per_pass", None)
        if most is not None:
            sequences = min(sequences, max(1, most // longest))
        needed = self.is_fsdp_enabled or not activations_fit(
            self.model, sequences=sequences, longest=longest, copies=copies, device=args.device
        )
        if self.accelerator.num_processes > 1:
            here = torch.tensor(float(needed), device=args.device)
            needed = float(self.accelerator.reduce(here, reduction="sum")) > 0
        args.activation_checkpointing = args.gradient_checkpointing = needed
        if needed and hasattr(self.model, "peft_config"):
            self.model.enable_input_require_grads()  # as TRL does if it is on from the start

    def _largest_pass(self) -> tuple[int, int, int]:
        """Return the sequences of a pass, the longest one's tokens and the copies of weights."""
        from datasets import Dataset  # here, so that PPO needs neither
        from pyarrow import compute

        longest = self.args.max_length or 1024
        if isinstance(self.train_dataset, Dataset):
            table = self.train_dataset.with_format("arrow")[:]
            sides = ("chosen_ids", "rejected_ids")
            longest = max(
                compute.max(compute.list_value_length(table[side])).as_py() for side in sides
            )
        return 2 * self.args.per_device_train_batch_size, longest, 3  # gradient, AdamW's moments


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
            f"out of memory; {_advice(chosen.args)}; the command then continues from its last "
            "checkpoint, if there is one"
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
