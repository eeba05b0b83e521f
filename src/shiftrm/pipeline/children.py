"""Child processes of a stage, which end when the stage's process ends, however that happens.

A training that continued after Ctrl-C or `kill -9` of the run would hold the accelerators and write
into the folder from which the next run continues.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

__all__ = ["end_children", "end_with_signal", "run_child", "running_child"]

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>

_CHILDREN: set[int] = set()
"""Process groups that are running."""


def run_child(command: Sequence[str], *, env: Mapping[str, str]) -> int:
    """Run a command in a process group of its own and return its status.

    Args:
        command: its output goes where this process's output goes; its input is empty.
    """
    with running_child(command, env=env) as process:
        return process.wait()


@contextlib.contextmanager
def running_child(
    command: Sequence[str], *, env: Mapping[str, str], output: IO[bytes] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command in a process group of its own, which ends with the block.

    Args:
        output: a file for what it says; by default that goes where this process's output goes.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=dict(env),
        start_new_session=True,  # a group of its own, to be ended with all it started
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    _CHILDREN.add(process.pid)
    try:
        yield process
    finally:
        _end(process.pid)  # what a launcher started and left behind, too
        process.wait()
        _CHILDREN.discard(process.pid)


def end_children() -> None:
    """Kill all running child processes and their children."""
    for group in list(_CHILDREN):
        _end(group)


def end_with_signal() -> None:
    """Make SIGTERM kill the child processes before this one."""

    def end(*_: object) -> None:
        end_children()
        sys.stdout.flush()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def _end_with_parent() -> None:
    """In the child: ask the kernel to kill it when the parent dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)  # every stage survives it, see the engine
