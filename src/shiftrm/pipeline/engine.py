"""The engine: runs stages, each of which writes its folder completely or not at all.

A stage's key is a hash of its settings, the library versions, and the keys of the stages it reads.
A finished stage with an unchanged key is skipped; a changed key stops the run before it starts. A
run that was killed continues when the same command is given again, and ends in the same files,
because every stage draws its random numbers from the run's seed.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from shiftrm.config import differences
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text, replace_directory
from shiftrm.locks import exclusive
from shiftrm.pipeline.children import end_children, end_with_signal
from shiftrm.records import Recorder, library_versions, read_records, write_records

STAGE_FILE = "stage.json"
RECORDS_FILE = "records.jsonl"
WORK_FOLDER = ".work"
UNFINISHED_FOLDER = ".unfinished"


@dataclass(frozen=True)
class Stage:
    """One resumable piece of work.

    Attributes:
        name: also its folder below the run's, such as "methods/fixed/round-1/ppo".
        function: "module:function"; called with a `StageContext`.
        settings: plain data that determines the result, together with the stages it reads.
        needs: names of the stages whose folders it reads.
        record_as: stage, method and round of its records.
        execution: plain data that changes how the stage runs but not its result; it may differ in
            the call that continues an interrupted run.
    """

    name: str
    function: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    record_as: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageContext:
    """The argument of a stage function: where to read and write, and the recorder.

    Attributes:
        root: the run's folder, to read finished stages from (`context.folder(name)`).
        out: a new folder that becomes the stage's own.
        keep: a folder for checkpoints, which survives an interruption of this stage. The stage
            creates it if needed; it is deleted when the stage is published.
        recorder: records the stage's numbers.
    """

    stage: Stage
    root: Path
    out: Path
    keep: Path
    seed: int
    recorder: Recorder

    def folder(self, name: str) -> Path:
        """Return the folder of a stage that this one needs.

        Raises:
            KeyError: the plan does not list it in `needs`.
        """
        if name not in self.stage.needs:
            raise KeyError(f"stage {self.stage.name} reads {name} but does not name it in needs")
        return self.root / name

    def random_seed(self, role: str) -> int:
        """Return a seed from the run's seed and a role. Arms that share a role share draws."""
        return random_seed(self.seed, role)


def random_seed(seed: int, role: str) -> int:
    """Return the seed of a role in a run with this seed."""
    digest = hashlib.sha256(f"{seed}/{role}".encode()).digest()
    return int.from_bytes(digest[:4], "big") // 2  # fits every library's seed


def stage_keys(stages: Sequence[Stage], seed: int) -> dict[str, str]:
    """Return the key of every stage. `stages` must list a stage after those it needs."""
    keys: dict[str, str] = {}
    for stage in stages:
        _check_place(stage.name, keys)
        content = {
            "versions": library_versions(),
            "function": stage.function,
            "settings": stage.settings,
            "seed": seed,
            "needs": {name: keys[name] for name in stage.needs},
        }
        text = json.dumps(content, sort_keys=True)
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:20]
    return keys


def _check_place(name: str, others: Mapping[str, Any]) -> None:
    """Refuse a plan in which one stage's folder is inside another's, which replaces it."""
    for other in others:
        if name == other or name.startswith(f"{other}/") or other.startswith(f"{name}/"):
            raise ValueError(f"stages {other} and {name} would write into one folder")


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    *,
    seed: int,
    workers: int = 1,
    threads: int | None = 1,
    on_progress: Callable[[str, str], None] | None = None,
) -> None:
    """Run the stages that are not finished, up to `workers` at a time.

    Args:
        stages: each after those it needs.
        root: the run's folder; created if missing.
        workers: number of processes. The results do not depend on it.
        threads: threads per worker; None leaves the number to the libraries. With more than one,
            results depend on the number, and tiny models are slower.
        on_progress: called with (event, stage name); events "start", "done", "skipped".

    Raises:
        UserError: the folder belongs to another configuration, or is in use.
        RuntimeError: a stage failed; the message names it and its log.
    """
    keys = stage_keys(stages, seed)
    _finished(stages, root, keys, seed)  # refuses a folder of another configuration untouched
    root.mkdir(parents=True, exist_ok=True)
    notify = on_progress or (lambda _event, _name: None)
    with exclusive(root / ".lock", root):
        _discard_work(root)
        finished = _finished(stages, root, keys, seed)
        for stage in stages:
            if stage.name in finished:
                notify("skipped", stage.name)
        waiting = [stage for stage in stages if stage.name not in finished]
        if waiting:
            run = _Run(root, keys, seed, notify)
            _run_pool(run, waiting, finished, workers, threads)
        _discard_work(root)
        shutil.rmtree(root / UNFINISHED_FOLDER, ignore_errors=True)  # of a stage killed at its end
        collect_records(stages, root)


def collect_records(stages: Sequence[Stage], root: Path) -> Path:
    """Write the records of all stages into one file, in the order of the plan."""
    records = []
    for stage in stages:
        path = root / stage.name / RECORDS_FILE
        if path.exists() and path.stat().st_size:
            records += read_records(path)
    path = root / RECORDS_FILE
    write_records(path, records)
    return path


@dataclass(frozen=True)
class _Run:
    """What the stages of a run share; see `run_stages`."""

    root: Path
    keys: dict[str, str]
    seed: int
    notify: Callable[[str, str], None]


