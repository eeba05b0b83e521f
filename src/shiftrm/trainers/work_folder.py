"""The folder that a training works in until its result is complete."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from shiftrm.config import differences
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text, replace_directory
from shiftrm.trainers.progress import log_progress_to

RUN_FILE = "run.json"
"""The settings and data of the run that created the folder."""

FINISHED = "finished"
"""The result while it is written; it is renamed at the end."""

SAMPLES = "groups.jsonl"
"""Groups sampled from a policy before training; suffixed `.partial` during sampling."""

MARK = "complete"
"""A file that marks a checkpoint as completely written."""


def check(work: Path, run: dict[str, Any]) -> None:
    """Refuse the folder of another run, without changing anything.

    Args:
        run: model, settings, data and processes, as plain data; "sampling" holds how groups are
            sampled, and only this must match if there is no checkpoint yet.

    Raises:
        UserError: the folder belongs to another run or to none; the message says what differs.
    """
    if not work.exists():
        return
    path = work / RUN_FILE
    if not path.is_file():
        if work.is_dir() and all(p.name.startswith(".") for p in work.iterdir()):
            return  # killed before it could write its first file
        raise UserError(
            f"{work}: is not the work folder of a training; move it or choose another output"
        )
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: is not valid; delete {work} to start again") from None
    if last_checkpoint(work) is None and has_samples(work):  # samples fit any training
        old, run = {"sampling": old.get("sampling")}, {"sampling": run.get("sampling")}
    found = differences(old, run)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{work}: holds an unfinished training with other settings or data "
            f"({'; '.join(found[:3])}{more}); repeat it with the old "
            "ones to continue, or delete the folder to start again"
        )


def claim(work: Path, run: dict[str, Any]) -> None:
    """Claim the folder for this run and remove partly written files."""
    work.mkdir(parents=True, exist_ok=True)
    text = json.dumps(run, indent=1)
    if not (work / RUN_FILE).exists() or (work / RUN_FILE).read_text(encoding="utf-8") != text:
        atomic_write_text(work / RUN_FILE, text)
    _remove_half_written(work)


def release(work: Path) -> None:
    """Keep complete checkpoints and samples after a failure; without any, remove the folder."""
    if last_checkpoint(work) is None and not has_samples(work):
        shutil.rmtree(work, ignore_errors=True)
    else:
        _remove_half_written(work)


def has_samples(work: Path) -> bool:
    """Return whether the folder holds a group sampled from a policy."""
    partial = work / f"{SAMPLES}.partial"  # its first line holds the settings
    return (work / SAMPLES).exists() or (partial.exists() and partial.read_bytes().count(b"\n") > 1)


def member_folder(work: Path, number: int) -> Path:
    """Return the folder of one of several models that a training makes one after another."""
    return work / f"member-{number}"


def _members(work: Path) -> list[Path]:
    return sorted(work.glob("member-*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _remove_half_written(work: Path) -> None:
    for folder in (work, *_members(work)):
        for path in (*folder.glob("checkpoint-*"), folder / FINISHED):
            if not (path / MARK).exists():
                shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(work: Path) -> Path | None:
    """Return the complete checkpoint of the latest step, or a later model that is finished."""
    for folder in (*reversed(_members(work)), work):
        if (folder != work) and (folder / FINISHED / MARK).exists():
            return folder / FINISHED
        found = [mark.parent for mark in folder.glob(f"checkpoint-*/{MARK}")]
        if found:
            return max(found, key=_number)
    return None


def resumable(work: Path) -> Path | None:
    """Return the last checkpoint if it can be resumed (save_only_model saves only weights)."""
    found = last_checkpoint(work)
    return found if found is not None and not (found / MARK).read_text() else None


def is_disk_full(error: BaseException) -> bool:
    """Return whether the error means a full disk, from Python, safetensors or torch.save."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    said = ("No space left on device", "os error 28", "Disk quota", "inline_container.cc")
    return any(words in str(error) for words in said)


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete after the trainer has written all of its files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            atomic_write_text(folder / MARK, "weights only" if args.save_only_model else "")


@contextmanager
def hold_work(work: Path, record: dict[str, Any]) -> Iterator[Path | None]:
    """Claim the work folder and yield the checkpoint to resume from.

    After a failure inside, only complete checkpoints and sampled groups are kept, and the error
    says where they are.

    Args:
        record: entries that must match to resume an interrupted run.
    """
    check(work, record)
    processes = PartialState()
    processes.wait_for_everyone()  # no process may write while another still checks
    try:
        if processes.is_main_process:
            claim(work, record)
            log_progress_to(work)
        processes.wait_for_everyone()
        yield resumable(work)
    except BaseException as error:
        log_progress_to(None)
        if processes.is_main_process:
            release(work)
        kept = last_checkpoint(work)
        if isinstance(error, UserError) and kept is not None:
            said = "" if "checkpoint" in str(error) else f"; the last good checkpoint is {kept}"
            raise UserError(f"{error}{said}; to start with other settings, delete {work}") from None
        if is_disk_full(error):
            again = "to start again" if kept is None else f"to continue from {kept}"
            again = "to continue" if kept is None and has_samples(work) else again
            raise UserError(
                f"{work}: no space left on the disk; free some, then give the same command again "
                f"{again}"
            ) from None
        raise


def publish_folder(finished: Path, work: Path, target: Path, card: str) -> None:
    """Add the card and rename the result to the output; for the main process."""
    log_progress_to(None)  # the folder is about to be removed
    atomic_write_text(finished / "README.md", card)
    if (work / "runs").is_dir():  # what report_to=tensorboard wrote
        (work / "runs").rename(finished / "runs")
    if target.exists():
        target.rmdir()
    replace_directory(finished, target)
    shutil.rmtree(work, ignore_errors=True)
