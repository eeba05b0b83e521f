"""What the server writes: its lines, and logged requests. Neither can fail a request."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import json_line

__all__ = ["RequestLog", "print_line", "steady"]


def steady(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that says a line as `say` does, but never raises.

    Nobody may read any more (`shiftrm serve | head`), or the disk is full; the server goes on.
    """

    def said(line: str) -> None:
        with suppress(Exception):
            say(line)

    return said


def print_line(line: str) -> None:
    """Print a line at once, if anybody reads; what the encoding lacks is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):
        try:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except BrokenPipeError:  # what is left in the buffer would be an error at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class RequestLog:
    """A file of requests and their rewards, as JSON lines; each is written whole or not at all.

    Args:
        failed: called with the reason for each line that could not be written.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, failed: Callable[[str], None] = lambda reason: None) -> None:
        self.path, self.failed = path, failed
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="logging")

    async def record(self, row: dict[str, Any]) -> None:
        """Write a request in a thread of its own."""
        row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **row}
        await asyncio.get_running_loop().run_in_executor(self._writer, self._write, row)

    def close(self) -> None:
        """Close the file after what waits is written."""
        self._writer.shutdown(wait=True)
        os.close(self._file)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            line = json_line(row).encode("utf-8")
            written = os.write(self._file, line)
            if written < len(line):  # the disk filled up: take the part back
                with suppress(OSError):
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                self.failed("No space left on device")
        except OSError as error:
            self.failed(error.strerror or type(error).__name__)
        except (ValueError, RecursionError) as error:
            self.failed(type(error).__name__)
