"""Run the server: bind, load, answer until a signal, finish what runs, end."""

import importlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.progress import current
from shiftrm.serve.output import RequestLog, print_line, steady
from shiftrm.serve.settings import Settings, bound_socket

__all__ = ["require_packages", "run"]

LINES = 600.0
"""Seconds between lines of progress; a server runs for days."""

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def require_packages() -> None:
    """Check that the packages of the extra are there.

    Raises:
        UserError: one is missing.
    """
    try:
        for name in PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"serving needs the package {error.name}: pip install 'shiftrm[serve]'"
        ) from None


def run(
    model: str,
    settings: Settings,
    *,
    say: Callable[[str], None] = print_line,
    requests_log: Path | None = None,
) -> None:
    """Serve a reward model until SIGTERM or Ctrl-C; running requests are answered first.

    Args:
        say: called with a line for each event: start, change of the model, trouble, end.
        requests_log: a file for every request and its rewards, as JSON lines.

    Raises:
        UserError: a package is missing, the port is in use, or the model cannot be served.
    """
    require_packages()
    say = steady(say)
    with closing(bound_socket(settings)) as bound:
        stuck = _serve(model, settings, bound, say, requests_log)
    say("stopped")
    if stuck:  # Python would wait for the thread that reads without an end
        sys.stdout.flush()
        os._exit(0)


def _serve(
    model: str,
    settings: Settings,
    bound: socket.socket,
    say: Callable[[str], None],
    requests_log: Path | None,
) -> str:
    """Answer until a signal comes; return `Service.stuck` at that time."""
    from shiftrm.serve.app import Service, make_app
    from shiftrm.serve.listening import listen
    from shiftrm.serve.models import Models

    models = Models(model, max_length=settings.max_length)
    with ExitStack() as stack:
        log = None
        if requests_log is not None:
            log = stack.enter_context(closing(RequestLog(requests_log)))
        service = Service(models, settings, log=log, say=say)
        stack.callback(service.close)
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        stack.enter_context(_progress(lambda: service.answered))
        app = make_app(service)
        listen(app, settings, bound, lambda: say(f"serving at {address}"), say)
        return service.stuck()


@contextmanager
def _progress(answered: Callable[[], int]) -> Iterator[None]:
    """Report the number of answers, much less often than other commands do."""
    progress = current()
    if progress is None:
        yield
        return
    task = progress.begin("requests answered", None)
    progress.set_every(LINES)
    over = threading.Event()

    def count() -> None:
        while not over.wait(1.0):
            task.advance(answered())

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        progress.end(task)
