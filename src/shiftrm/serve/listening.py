"""The HTTP server under the application: connections, their limits, and signals."""

import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from shiftrm.serve.settings import Settings

__all__ = ["listen", "raise_open_files", "server_of"]

GRACE = 5
"""Seconds beyond the time-out of a request that stopping waits."""


def listen(
    app: Any,
    settings: Settings,
    bound: socket.socket,
    ready: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Answer until a signal comes; the running requests are answered first."""
    raise_open_files()
    asyncio.run(server_of(app, settings, ready, say).serve(sockets=[bound]))


def raise_open_files() -> None:
    """Allow as many open files, and so connections, as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def server_of(
    app: Any,
    settings: Settings,
    ready: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> uvicorn.Server:
    """Return uvicorn's server for an application."""
    # Its messages could hold parts of requests, and errors are answered by the application.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
    config = uvicorn.Config(
        app,
        http=_protocol(settings.timeout),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout) + GRACE,
    )
    return _Server(config, ready, say)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._say = ready, say
        self._said: set[str] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._trouble)
        await super().startup(sockets)
        self._ready()

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say each kind of trouble of the event loop once.

        Without free file descriptors, asyncio reports thousands of times a second that it cannot
        accept a connection.
        """
        error = context.get("exception")
        why = getattr(error, "strerror", None) or type(error).__name__
        where = "connections wait" if "accept" in str(context.get("message")) else "a connection"
        line = f"{where}: {why}"
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End with status 0 on a signal; uvicorn would raise it again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a limit on the time that a request's header may take.

    uvicorn has none: connections that send half a header would hold their file descriptors for
    ever.
    """

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _seen: Any = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def _look(self) -> None:
            """Close the connection if no request runs and none has begun since the last look."""
            cycle = self.cycle  # the latest request with its answer; None before the first header
            if cycle is self._seen and (cycle is None or cycle.response_complete):
                self.transport.abort()
                return
            self._seen = cycle
            self._timer = self.loop.call_later(seconds, self._look)

    return Protocol
