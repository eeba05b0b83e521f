"""The limits and addresses of a server, and the checks that need no model."""

import hmac
import ipaddress
import socket
from base64 import b64decode
from dataclasses import dataclass

from shiftrm.errors import UserError

__all__ = ["TOKEN", "Settings", "bound_socket", "token_matches"]

TOKEN = "SHIFTRM_TOKEN"
"""The environment variable that holds the token."""

LEAST_TOKEN = 8
"""Characters of a token; a shorter one is a mistake."""

LONGEST = 1e6
"""Seconds that a request may take, at most."""

BACKLOG = 2048
"""Connections that wait to be accepted."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        host, port: the address to listen at; port 0 takes a free one.
        token: what clients must send; "" for none, which allows only this machine and no `/reload`.
        batch_tokens: maximum tokens of a forward pass, padding included; None: as suits the device.
        max_length: maximum tokens of a sequence, if below the model's context.
        max_bytes: maximum size of a request.
        max_requests: maximum number of requests at one time.
        timeout: seconds a request may take, from its first to its last byte.
        poll: seconds between looks at a linked model folder.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    batch_tokens: int | None = None
    max_length: int | None = None
    max_bytes: int = 16 * 2**20
    max_requests: int = 1024
    timeout: float = 120.0
    poll: float = 1.0

    def __post_init__(self) -> None:
        token = self.token
        if token and (
            len(token) < LEAST_TOKEN
            or not token.isascii()
            or not token.isprintable()
            or " " in token
        ):
            raise UserError(
                f"{TOKEN} must have at least {LEAST_TOKEN} ASCII characters and no spaces; make "
                "one with `openssl rand -hex 16`"
            )
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port is {self.port}; it must be between 0 and 65535")
        if not 0 < self.timeout < LONGEST:
            raise UserError(f"--timeout is {self.timeout}; it must be between 0 and {LONGEST:g} s")
        if not token and not all(map(_is_local, _addresses(self.host, self.port))):
            raise UserError(
                f"--host {self.host} can be reached from other machines; set {TOKEN}, which "
                "clients must then send, or serve at 127.0.0.1"
            )


def _addresses(host: str, port: int) -> list[tuple[int, str]]:
    """Return the families and addresses of a host.

    Raises:
        UserError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host}: {said}; give an address of this machine") from None
    return [(int(family), str(address[0])) for family, _, _, _, address in found]


def _is_local(address: tuple[int, str]) -> bool:
    return ipaddress.ip_address(address[1].partition("%")[0]).is_loopback


def bound_socket(settings: Settings) -> socket.socket:
    """Return a socket bound to the address; it does not listen yet.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    family, address = _addresses(settings.host, settings.port)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, settings.port))
        # On Linux, another server can bind until somebody listens. Requests made while the model is
        # loaded wait.
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{settings.host}:{settings.port}: cannot listen there ({error.strerror}); choose "
            "another --port, or stop the server that has it"
        ) from None
    return bound


def token_matches(header: str | None, token: str) -> bool:
    """Whether an Authorization header holds the token: as Bearer, or as the password of Basic.

    Clients that take only an address send Basic: `http://any:TOKEN@host:8000/get_reward`. The
    comparison takes the same time for every wrong token.
    """
    kind, _, sent = (header or "").partition(" ")
    if kind.lower() == "basic":
        try:
            sent = b64decode(sent, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(sent.strip().encode("utf-8", "replace"), token.encode())
