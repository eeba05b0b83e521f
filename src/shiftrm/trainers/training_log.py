"""Write `training_log.jsonl`, the logged metrics by step, into every published folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shiftrm.files import Row, is_number, write_jsonl

TRAINING_LOG = "training_log.jsonl"

ONCE = "train_runtime"
"""A key of the trainer's last entry, which summarises the run and belongs to no step."""


def training_log(history: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return one row `{"step": n, metric: value, ...}` per step, with finite numbers only.

    Args:
        history: entries with `step` and metrics; entries of one step are merged.
    """
    rows: dict[int, Row] = {}
    for entry in history:
        if ONCE in entry:
            continue
        row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        row |= {key: value for key, value in entry.items() if key != "step" and is_number(value)}
    return [rows[step] for step in sorted(rows)]


def write_training_log(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Write `training_log` into a folder; the file is empty if nothing was logged."""
    write_jsonl(folder / TRAINING_LOG, training_log(history))
