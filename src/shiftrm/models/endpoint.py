"""Questions to any OpenAI-compatible server: one thin layer over the `openai` client.

The client does the HTTP, the timeouts and the retries with exponential back-off and Retry-After;
this module adds what every user of a server here needs: bounded concurrency, strict reading of
answers, errors in one line, counts, and a key that is read from the environment, sent to the server
and shown nowhere else.
"""

import ipaddress
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

from shiftrm.concurrency import map_bounded
from shiftrm.errors import UserError, printable, suggest
from shiftrm.models.endpoint_dialect import Dialect

__all__ = ["Completion", "Endpoint", "EndpointConfig", "RefusedRequest", "map_bounded"]

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
PLACEHOLDER_KEY = "none"  # for servers that need no key; the client insists on one

_NONSENSE_ATTEMPTS = 3  # a 200 with a broken body is asked for again so often; see `_asked`
_LIST_TIMEOUT = 20.0  # seconds
_SECRET_LENGTH = 8  # a shorter "key" (`none`, `EMPTY`) is a word that answers may hold
_SHOWN = 200  # characters of a server's own message that an error repeats


class RefusedRequest(UserError):
    """The server works but will not answer this one request (too long for it, say)."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where the server is and how patiently to ask it.

    Attributes:
        base_url: the address up to and with `/v1`; the default is $OPENAI_BASE_URL, else OpenAI's.
        key_variable: the environment variable that holds the key. It is sent to `base_url`.
            Without one, local servers and all others but OpenAI's get a placeholder.
        timeout: seconds without a byte from the server, of one attempt.
        max_retries: attempts after the first on 408, 409, 429, 5xx, timeouts and lost connections.
            The client waits 0.5 s, 1 s, 2 s, ... up to 8 s, or what Retry-After says.
        concurrency: requests under way at one time in `map_bounded`.
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


@dataclass(frozen=True)
class Completion:
    """One text from the server; what it did not say is None.

    Attributes:
        finish_reason: "stop", "length" (cut off), or another word of the server's.
        tokens_in, tokens_out: of the whole request, as the server counts.
        token_ids: of the text, the closing token included; only from vLLM, when asked for them.
    """

    text: str
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    token_ids: tuple[int, ...] | None = None


class Endpoint:
    """A server that speaks OpenAI's API. Threads may share it.

    >>> endpoint = Endpoint(EndpointConfig("http://localhost:8000/v1"))       # doctest: +SKIP
    >>> endpoint.chat("judge", [{"role": "user", "content": "Hello"}]).text   # doctest: +SKIP
    'Hello! How can I help?'

    Attributes:
        base_url: without a trailing slash.
        requests, retries: how many were sent, and how many of these again; see `EndpointConfig`.
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
                "questions to a server need the openai package: pip install 'shiftrm[judge]'"
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
        """The server's reply to a conversation (`/chat/completions`).

        Args:
            parameters: written into the request as they are (`temperature`, `max_tokens`, ...),
                or as the model wants them once it has refused them (`Dialect`).

        Raises:
            RefusedRequest: status 400, 413 or 422.
            UserError: anything else that retries did not help.
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
        """How the server wants this model to be asked; kept for the next requests."""
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
        """Continuations of a prompt (`/completions`), in the order of the server's indices.

        Args:
            prompt: text, or token ids for servers that take them (vLLM does).
            parameters: as in `chat`; `n` continuations are asked for at once, and vLLM's own
                (`top_k`, `repetition_penalty`, ...) go here too.

        Raises:
            UserError: as `chat`.
        """
        create = self._client.completions.with_raw_response.create
        asked: Any = prompt if isinstance(prompt, str) else list(prompt)
        return self._asked(model, lambda: create(model=model, prompt=asked, extra_body=parameters))

    def models(self) -> list[str]:
        """The names of the server's models; raises UserError if it does not list them."""
        return [printable(card["id"]) for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """What the server says of its models: `id`, and from vLLM `root` and `max_model_len`.

        Raises:
            UserError: as `models`.
        """
        # Impatient: it is asked before the work and inside errors.
        patience = min(self.config.timeout, _LIST_TIMEOUT)
        client = self._client.with_options(max_retries=0, timeout=patience)
        body = self._body(client.models.with_raw_response.list)
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{self.base_url}: does not list its models")
        cards = [entry for entry in entries if isinstance(entry, dict)]
        return [card for card in cards if isinstance(card.get("id"), str)]

    def check(self, model: str) -> None:
        """Find out early, with one request, whether the server is there and takes the key.

        Servers that do not list their models pass, and so does a model that is not listed: some
        servers know more names than they list. The first question tells.

        Raises:
            UserError: nobody listens at the address, or the key is refused.
        """
        try:
            self.models()
        except _Fatal:
            raise
        except UserError:
            return

    # -- one request -------------------------------------------------------------------------

    def _asked(self, model: str, send: Callable[[], Any]) -> list[Completion]:
        """Send until the body is an answer; broken bodies with status 200 come from proxies."""
        for attempt in range(_NONSENSE_ATTEMPTS):
            if attempt:
                time.sleep(0.25 * 2**attempt)
                self._count(retries=1)
            answers = _read_answers(self._body(send, model=model, again=attempt > 0))
            if answers is not None:
                return [self._redacted(answer) for answer in answers]
        raise UserError(
            f"{self.base_url}: answered {_NONSENSE_ATTEMPTS} times with something that is no "
            "completion of OpenAI's API; check the address (it usually ends in /v1)"
        )

    def _body(
        self, send: Callable[[], Any], *, model: str | None = None, again: bool = False
    ) -> Any:
        """The JSON of one answer; None if it is not JSON."""
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
        """One line for a person: what, where, what to do."""
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
                f"(status 429{said}); ask fewer at once, or give the same command again later"
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
        """`: the server's own words`, safe to print; empty if it said nothing."""
        body = getattr(error, "body", None)
        if isinstance(body, dict):  # OpenAI and vLLM say "message", plain FastAPI "detail"
            body = body.get("message") or body.get("detail")
        message = body
        if not isinstance(message, str) or not message.strip():
            return ""
        text = self._safe(message)
        return f": {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"

    def _safe(self, text: str) -> str:
        """Without the key, which some servers repeat, and without control characters."""
        return " ".join(printable(self._without_key(text)).split())

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _redacted(self, answer: Completion) -> Completion:
        if len(self._key) < _SECRET_LENGTH:
            return answer
        return replace(answer, text=self._without_key(answer.text))


class _Fatal(UserError):
    """No other request would fare better: nobody is there, or the key is wrong."""


def _read_answers(body: Any) -> list[Completion] | None:
    """The texts of a completion or chat completion; None if it is neither."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        return None
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    answers: list[tuple[int, Completion]] = []
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict):
            return None
        message = choice.get("message", choice)
        key = "content" if "message" in choice else "text"
        if not isinstance(message, dict) or key not in message:
            return None
        text = message[key]
        if text is None:  # a refusal, or all tokens went into hidden reasoning
            text = ""
        if not isinstance(text, str):
            return None
        reason, index = choice.get("finish_reason"), choice.get("index")
        answers.append(
            (
                index if isinstance(index, int) else position,
                Completion(
                    text,
                    reason if isinstance(reason, str) else None,
                    _whole(counts.get("prompt_tokens")),
                    _whole(counts.get("completion_tokens")),
                    _whole_numbers(choice.get("token_ids")),
                ),
            )
        )
    return [answer for _, answer in sorted(answers, key=lambda entry: entry[0])]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(_whole(number) is None for number in value):
        return None
    return tuple(value)


def _retries_of(error: Any) -> int:
    """How often the client asked again before it gave up: the header of its last request."""
    request = getattr(error, "request", None)
    count = getattr(request, "headers", {}).get("x-stainless-retry-count", "0")
    return int(count) if str(count).isdigit() else 0


def _checked_url(url: str) -> str:
    """The address without a trailing slash; refused if it is none, or holds what may be secret."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url}: not an address; expected one like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"the address of {parts.hostname} holds a user, a password or a query; give it up to "
            "/v1 only, and the key in the environment"
        )
    return url.strip().rstrip("/")


def _check_key(key: str, variable: str) -> None:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{variable} holds characters that no key has; set it again")


def is_local(base_url: str) -> bool:
    """Whether the server is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
