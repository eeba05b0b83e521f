"""One writer at a time: a lock file beside the output, released when its process ends."""

import errno
import fcntl
import os
import shlex
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from shiftrm.errors import UserError

__all__ = ["exclusive", "hold", "holding"]

_MARK = "shiftrm: "
"""The first bytes of a lock file; a file that begins differently belongs to the user."""

_TRIES = 20

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without locks; there, no other writer is kept out."""


class _Holding:
    """The locks that one command holds until it ends."""

    def __init__(self, stack: ExitStack, command: str) -> None:
        self.stack, self.command = stack, command


_current: ContextVar[_Holding | None] = ContextVar("holding", default=None)


@contextmanager
def holding(words: Sequence[str]) -> Iterator[None]:
    """Release the locks that `hold` took inside the block when it ends.

    Args:
        words: the command's, for the message of another command that finds the lock taken.
    """
    with ExitStack() as stack:
        token = _current.set(_Holding(stack, shlex.join(["shiftrm", *words])))
        try:
            yield
        finally:
            _current.reset(token)


def hold(path: Path) -> None:
    """Prevent other commands from writing `path`, a file or a folder, until this command ends.

    The lock is the file `.NAME.lock` beside it. Does nothing outside `holding`, and in all but the
    first process of a command.

    Raises:
        UserError: another command holds the lock, or nothing can be written there.
    """
    current = _current.get()
    if current is None or os.environ.get("RANK", "0") != "0":
        return
    lock = path.with_name(f".{path.name}.lock")
    current.stack.enter_context(exclusive(lock, path, command=current.command))


@contextmanager
def exclusive(lock: Path, path: Path, *, command: str = "") -> Iterator[None]:
    """Hold a lock while `path` is written; missing parent folders are created.

    The lock is the operating system's: a process that died holds nothing, even if its file is left.
    The file and the folders made for it are removed at the end, unless something was written there.

    Args:
        lock: the file to lock.
        path: the path to show in messages.
        command: the command that holds the lock, for messages of others.

    Raises:
        UserError: another process holds it, a user's own file has its name, or nothing can be
            written there.
    """
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    try:
        descriptor = _locked(lock, path)
        try:
            with suppress(OSError):  # on a full disk the lock holds without its text
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _words(command), 0)
            yield
        finally:
            with suppress(OSError):  # the name first, while nobody else can hold the file
                os.unlink(lock)
            os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _locked(lock: Path, path: Path) -> int:
    """Return a file descriptor that holds the lock on the file of this name."""
    for _ in range(_TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(lock, flags, 0o666)
        except FileNotFoundError:  # its last holder has just removed the empty folder
            continue
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written there ({error.strerror}: {error.filename}); "
                "choose another output"
            ) from None
        try:
            _take(descriptor, lock, path)
            if _is_file(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the name between our two calls
    raise UserError(f"{path}: no lock file can be made beside it; choose another output")


def _take(descriptor: int, lock: Path, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{lock}: in the way, and not a lock of shiftrm; move it")
    said = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
    if said and not said.startswith(_MARK):
        raise UserError(f"{lock}: in the way, and not a lock of shiftrm; move it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return
        holder = said.removeprefix(_MARK).strip()
        raise UserError(
            f"{path}: another command is writing it{f' ({holder})' if holder else ''}; "
            "wait for it, or choose another output"
        ) from None


def _is_file(descriptor: int, lock: Path) -> bool:
    """Whether the locked file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _words(command: str) -> bytes:
    said = f"{_MARK}process {os.getpid()} on {socket.gethostname()}"
    return f"{said}: {command}\n".encode("utf-8", "replace") if command else f"{said}\n".encode()
