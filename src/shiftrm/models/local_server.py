"""Wait until a server that this process has started answers, or say what it said instead."""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shiftrm.errors import UserError, printable

START_LIMIT = 3600.0
"""Seconds until a server must be ready: large models are loaded, compiled and warmed up first."""

SHOWN = 300
"""Characters of a log that an error shows."""


@dataclass(frozen=True)
class Starting:
    """A server that was started.

    Attributes:
        name: for messages, such as "vllm serve".
        log: the file that holds what it says.
        port: returns its port; None while it is not known.
        limit: seconds until it must be ready.
    """

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    port: Callable[[], int | None]
    host: str = "127.0.0.1"
    limit: float = START_LIMIT


def wait_until_ready(starting: Starting) -> int:
    """Return the server's port when it answers.

    Raises:
        UserError: it ended, or was not ready in time; the message has the last line of its log.
    """
    deadline, pause, log = time.monotonic() + starting.limit, 0.05, starting.log
    while True:
        status = starting.process.poll()
        if status is not None:
            raise UserError(
                f"{starting.name} ended with status {status} before it was ready: "
                f"{last_lines(log, 1)}; see {log}"
            )
        port = starting.port()
        if port is not None and healthy(port, starting.host):
            return port
        if time.monotonic() > deadline:
            raise UserError(
                f"{starting.name} was not ready after {starting.limit:g} seconds: "
                f"{last_lines(log, 1)}; see {log}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def healthy(port: int, host: str) -> bool:
    """Return whether /health answers; uses no proxy, since the server is local."""
    place = f"[{host}]" if ":" in host else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{place}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def last_lines(log: Path, count: int) -> str:
    """Return the last lines of a log in one line, safe to print."""
    with open(log, "rb") as handle:
        handle.seek(max(0, log.stat().st_size - 16384))
        lines = handle.read().decode("utf-8", "replace").splitlines()
    kept = [line.strip() for line in lines if line.strip()][-count:]
    return printable(" | ".join(kept))[-SHOWN:] or "it said nothing"
