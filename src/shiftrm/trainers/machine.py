"""What the machine a training runs on has: an accelerator, bf16, memory for activations."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import is_torch_bf16_gpu_available

from shiftrm.models.rewards import sequence_rewards
from shiftrm.trainers.memory import is_out_of_memory

if TYPE_CHECKING:
    from trl import RewardTrainer as _Base
else:
    _Base = object

__all__ = ["FitsMemory", "activation_bytes", "activations_fit", "fit_machine", "free_memory"]

CGROUP = Path("/sys/fs/cgroup")


def fit_machine(args: Any) -> None:
    """Set what TRL's defaults take for granted, an accelerator with bf16, as it is here.

    Args:
        args: TRL's training arguments, before their own `__post_init__`; what was set stays.
    """
    if torch.accelerator.current_accelerator() is None:
        args.use_cpu = True
    if args.bf16 is None and not args.fp16:
        args.bf16 = not args.use_cpu and is_torch_bf16_gpu_available()


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free; None where the device does not say."""
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
    """What a forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        value = run()  # held until all is counted, so that no storage is used twice
    total = sum(kept.values())
    del value
    return total


def activations_fit(
    model: nn.Module, *, sequences: int, longest: int, copies: int, device: torch.device
) -> bool:
    """Whether a training step has room for what its forward pass keeps, without checkpointing.

    One sequence is measured, shared prefixes not counted; a fifth of what is free stays free.

    Args:
        model: with its weights where they will be.
        sequences: in one forward and backward pass.
        longest: sequence, in tokens.
        copies: of the trained weights, in fp32, that come on top: gradient, optimizer, meta step.
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
    """What a trainer of pairs decides by the memory of the machine."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.choose_checkpointing()
        return super().train(*args, **kwargs)

    def choose_checkpointing(self) -> None:
        """Where the settings leave it open: only if activations would not fit the free memory.

        Sharded models keep TRL's choice, on: what is free on one process says nothing there.
        """
        args = self.args
        if getattr(args, "checkpointing_given", True):
            return
        args.checkpointing_given = True
        sequences, longest, copies = self._largest_pass()
        needed = self.is_fsdp_enabled or not activations_fit(
            self.model, sequences=sequences, longest=longest, copies=copies, device=args.device
        )
        if self.accelerator.num_processes > 1:
            here = torch.tensor(float(needed), device=args.device)
            needed = float(self.accelerator.reduce(here, reduction="sum")) > 0
        args.activation_checkpointing = args.gradient_checkpointing = needed
        if needed and hasattr(self.model, "peft_config"):
            self.model.enable_input_require_grads()  # as TRL does where it is on from the start

    def _largest_pass(self) -> tuple[int, int, int]:
        """Sequences of a training pass, the longest one's tokens, copies of the trained weights."""
        longest = self.args.max_length or 1024
        if isinstance(self.train_dataset, Dataset):
            table = self.train_dataset.with_format("arrow")[:]
            sides = ("chosen_ids", "rejected_ids")
            longest = max(pc.max(pc.list_value_length(table[side])).as_py() for side in sides)
        return 2 * self.args.per_device_train_batch_size, longest, 3  # gradient, AdamW's moments
