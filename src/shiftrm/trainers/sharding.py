"""Support for parameters sharded over processes by FSDP2.

Four facts about FSDP2 (`torch.distributed.fsdp.fully_shard`) decide how our trainers treat it:

- Parameters are DTensors whose shards the optimizer owns. A forward pass uses gathered copies, and
  after a forward without gradients the outermost modules keep theirs: an edit of the shards is then
  ignored until `reshard`.
- Gradients reach `.grad`, as shards, only through `.backward()`, and only while gradients are
  synchronised (`gradients_in_shards`); they are then averages over the processes.
- Forward and backward passes communicate, so every process must run the same number of them.
- A norm or a file needs all shards (`whole`).
"""

import os
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from shiftrm.errors import UserError


def set_up_fsdp(accelerator: Accelerator, plugin_arguments: dict[str, Any] | None) -> bool:
    """Make FSDP2 work on CPUs as on GPUs, and refuse modes that our trainers do not support.

    accelerate (1.15) reads an FSDP configuration only if it finds several GPUs
    (`AcceleratorState.__init__`). On CPUs it silently drops the configuration and runs DDP. This
    function sets what that branch would have set in accelerate's state, so that wrapping,
    accumulation, clipping and checkpoints follow accelerate's FSDP2 path.

    Args:
        accelerator: newly created.
        plugin_arguments: `TrainingArguments.fsdp_plugin_args`; None if the configuration, if any,
            came from `accelerate launch`.

    Returns:
        Whether parameters will be sharded.

    Raises:
        UserError: FSDP1, or wrapping by size, which may separate the score head from the outermost
            group, in whose forward pass the rewards are read.
    """
    state: Any = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = _configured_plugin(plugin_arguments)
        if plugin is not None:
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            state.fsdp_plugin = plugin
            state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise UserError(
            f"FSDP version {plugin.fsdp_version} flattens parameters and is not supported; set "
            "fsdp_version: 2 in the accelerate configuration, or fsdp_config={'version': 2}"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise UserError(
            "FSDP's SIZE_BASED_WRAP may shard the score head by itself, away from where rewards "
            "are read; set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
        )
    return True


def _configured_plugin(
    plugin_arguments: dict[str, Any] | None,
) -> FullyShardedDataParallelPlugin | None:
    """Return the plugin from the training arguments or the environment of `accelerate launch`."""
    if plugin_arguments is not None:
        return FullyShardedDataParallelPlugin(**plugin_arguments)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return FullyShardedDataParallelPlugin()
    return None


def refuse_deepspeed(args: Any) -> None:
    """Raise UserError if DeepSpeed is configured, in the arguments or by the launcher."""
    if getattr(args, "deepspeed_plugin", None) is not None or getattr(args, "deepspeed", None):
        raise UserError(
            "the reward trainers do not run under DeepSpeed: it reduces and steps inside its own "
            "backward, where theta' cannot be undone, and may release a score head's weights "
            "before rewards are read; use FSDP2 (fsdp_version: 2) or DDP"
        )


def refuse_model_parallelism(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise UserError if processes share the work on one row; only data parallelism is tested."""
    config: Any = accelerator.parallelism_config
    for kind in ("tp", "cp", "sp"):
        if config is not None and getattr(config, f"{kind}_enabled", False):
            raise UserError(
                f"parallelism_config has {kind}_size > 1; MetaRMTrainer runs under data "
                "parallelism only (DDP or FSDP2); set it to 1"
            )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise UserError(
            "the model was sharded as it was loaded (distributed_config); load it whole and give "
            "the trainer an FSDP2 configuration instead"
        )


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards the model; False before training has prepared it."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Release gathered copies so that the parameters are the shards and the next pass gathers anew.

    Call it between passes; without FSDP2 it does nothing.
    """
    if is_sharded(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def reset_after_failure(model: nn.Module) -> None:
    """Make the model usable again after a pass that ended in an exception, on every process."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def gradients_in_shards(model: nn.Module) -> None:
    """Make FSDP2 write averaged gradients to `.grad` from the next backward pass on.

    Under gradient accumulation FSDP2 otherwise keeps them unsharded and inaccessible. The effect
    lasts until Trainer's next `no_sync`, at the next micro-batch; nothing has to be undone.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor, or an ordinary tensor unchanged; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(named: dict[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Return `whole` of each in CPU memory on the main process, an empty dict elsewhere.

    Gathers one tensor at a time, so that no device holds more than one full tensor.
    """
    collected = {}
    for name, tensor in named.items():
        full = whole(tensor)
        if is_main:
            collected[name] = full.cpu()
    return collected


def sharded_like(tensors: Iterable[Tensor], parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return full tensors, equal on all processes, placed and sharded like the parameters."""
    placed: list[Tensor] = []
    for tensor, p in zip(tensors, parameters, strict=True):
        if isinstance(p, DTensor):
            shard = distribute_tensor(
                tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None
            )
            placed.append(shard)
        else:
            placed.append(tensor.to(p.device))
    return placed
