"""QLoRA: adapters and a head in full precision on a base of 4 or 8 bits (bitsandbytes).

Only the adapters and the head are trained; both are in the type that the model was loaded in, fp32
unless set. The base is never changed, so the meta step moves the adapters and the head alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import is_bitsandbytes_available, is_peft_available

from shiftrm.errors import UserError
from shiftrm.models.rewards import find_head

LOADING = {"load_in_4bit": 4, "load_in_8bit": 8}
"""The settings of `trl.ModelConfig` that quantise the base, with their bits."""


def check_adapters(settings: Mapping[str, Any]) -> None:
    """Refuse LoRA without its package, and quantisation without LoRA or its package.

    Args:
        settings: values of the fields of `trl.ModelConfig`, those that were given.

    Raises:
        UserError: says what to install or to set.
    """
    lora = bool(settings.get("use_peft"))
    if lora and not is_peft_available():
        raise UserError("use_peft=true needs the package peft: pip install 'shiftrm[peft]'")
    for name in LOADING:
        if not settings.get(name):
            continue
        if not lora:
            raise UserError(
                f"{name}=true: quantised weights are not trained; add use_peft=true, which trains "
                "adapters on them (QLoRA)"
            )
        if not is_bitsandbytes_available():
            raise UserError(
                f"{name}=true needs the package bitsandbytes: pip install 'shiftrm[qlora]'"
            )


def is_quantised(model: Any) -> bool:
    """Return whether bitsandbytes holds the model's linear layers in 4 or 8 bits."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in LOADING.values())


class Trained(NamedTuple):
    """The weights of a quantised model that are, or will be, trained."""

    head: list[Tensor]
    others: dict[str, Tensor]


def trained_weights(model: nn.Module, *, lora: bool) -> Trained | None:
    """Return head and adapters as they are now; None for a model that is not quantised.

    Args:
        lora: whether the model has adapters or will get them.

    Raises:
        UserError: a quantised model without adapters.
    """
    if not is_quantised(model):
        return None
    if not lora:
        raise UserError(
            "the model's weights are quantised, and these are not trained; give a peft_config, "
            "which trains adapters on them (QLoRA)"
        )
    stay_differentiable_(model)
    others = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return Trained([p.data for p in find_head(model).parameters()], others)


def stay_differentiable_(model: nn.Module) -> None:
    """Keep layers of 4 bits in the form that training needs, also on a CPU with AVX512-BF16.

    There bitsandbytes (0.50) rewrites a layer's weight in its first evaluation for a bf16 kernel
    without gradients, and keeps it so: later training would get no gradient through the layer, and
    nobody would say so.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # its way back


def restore_(model: nn.Module, before: Trained | None, *, sharded: bool) -> None:
    """Give trained weights their precision back, which TRL (1.16) has rounded to bf16.

    A head in bf16 cannot follow a model that computes in fp32, and MetaRM's step drowns in bf16's
    rounding (docs/bf16-meta-step.md). New adapters keep their rounded random numbers, in fp32.

    Args:
        before: `trained_weights` before TRL's constructor, which may have added the adapters.
        sharded: whether FSDP2 will shard the model.

    Raises:
        UserError: FSDP2 would shard a quantised model, which is not tested.
    """
    if before is None:
        return
    if sharded:
        raise UserError(
            "quantised weights are not sharded: leave out load_in_4bit, or use DDP or one process "
            "instead of FSDP2"
        )
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = before.others.get(name, p.data.float()).to(p.device)
    for p, value in zip(find_head(model).parameters(), before.head, strict=True):
        p.data = value.to(p.device, copy=True)  # the adapter's copy beside the base's own head


def count(parameter: Tensor) -> int:
    """Return how many numbers a parameter holds; bitsandbytes packs two of 4 bits into a byte."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.element_size() * parameter.numel()
    return parameter.numel()


def computed_in(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters, in place of a quantised one an empty tensor of its layer's type."""
    for module in model.modules():
        kind = getattr(module, "compute_dtype", None)
        for p in module.parameters(recurse=False):
            if not p.is_floating_point() and isinstance(kind, torch.dtype):
                yield torch.empty(0, dtype=kind)
            else:
                yield p


def merged(model: Any, adapter: Path) -> Any:
    """Return an ordinary model: the base with the trained adapter merged into it.

    A quantised base is dequantised first. The result computes what was trained, up to rounding (of
    a base of 8 bits also that of activations). The given model is used up.

    Args:
        model: wrapped by PEFT.
        adapter: the folder that its adapter and head were saved to.
    """
    if not is_quantised(model):
        return model.merge_and_unload()
    from peft import PeftModel

    base = model.unload()
    base = base.dequantize(base.dtype)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False  # left by transformers (5.23)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
