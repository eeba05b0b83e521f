"""Progress of long work: a line at least every half minute where no terminal shows a bar.

A command opens a `Progress`; long work names its task there (`task`) and reports how much is done.
A separate thread prints the lines, so that they also come when one batch takes minutes, or when
nothing is counted.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = [
    "EVERY", "LOG_FILE", "Advance", "Progress", "ProgressTask", "current", "duration",
    "only_on_terminals", "quieten_libraries", "reporting", "speaks", "task",
]  # fmt: skip

Advance = Callable[[int, int], None]
"""Called with (done, total)."""

EVERY = 25.0
"""Seconds without output until a line is due; below 30, as busy machines wake threads late."""

LOG_FILE = "progress.log"
"""The file in a work folder that has every line, with its time."""


class ProgressTask:
    """Work in progress, and how much of it is done.

    Attributes:
        label: what is done, such as "sampling".
        done, total: in the unit that the task counts; `total` is None if unknown.
    """

    def __init__(
        self, label: str, total: int | None, clock: Callable[[], float], *, done: int = 0
    ) -> None:
        self.label, self.total, self.done = label, total, done
        self._clock, self._start = clock, clock()
        self._first = self._last = (self._start, done)

    def advance(self, done: int, total: int | None = None) -> None:
        """Set how much is done, and the total if it was not known before."""
        if done != self.done:
            self._last = (self._clock(), done)
            self._first = self._last if self._first[1] == 0 else self._first
        self.done, self.total = done, self.total if total is None else total

    def words(self) -> str:
        """Return done and total, elapsed time and estimated remaining time."""
        parts = [self.label]
        if self.done or self.total:
            parts[0] += f": {self.done:,}" + (f" of {self.total:,}" if self.total else "")
        parts.append(f"{duration(self._clock() - self._start)} so far")
        rest = self._rest()
        if rest is not None:
            parts.append(f"about {duration(rest)} left")
        return ", ".join(parts)

    def _rest(self) -> float | None:
        """Estimate the remaining seconds from the rate since the first count.

        Resumed work may begin anywhere, and slowly. None before the first count, and when the next
        count is overdue.
        """
        if self.total is None or self.done >= self.total:
            return None
        (since, first), (at, last) = self._first, self._last
        seconds, done = at - since, last - first
        if not done:  # one count so far: use the time until it
            seconds, done = at - self._start, first
        if seconds <= 0 or not done:
            return None
        rest = seconds / done * (self.total - self.done) - (self._clock() - at)
        return rest if rest > 0 else None


class Progress:
    """The tasks of one command, and the lines that report them.

    Args:
        label: shown if no task is named, such as the command's name.
        say: takes a line; None if a bar is shown instead.
        clock: returns seconds, from any origin.
        every: seconds without output after which a line is due.
    """

    def __init__(
        self,
        label: str,
        say: Callable[[str], None] | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self._clock, self._every, self._say = clock, every, say
        self._tasks = [ProgressTask(label, None, clock)]
        self._spoke = clock()
        self._log: Path | None = None
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def task(self, label: str, total: int | None) -> Iterator[ProgressTask]:
        """Run a task inside the block; lines report the latest task."""
        begun = self.begin(label, total)
        try:
            yield begun
        finally:
            self.end(begun)

    def begin(self, label: str, total: int | None, *, done: int = 0) -> ProgressTask:
        """Begin a task, for callers whose work is not a `with` block; `end` ends it.

        Args:
            done: how much is done before its clock starts.
        """
        with self._lock:
            self._tasks.append(ProgressTask(label, total, self._clock, done=done))
            return self._tasks[-1]

    def end(self, task: ProgressTask) -> None:
        """End a task that `begin` returned."""
        with self._lock:
            if task in self._tasks:
                self._tasks.remove(task)

    def log_to(self, folder: Path | None) -> None:
        """Also write all lines to `LOG_FILE` in this folder, as long as the folder exists."""
        with self._lock:
            self._log = None if folder is None else folder / LOG_FILE

    def set_every(self, seconds: float) -> None:
        """Set the seconds without output after which a line is due."""
        with self._lock:
            self._every = seconds

    def note(self, line: str) -> None:
        """Log a line that was printed elsewhere; it counts as output."""
        with self._lock:
            self._spoke = self._clock()
            if self._log is not None:
                with (
                    contextlib.suppress(OSError),
                    open(self._log, "a", encoding="utf-8", errors="backslashreplace") as file,
                ):
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def speak_if_due(self) -> float:
        """Report the latest task if a line is due; return the seconds until the next."""
        with self._lock:
            if self._clock() - self._spoke >= self._every:
                line = self._tasks[-1].words()
                self.note(line)
                if self._say is not None:
                    self._say(line)
            return self._spoke + self._every - self._clock()

    def watch(self, wait: Callable[[float], bool]) -> None:
        """Print a line whenever one is due, until `wait(seconds)` returns true."""
        while not wait(max(0.1, self.speak_if_due())):
            pass


_stack: list[Progress] = []


def current() -> Progress | None:
    """Return the progress of the running command, if there is one."""
    return _stack[-1] if _stack else None


@contextlib.contextmanager
def task(label: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """Run a task of the running command; yields a function to call with (done, total)."""
    progress = current()
    if progress is None:
        yield ProgressTask(label, total, time.monotonic).advance  # not shown
        return
    with progress.task(label, total) as begun:
        yield begun.advance


@contextlib.contextmanager
def reporting(label: str, *, speaks: bool) -> Iterator[Progress]:
    """Open a command's progress.

    Args:
        label: the command's name.
        speaks: whether lines go to standard error; they always go to a work folder's log.
    """
    progress = Progress(label, _say if speaks else None)
    over = threading.Event()
    thread = threading.Thread(target=progress.watch, args=(over.wait,), daemon=True)
    _stack.append(progress)
    thread.start()
    try:
        yield progress
    finally:
        _stack.remove(progress)
        over.set()
        thread.join()


def speaks() -> bool:
    """Whether progress is written as lines: no terminal shows bars, and one process reports."""
    return not sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error is closed
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a duration as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def quieten_libraries() -> None:
    """Before TRL is imported, switch off telemetry and warnings that users cannot act on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL's and PEFT's own use of the old name.
    old_names = "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    # torch, of a broken pytorch_model.bin, before the error that is reported.
    warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
    # PEFT imports bitsandbytes, which says on some CPUs that a kernel of the hub is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def only_on_terminals() -> None:
    """Switch off the libraries' bars and notes without a terminal, where an error is one line."""
    if sys.stderr.isatty():
        return
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report on loaded weights, above all
    datasets.disable_progress_bars()
