"""The processes that share a PPO run, and the checkpoints that it continues from."""

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shiftrm.config import differences, to_mapping
from shiftrm.errors import UserError
from shiftrm.files import replace_directory
from shiftrm.models.loading import weights_digest
from shiftrm.models.rendering import Text
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.trainers.work_folder import MARK, is_disk_full, last_checkpoint

T = TypeVar("T")

BUCKET = 2**25
"""Gradient elements in one all-reduce."""


class Processes:
    """The processes that share a run, as `accelerate launch` starts them.

    Each holds whole models, makes the same random draws, and does its share of the work. Sums over
    the processes make every number global, so results do not depend on the number of processes, up
    to the order of floating-point sums.

    Args:
        device: device of the models, on which tensors are exchanged.

    Attributes:
        index, count: this process and their number; 0 is the main process, which writes files.

    Raises:
        UserError: a launch with FSDP or DeepSpeed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.index, self.count = device, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
            return
        for name in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise UserError(
                    f"PPO does not run under {name}: each process samples with the whole policy; "
                    "launch with distributed_type: MULTI_GPU, and use LoRA where memory is short"
                )
        from accelerate import PartialState

        PartialState()  # joins the group that the launcher describes
        if dist.is_initialized():
            self.index, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Return every count-th item, starting at `index`."""
        return list(items[self.index :: self.count])

    def gather(self, items: list[T]) -> list[T]:
        """Return the concatenated lists of all processes."""
        if self.count == 1:
            return items
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, identical on each."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over the processes; missing gradients count as zero."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            for bucket in _buckets(gradients):
                flat = self.sum_(torch.cat([g.flatten() for g in bucket]))
                sizes = [g.numel() for g in bucket]
                for gradient, summed in zip(bucket, flat.split(sizes), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def same_as_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for work that may fail on one process; then it fails on all.

        The failing process raises its own exception, the others a UserError with the same message,
        so that none waits forever. Every process must enter it; no exchange may happen inside.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.fail_if_any(error)

    def fail_if_any(self, error: Exception | None) -> None:
        """Raise on all processes if one has an error; see `together`."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        flag = torch.tensor(float(error is not None), device=self.device)
        if float(self.sum_(flag)) == 0:
            return
        words = self.gather([] if error is None else [_in_words(error, self.index)])
        if error is not None and not isinstance(error, UserError):
            raise error
        raise UserError(words[0]) from error  # the same on each: that of the first process


def _in_words(error: Exception, process: int) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"process {process} failed: {type(error).__name__}: {error}"


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups of at most `BUCKET` elements in order; a larger tensor is its own group."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


Tensors = dict[str, Tensor]

STATE = "state.json"

MAY_CHANGE = (
    "steps",
    "save_steps",
    "micro_batch_size",
    "forward_batch_size",
    "gradient_checkpointing",
)
"""Settings that may differ in a resumed run.

Another forward_batch_size changes the draws from then on.
"""


def describe(
    config: PPOConfig, prompts: Sequence[Text], frozen: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Return, as plain data, what a checkpoint and the run that resumes it must share.

    Args:
        frozen: names and values of parameters that are not trained, such as the reference's.
    """
    settings = {k: v for k, v in to_mapping(config).items() if k not in MAY_CHANGE}
    for name in ("advantage", "reward_shaping"):  # older checkpoints do not have them
        if settings[name] == getattr(PPOConfig, name):
            del settings[name]
    return {
        "settings": settings,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "frozen_models": weights_digest(frozen),
    }


def save(
    folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Write `checkpoint-STEP` in one rename, then remove older ones.

    Args:
        state: plain data, see `load`.
        tensors: by file name, by name.

    Raises:
        UserError: the disk is full; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{step}"
    temporary = folder / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        for name, named in tensors.items():
            whole = {k: t.detach().cpu().contiguous() for k, t in named.items()}
            save_file(whole, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        (temporary / MARK).touch()  # as in the checkpoints of the other trainers
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        replace_directory(temporary, target)
        _flush(folder)  # before the older one is deleted
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise UserError(
                f"{folder}: no space left for the checkpoint of step {step}; free space, then "
                "give the same command again: it continues from the checkpoint before"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in folder.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_half_written(folder: Path) -> None:
    """Delete incomplete checkpoints of a killed run."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensors]] | None:
    """Return state and tensors of the newest checkpoint; None if there is none.

    Raises:
        UserError: it is from another run (settings, prompts or frozen models), or cannot be read.
    """
    path = last_checkpoint(folder)
    if path is None:
        return None
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        found = differences(state["run"], json.loads(json.dumps(run)))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as a PPO checkpoint ({type(error).__name__}: {error}); "
            "delete the folder to start anew"
        ) from error
    if found:
        raise UserError(
            f"{path}: the checkpoint is from a run with other settings or data "
            f"({'; '.join(found[:3])}); use those to continue it, or delete the folder to start "
            "anew"
        )
    return state, tensors


def random_state(generator: random.Random) -> list[Any]:
    """Return the generator's state as plain data, for `set_random_state`."""
    version, internal, gauss = generator.getstate()
    return [version, list(internal), gauss]


def set_random_state(generator: random.Random, state: Sequence[Any]) -> None:
    version, internal, gauss = state
    generator.setstate((version, tuple(internal), gauss))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Tensors:
    """Return optimizer state as `KEY.NAME` (such as `exp_avg.model.norm.weight`)."""
    return {
        f"{key}.{name}": tensor
        for name, parameter in parameters.items()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    saved: Tensors,
    optimizer_saved: Tensors,
) -> None:
    """Copy saved values into the parameters and their optimizer.

    Raises:
        UserError: the tensors do not match the model.
    """
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != {name: tuple(t.shape) for name, t in saved.items()}:
        raise UserError(
            "the checkpoint's tensors are not those this run trains; give the models it was begun "
            "with, or delete the folder to start anew"
        )
    optimizer.state.clear()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    for full, tensor in optimizer_saved.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        # AdamW keeps its step count, a scalar, on the CPU.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
