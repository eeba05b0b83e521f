"""`shiftrm serve` for one step of a run."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shiftrm.errors import UserError, printable
from shiftrm.models.vllm_server import healthy
from shiftrm.pipeline.children import running_child
from shiftrm.serve.settings import TOKEN, Settings

__all__ = ["check_server", "last_lines", "reward_server"]

START_LIMIT = 3600.0
"""Seconds until it must be ready; large models load slowly."""

SHOWN = 300
"""Characters of a log that an error shows."""

SERVING = re.compile(r"^serving at http://.*:(\d+)$", re.MULTILINE)


def check_server(host: str) -> None:
    """Check, before anything runs, that a server can be started at this address.

    Raises:
        UserError: a package is missing, there is no such host, or it needs a token.
    """
    from shiftrm.serve.server import require_packages

    require_packages()
    try:
        Settings(host=host, port=0, token=os.environ.get(TOKEN, ""))
    except UserError as error:
        raise UserError(str(error).replace("--host ", "execution.reward_host ")) from None


@contextmanager
def reward_server(
    model: str, *, log: Path, host: str = "127.0.0.1", devices: str = ""
) -> Iterator[str]:
    """Serve a reward model on a free port inside the block; yields the address.

    If the environment has `SHIFTRM_TOKEN`, the server demands it, and the address holds it as the
    password (HTTP Basic).

    Args:
        log: file for what the server says.
        host: the address to listen at, by which clients reach it.
        devices: CUDA_VISIBLE_DEVICES of the server, where not empty.

    Raises:
        UserError: the server ends, or is not ready in time; the message has its last lines.
    """
    words = [sys.executable, "-m", "shiftrm", "serve", "--model", model]
    words += ["--host", host, "--port", "0"]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
    with open(log, "wb") as output, running_child(words, env=environment, output=output) as server:
        port = _ready(server, log, host)
        token = os.environ.get(TOKEN, "")
        place = f"[{host}]" if ":" in host else host
        yield f"http://{f'shiftrm:{token}@' if token else ''}{place}:{port}"


def _ready(server: "subprocess.Popen[bytes]", log: Path, host: str) -> int:
    """Wait until the server answers; return its port."""
    deadline, pause, port = time.monotonic() + START_LIMIT, 0.05, None
    while True:
        ended = server.poll()
        if ended is not None:
            raise UserError(
                f"the reward server ended with status {ended}: {last_lines(log, 1)}; see {log}"
            )
        if port is None:
            found = SERVING.search(log.read_text(encoding="utf-8", errors="replace"))
            port = None if found is None else int(found[1])
        if port is not None and healthy(port, host):
            return port
        if time.monotonic() > deadline:
            raise UserError(f"the reward server was not ready in {START_LIMIT:g} s; see {log}")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def last_lines(log: Path, count: int) -> str:
    """Return the last lines of a log in one line, safe to print."""
    with open(log, "rb") as handle:
        handle.seek(max(0, log.stat().st_size - 16384))
        lines = handle.read().decode("utf-8", "replace").splitlines()
    kept = [line.strip() for line in lines if line.strip()][-count:]
    return printable(" | ".join(kept))[-SHOWN:] or "it said nothing"