def _run_pool(
    run: _Run, waiting: list[Stage], finished: set[str], workers: int, threads: int | None
) -> None:
    running: dict[Future[None], Stage] = {}
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    )
    try:
        while waiting or running:
            ready = [s for s in waiting if finished.issuperset(s.needs)]
            for stage in ready[: workers - len(running)]:
                waiting.remove(stage)
                future = pool.submit(execute, stage, run.root, run.keys[stage.name], run.seed)
                running[future] = stage
                run.notify("start", stage.name)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                stage = running.pop(future)
                future.result()
                finished.add(stage.name)
                _failure_log(run.root, stage.name).unlink(missing_ok=True)
                run.notify("done", stage.name)
    except BrokenExecutor:
        names = ", ".join(stage.name for stage in [stage, *running.values()])
        raise RuntimeError(
            f"stage {names}: the process was killed, perhaps for lack of memory; give the same "
            "command again to continue, with one worker at a time if memory is short"
        ) from None
    except BaseException:
        # Stages under way are not waited for: what they leave is in the work folder only.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def execute(stage: Stage, root: Path, key: str, seed: int) -> None:
    """Run one stage in this process and publish its folder."""
    out = root / WORK_FOLDER / f"{stage.name.replace('/', '.')}-{uuid.uuid4().hex[:8]}"
    out.mkdir(parents=True)
    recorder = Recorder(
        **{"stage": stage.name, "method": "", "round": 0, **stage.record_as}, seed=seed
    )
    keep = root / UNFINISHED_FOLDER / f"{stage.name.replace('/', '.')}-{key}"
    context = StageContext(stage=stage, root=root, out=out, keep=keep, seed=seed, recorder=recorder)
    try:
        with _output_to(out / "log.txt"):
            _resolve(stage.function)(context)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"stage {stage.name}: the disk is full at {root}; free space, then give the same "
                "command again: finished stages are kept"
            ) from None
        kept = _failure_log(root, stage.name)
        shutil.copyfile(out / "log.txt", kept)
        raise RuntimeError(
            f"stage {stage.name} failed: {type(error).__name__}: {error}; see {kept}"
        ) from None
    write_records(out / RECORDS_FILE, recorder.records)
    about = {
        "name": stage.name,
        "key": key,
        "seed": seed,
        "versions": library_versions(),
        "settings": stage.settings,
        "needs": list(stage.needs),
    }
    atomic_write_text(out / STAGE_FILE, json.dumps(about, indent=1) + "\n")
    target = root / stage.name
    target.parent.mkdir(parents=True, exist_ok=True)
    log = (out / "log.txt").read_text(encoding="utf-8", errors="replace")
    if str(keep) in log:  # what was written there is found in the stage's own folder from now on
        atomic_write_text(out / "log.txt", log.replace(str(keep), str(target)))
    replace_directory(out, target)
    shutil.rmtree(keep, ignore_errors=True)


def _failure_log(root: Path, name: str) -> Path:
    return root / f"failed-{name.replace('/', '.')}.log"


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect everything printed inside to a file, including tracebacks.

    At the level of file descriptors: libraries keep the stream they found when they were imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with open(path, "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                yield
            except BaseException:
                traceback.print_exc(file=log)
                raise
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
    finally:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _resolve(name: str) -> Callable[[StageContext], None]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _discard_work(root: Path) -> None:
    """Remove what unfinished stages left.

    It is renamed first: an orphan of a killed run then either has published its whole folder or
    cannot any more, and never publishes one that is half removed.
    """
    if (root / WORK_FOLDER).exists():
        aside = root / f"{WORK_FOLDER}-{uuid.uuid4().hex[:8]}"
        os.rename(root / WORK_FOLDER, aside)
    for folder in root.glob(f"{WORK_FOLDER}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _finished(stages: Sequence[Stage], root: Path, keys: dict[str, str], seed: int) -> set[str]:
    return {stage.name for stage in stages if _is_finished(stage, root, keys, seed)}


def _is_finished(stage: Stage, root: Path, keys: dict[str, str], seed: int) -> bool:
    folder = root / stage.name
    if not folder.exists():
        return False
    try:
        about = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{folder}: not a stage of a run ({STAGE_FILE} is missing or broken); "
            "choose another output folder"
        ) from None
    if about["key"] == keys[stage.name]:
        return True
    changed = differences(
        {"seed": about["seed"], "versions": about.get("versions"), **about["settings"]},
        {"seed": seed, "versions": library_versions(), **stage.settings},
    )
    what = "; ".join(changed[:3]) or "a stage it builds on changed"
    raise UserError(
        f"{root}: stage {stage.name} was made with another configuration ({what}); "
        "choose another output folder or delete this one"
    )


def _start_worker(threads: int | None) -> None:
    """So many threads a worker, and an end when the parent ends.

    A worker outlives a parent killed with -9 unless it watches for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    end_with_signal()
    if threads is not None:  # for libraries loaded later
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    import torch
    import tqdm

    tqdm.tqdm.set_lock(threading.RLock())  # its default is a semaphore that Ctrl-C would leak
    if threads is not None:
        torch.set_num_threads(threads)  # the parent's main module may have loaded torch already
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        end_children()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the process's lifetime
