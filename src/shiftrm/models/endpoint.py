"""Send requests to an OpenAI-compatible server: a thin layer over the `openai` client.

The client does the HTTP, the timeouts and the retries with exponential back-off and Retry-After.
This module adds strict reading of answers, one-line errors, counts, and a key that is read from the
environment, sent to the server and shown nowhere else.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from shiftrm.errors import UserError, printable, suggest
from shiftrm.models.endpoint_format import Completion, Dialect, read_answers

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
PLACEHOLDER_KEY = "none"  # for servers that need no key; the client requires one

_NONSENSE_ATTEMPTS = 3  # for a broken body with status 200; see `_asked`
_LIST_TIMEOUT = 20.0  # seconds
_SECRET_LENGTH = 8  # a shorter "key" (`none`, `EMPTY`) may be a word of an answer
_SHOWN = 200  # maximum characters of a server's message in an error


class RefusedRequest(UserError):
    """Raised if the server works but refuses this request, for example because it is too long."""


@dataclass(frozen=True)
class EndpointConfig:
    """The server's address, and how long and how often to try.

    Attributes:
        base_url: the address up to and including `/v1`; the default is $OPENAI_BASE_URL, else
            OpenAI's.
        key_variable: the environment variable that holds the key, which is sent to `base_url`.
            Without a key, servers other than OpenAI's get a placeholder.
        timeout: seconds without a byte from the server, per attempt.
        max_retries: attempts after the first on 408, 409, 429, 5xx, timeouts and lost connections.
            The client waits 0.5 s, 1 s, 2 s, ... up to 8 s, or as long as Retry-After says.
        concurrency: concurrent requests in `map_bounded`.
    """

    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    max_retries: int = 6
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise UserError(f"timeout is {self.timeout}; it must be above 0 seconds")
        if self.max_retries < 0:
            raise UserError(f"max_retries is {self.max_retries}; it must be at least 0")
        if self.concurrency < 1:
            raise UserError(f"concurrency is {self.concurrency}; it must be at least 1")


class Endpoint:
    """A server with OpenAI's API. Threads may share it.

    >>> endpoint = Endpoint(EndpointConfig("http://localhost:8000/v1"))       # doctest: +SKIP
    >>> endpoint.chat("judge", [{"role": "user", "content": "Hello"}]).text   # doctest: +SKIP
    'Hello! How can I help?'

    Attributes:
        base_url: without a trailing slash.
        requests, retries: how many requests were sent, and how many retries.
    """

    def __init__(self, config: EndpointConfig | None = None) -> None:
        self.config = config or EndpointConfig()
        given = self.config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.base_url = _checked_url(given)
        key = os.environ.get(self.config.key_variable, "").strip()
        if not key and self.base_url == OPENAI:
            raise UserError(
                f"{OPENAI} needs a key: set the environment variable {self.config.key_variable}, "
                "or give the address of another server"
            )
        _check_key(key, self.config.key_variable)
        self._key = key
        self._lock = threading.Lock()
        self._dialects: dict[str, Dialect] = {}
        self.requests = self.retries = 0
        self._client = self._connect()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    def _connect(self) -> Any:
        try:
            import openai
        except ImportError:
            raise UserError(
                "requests to a server need the openai package: pip install 'shiftrm[judge]'"
            ) from None
        return openai.OpenAI(
            api_key=self._key or PLACEHOLDER_KEY,
            base_url=self.base_url,
            timeout=self.config.timeout,
            max_retries=self.config.max_retries,
        )

    # -- questions ---------------------------------------------------------------------------

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **parameters: Any
    ) -> Completion:
        """Return the server's reply to a conversation (`/chat/completions`).

        Args:
            parameters: sent as they are (`temperature`, `max_tokens`, ...), or as the model
                requires once it has refused them (`Dialect`).

        Raises:
            RefusedRequest: status 400, 413 or 422.
            UserError: any other error that remains after the retries.
        """
        create = self._client.chat.completions.with_raw_response.create
        asked = list(messages)
        while True:
            taken = self._dialects.get(model, Dialect()).spoken(parameters)
            send = partial(create, model=model, messages=asked, extra_body=taken)
            try:
                return self._asked(model, send)[0]
            except RefusedRequest as error:
                # Another attempt only where that changes the request, so this ends.
                if self._learn(model, str(error)).spoken(parameters) == taken:
                    raise

    def _learn(self, model: str, refusal: str) -> Dialect:
        """Return how this model takes its parameters; kept for the next requests."""
        with self._lock:
            before = self._dialects.get(model, Dialect())
            after = self._dialects[model] = before.after(refusal)
        if after.own_temperature and not before.own_temperature:
            logger.warning(
                "%s: %s takes no temperature, so its answers may differ from call to call",
                self.base_url,
                model,
            )
        return after

    def complete(
        self, model: str, prompt: str | Sequence[int], **parameters: Any
    ) -> list[Completion]:
        """Return continuations of a prompt (`/completions`), in the order of the server's indices.

        Args:
            prompt: text, or token ids for servers that take them (vLLM does).
            parameters: as in `chat`, with `n` for several continuations; also vLLM's own (`top_k`,
                `repetition_penalty`, ...).

        Raises:
            UserError: as `chat`.
        """
        create = self._client.completions.with_raw_response.create
        asked: Any = prompt if isinstance(prompt, str) else list(prompt)
        return self._asked(model, lambda: create(model=model, prompt=asked, extra_body=parameters))

    def models(self) -> list[str]:
        """Return the names of the server's models; raise UserError if it does not list them."""
        return [printable(card["id"]) for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """Return the server's descriptions of its models: `id`, with vLLM `root`, `max_model_len`.

        Raises:
            UserError: as `models`.
        """
        # A short timeout: this runs before the work starts and while an error is explained.
        patience = min(self.config.timeout, _LIST_TIMEOUT)
        client = self._client.with_options(max_retries=0, timeout=patience)
        body = self._body(client.models.with_raw_response.list)
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{self.base_url}: does not list its models")
        cards = [entry for entry in entries if isinstance(entry, dict)]
        return [card for card in cards if isinstance(card.get("id"), str)]

    def check(self, model: str) -> None:
        """Check early, with one request, that the server can be reached and accepts the key.

        A server that does not list its models passes, and so does a model that is not listed: some
        servers know more names than they list.

        Raises:
            UserError: the server cannot be reached, or refuses the key.
        """
        try:
            self.models()
        except _Fatal:
            raise
        except UserError:
            return

    # -- one request -------------------------------------------------------------------------

    def _asked(self, model: str, send: Callable[[], Any]) -> list[Completion]:
        """Send until the body is an answer; proxies send broken bodies with status 200."""
        for attempt in range(_NONSENSE_ATTEMPTS):
            if attempt:
                time.sleep(0.25 * 2**attempt)
                self._count(retries=1)
            answers = read_answers(self._body(send, model=model, again=attempt > 0))
            if answers is not None:
                return [self._redacted(answer) for answer in answers]
        raise UserError(
            f"{self.base_url}: answered {_NONSENSE_ATTEMPTS} times with something that is not "
            "a completion of OpenAI's API; check the address (it usually ends in /v1)"
        )

    def _body(
        self, send: Callable[[], Any], *, model: str | None = None, again: bool = False
    ) -> Any:
        """Return the JSON of one answer; None if it is not JSON."""
        import openai

        failure: UserError
        try:
            raw = send()
        except openai.APIError as error:
            self._count(requests=not again, retries=_retries_of(error))
            failure = self._explain(error, model)
        except openai.OpenAIError as error:
            failure = UserError(f"{self.base_url}: {self._safe(str(error))}")
        else:
            self._count(requests=not again, retries=raw.retries_taken)
            try:
                return json.loads(raw.http_response.content)
            except (ValueError, RecursionError):
                return None
        # Raised out here, so that no cause or context holds the request with its key.
        raise failure

    def _count(self, *, requests: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.retries += retries

    def _explain(self, error: Any, model: str | None) -> UserError:
        """Return the error as one line: what is wrong, where, and what to do."""
        import openai

        where, attempts = self.base_url, _retries_of(error) + 1
        variable = self.config.key_variable
        if isinstance(error, openai.APITimeoutError):
            return UserError(
                f"{where}: silent for {self.config.timeout:g} s in each of {attempts} attempts; "
                "allow more time or fewer requests at once"
            )
        if isinstance(error, openai.APIConnectionError):
            reason = self._safe(str(error.__cause__ or error))
            return _Fatal(
                f"{where}: cannot be reached ({reason}); check the address and that the server runs"
            )
        status = getattr(error, "status_code", None)
        said = self._said(error)
        if status in (401, 403):
            what = "the key" if self._key else f"requests without a key ({variable} is not set)"
            return _Fatal(f"{where}: refuses {what} (status {status}{said}); check {variable}")
        if status == 404:
            return UserError(f"{where}: {self._not_found(model)}")
        if status == 429:
            return UserError(
                f"{where}: still too many requests, or no quota left, after {attempts} attempts "
                f"(status 429{said}); send fewer at once, or run the same command again later"
            )
        if status in (400, 413, 422):
            return RefusedRequest(f"{where}: refuses the request (status {status}{said})")
        return UserError(f"{where}: fails (status {status}{said}); look at the server's log")

    def _not_found(self, model: str | None) -> str:
        if model is None:
            return "does not list its models (status 404)"
        try:
            names = self.models()
        except UserError:
            return (
                f"knows no model {model!r}, or the address is wrong (status 404): it usually ends "
                "in /v1"
            )
        if model in names:
            return f"lists the model {model!r} but does not answer with it here (status 404)"
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        near = suggest(model, names)
        return f"knows no model {model!r}; it has {shown or 'none'}" + (
            near if near.startswith("; did") else ""
        )

    def _said(self, error: Any) -> str:
        """Return `: the server's message`, safe to print; "" without a message."""
        body = getattr(error, "body", None)
        if isinstance(body, dict):  # OpenAI and vLLM say "message", plain FastAPI "detail"
            body = body.get("message") or body.get("detail")
        message = body
        if not isinstance(message, str) or not message.strip():
            return ""
        text = self._safe(message)
        return f": {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"

    def _safe(self, text: str) -> str:
        """Remove the key, which some servers repeat, and control characters."""
        return " ".join(printable(self._without_key(text)).split())

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _redacted(self, answer: Completion) -> Completion:
        if len(self._key) < _SECRET_LENGTH:
            return answer
        return replace(answer, text=self._without_key(answer.text))


class _Fatal(UserError):
    """An error that any other request would meet too: no connection, or a wrong key."""


def _retries_of(error: Any) -> int:
    """Return the number of retries before the client gave up, from its last request's header."""
    request = getattr(error, "request", None)
    count = getattr(request, "headers", {}).get("x-stainless-retry-count", "0")
    return int(count) if str(count).isdigit() else 0


def _checked_url(url: str) -> str:
    """Return the address without a trailing slash; refuse invalid ones and ones with secrets."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url}: not an address; expected one like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"the address of {parts.hostname} holds a user, a password or a query; give it up to "
            "/v1 only, and set the key in the environment"
        )
    return url.strip().rstrip("/")


def _check_key(key: str, variable: str) -> None:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{variable} holds characters that a key cannot have; set it again")
