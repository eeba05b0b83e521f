"""Checks of options before the long work starts; each failure is one line."""

import os
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError


def output_file(option: str) -> Path:
    """Where a file is to be written.

    Raises:
        UserError: a folder has this name, or a file stands where its folder should be.
    """
    path = Path(os.path.abspath(option))
    if path.is_dir():
        raise UserError(f"{option or '.'}: is a folder; give the name of a file to write")
    _require_folder_above(path, option)
    return Path(option)


def output_rows(option: str) -> Path:
    """Where rows are to be written, as JSON lines.

    Raises:
        UserError: as `output_file`, or the name says another format.
    """
    path = output_file(option)
    if path.suffix.lower() not in ("", ".jsonl", ".json"):
        raise UserError(f"{option}: the output is JSON lines; call it {path.stem}.jsonl")
    return path


def output_folder(option: str) -> Path:
    """Where a folder is to be written.

    Raises:
        UserError: a file has this name, or stands where the folder above should be.
    """
    path = Path(os.path.abspath(option))
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{option}: is not a folder; choose another --output")
    _require_folder_above(path, option)
    return Path(option)


def _require_folder_above(path: Path, option: str) -> None:
    above = next(p for p in path.parents if os.path.lexists(p))
    if not above.is_dir():
        raise UserError(f"{option}: {above} is not a folder; choose another --output")


def at_least_one(value: int, option: str) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise UserError(f"{option} is {value}; it must be at least 1")


def to_accelerator(model: Any) -> Any:
    """The model on this machine's accelerator if there is one; as it is otherwise."""
    import torch

    device = torch.accelerator.current_accelerator()
    return model if device is None else model.to(device)
