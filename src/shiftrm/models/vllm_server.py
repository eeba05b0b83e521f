"""Start a vLLM server for one policy, and stop it reliably."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.models.local_server import START_LIMIT, Starting, wait_until_ready
from shiftrm.models.sampling_vllm import VllmServer, connect

END_LIMIT = 30.0  # seconds between asking the server to stop and killing it
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_LIBC = ctypes.CDLL(None)  # loaded here, since a newly forked process should load nothing


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
        wait_until_ready(Starting("vllm serve", process, log, port=lambda: port, limit=start_limit))
        yield connect(f"http://127.0.0.1:{port}/v1", str(policy))
    finally:
        _end(process)
    log.unlink(missing_ok=True)


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
