"""Start a vLLM server for one policy, and stop it reliably."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.models.sampling_vllm import VllmServer, connect

START_LIMIT = 3600.0  # seconds: large models are loaded, compiled and warmed up first
END_LIMIT = 30.0  # seconds between asking the server to stop and killing it
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_LIBC = ctypes.CDLL(None)  # loaded here, since a newly forked process should load nothing
_SHOWN = 300  # characters of the log's last line that an error shows


def find_vllm() -> str:
    """Return the path of the `vllm` program; raise UserError if there is none."""
    beside = Path(sys.executable).with_name("vllm")
    found = shutil.which("vllm") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise UserError(
            "--vllm: vllm is not installed here; pip install 'shiftrm[vllm]', or give the address "
            "of a running server as --server"
        )
    return found


@contextmanager
def vllm_server(
    policy: str | Path,
    *,
    log: str | Path,
    arguments: Sequence[str] = (),
    start_limit: float = START_LIMIT,
) -> Iterator[VllmServer]:
    """Serve a policy on a free port of this machine inside the block.

    The model's generation config is ignored (`--generation-config vllm`). The log is deleted at the
    end, unless something failed.

    Args:
        log: file for the server's output.
        arguments: further options of `vllm serve`.
        start_limit: seconds until the server must be ready.

    Raises:
        UserError: vLLM is not installed, or the server stops or is not ready in time; the message
            has the last line of its log.
    """
    program, log, port = find_vllm(), Path(log), _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [program, "serve", str(policy), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", str(policy), "--generation-config", "vllm", *arguments]
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            command,
            stdout=handle,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its own group, to stop it with all its workers
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait_until_ready(process, port, log, start_limit)
        yield connect(f"http://127.0.0.1:{port}/v1", str(policy))
    finally:
        _end(process)
    log.unlink(missing_ok=True)


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log: Path, start_limit: float
) -> None:
    deadline = time.monotonic() + start_limit
    pause = 0.05
    while True:
        if process.poll() is not None:
            raise UserError(
                f"vllm serve ended with status {process.returncode} before it was ready: "
                f"{_last_line(log)}; see {log}"
            )
        if healthy(port):
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"vllm serve was not ready after {start_limit:g} seconds: {_last_line(log)}; "
                f"see {log}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def healthy(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether /health answers; uses no proxy, since the server is local."""
    place = f"[{host}]" if ":" in host else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{place}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: Path) -> str:
    """Return the last line of the log, safe to print."""
    with open(log, "rb") as handle:
        handle.seek(max(0, log.stat().st_size - 4096))
        lines = handle.read().decode("utf-8", "replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return "".join(c if c.isprintable() else " " for c in said)[-_SHOWN:]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, then kill what remains of it and its workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_LIMIT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    """Run in the child before exec: make it end with the thread that started it (Linux only), so
    that a killed command leaves no server on the GPU."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
