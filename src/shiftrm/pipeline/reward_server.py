"""`shiftrm serve` for one step of a run."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.models.local_server import Starting, wait_until_ready
from shiftrm.pipeline.children import running_child
from shiftrm.serve.settings import TOKEN, Settings

__all__ = ["check_server", "reward_server"]

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
        port = wait_until_ready(
            Starting("the reward server", server, log, port=lambda: _port(log), host=host)
        )
        token = os.environ.get(TOKEN, "")
        place = f"[{host}]" if ":" in host else host
        yield f"http://{f'shiftrm:{token}@' if token else ''}{place}:{port}"


def _port(log: Path) -> int | None:
    """Return the port that the server says it listens at; None while it has not."""
    found = SERVING.search(log.read_text(encoding="utf-8", errors="replace"))
    return None if found is None else int(found[1])
