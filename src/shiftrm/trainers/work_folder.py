"""The folder a training works in until its result is whole: begun, continued, or refused."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shiftrm.config import differences
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text

__all__ = [
    "MarkCompleteCheckpoints",
    "check",
    "claim",
    "is_disk_full",
    "last_checkpoint",
    "release",
]

RUN_FILE = "run.json"
"""By which settings and data the folder was begun."""

FINISHED = "finished"
"""The result while it is being written; then it is renamed."""

MARK = "complete"
"""In a checkpoint: every file of it is written."""


def check(work: Path, run: dict[str, Any]) -> None:
    """Refuse a folder of another run; changes nothing.

    Args:
        run: model, settings, data and processes, as plain data.

    Raises:
        UserError: the folder is another run's, or no run's; the message says what differs.
    """
    if not work.exists():
        return
    path = work / RUN_FILE
    if not path.is_file():
        if work.is_dir() and all(p.name.startswith(".") for p in work.iterdir()):
            return  # killed before it could write its first file
        raise UserError(f"{work}: in the way and no training's folder; move it, or choose another")
    found = differences(json.loads(path.read_text(encoding="utf-8")), run)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{work}: holds an unfinished training of other settings or data "
            f"({'; '.join(found[:3])}{more}); give the old ones to continue it, or delete the "
            "folder to start anew"
        )


def claim(work: Path, run: dict[str, Any]) -> None:
    """Make the folder this run's, without what an interruption left half-written."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / RUN_FILE).exists():
        atomic_write_text(work / RUN_FILE, json.dumps(run, indent=1))
    _remove_half_written(work)


def release(work: Path) -> None:
    """After a failure: keep the complete checkpoints; nothing at all if there are none."""
    if last_checkpoint(work) is None:
        shutil.rmtree(work, ignore_errors=True)
    else:
        _remove_half_written(work)


def _remove_half_written(work: Path) -> None:
    for path in (*work.glob("checkpoint-*"), work / FINISHED):
        if not (path / MARK).exists():
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(work: Path) -> Path | None:
    """The complete checkpoint of the latest step."""
    found = [mark.parent for mark in work.glob(f"checkpoint-*/{MARK}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def resumable(work: Path) -> Path | None:
    """The last checkpoint, if training can go on from it (save_only_model keeps weights alone)."""
    found = last_checkpoint(work)
    return found if found is not None and not (found / MARK).read_text() else None


def is_disk_full(error: BaseException) -> bool:
    """Whether this is a full disk, in the words of Python, safetensors or torch.save."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    said = ("No space left on device", "os error 28", "Disk quota", "inline_container.cc")
    return any(words in str(error) for words in said)


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all of it is written: the trainer writes its files one by one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            atomic_write_text(folder / MARK, "weights only" if args.save_only_model else "")
