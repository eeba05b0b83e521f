"""What an interrupted PPO run continues from: one folder `checkpoint-STEP`, whole or not there.

It holds the trained tensors and the states of their optimizers as safetensors, and step, logs,
KL controller, random state and the order of prompts as JSON. Only the newest is kept.
"""

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shiftrm.config import differences, to_mapping
from shiftrm.errors import UserError
from shiftrm.files import replace_directory
from shiftrm.models.rendering import Text
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.trainers.work_folder import MARK, is_disk_full, last_checkpoint

Tensors = dict[str, Tensor]

STATE = "state.json"

MAY_CHANGE = (
    "steps",
    "save_steps",
    "micro_batch_size",
    "forward_batch_size",
    "gradient_checkpointing",
)
"""Settings that a continued run may have other values of: how far, how often, in what portions.

Another forward_batch_size is other draws from then on.
"""

VALUES_COMPARED = 64
"""Leading values of each frozen parameter by which a checkpoint knows its models."""


def describe(
    config: PPOConfig, prompts: Sequence[Text], frozen: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues it, as plain data.

    Args:
        frozen: names and values of parameters that are not trained, the reference's say.
    """
    settings = {k: v for k, v in to_mapping(config).items() if k not in MAY_CHANGE}
    digest = hashlib.sha256()
    for name, parameter in frozen:
        head = parameter.detach().flatten()[:VALUES_COMPARED].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + head.numpy().tobytes())
    return {
        "settings": settings,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "frozen_models": digest.hexdigest(),
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
        (temporary / MARK).touch()  # as the other trainers' checkpoints have it
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        replace_directory(temporary, target)
        _flush(folder)  # before the older one goes
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
    """What a killed run left while it was writing."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensors]] | None:
    """State and tensors of the newest checkpoint; None if there is none.

    Raises:
        UserError: it is another run's (settings, prompts or frozen models), or cannot be read.
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
            f"{path}: of a run with other settings or data ({'; '.join(found[:3])}); give the old "
            "ones to continue it, or delete the folder to start anew"
        )
    return state, tensors


def random_state(generator: random.Random) -> list[Any]:
    """The generator's state as plain data; `set_random_state` takes it back."""
    version, internal, gauss = generator.getstate()
    return [version, list(internal), gauss]


def set_random_state(generator: random.Random, state: Sequence[Any]) -> None:
    version, internal, gauss = state
    generator.setstate((version, tuple(internal), gauss))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Tensors:
    """The optimizer's state of each parameter, under `KEY.NAME` (`exp_avg.model.norm.weight`)."""
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
    """Put saved values into the parameters and their optimizer.

    Raises:
        UserError: the tensors are not this model's.
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
