"""The HTTP interface: routes, access, limits, and errors as one line of JSON."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shiftrm.errors import UserError, printable, suggest
from shiftrm.files import BEYOND_JSON
from shiftrm.models.loading import accelerator
from shiftrm.serve.batching import Batcher, BrokenModelError, Job
from shiftrm.serve.formats import FORMATS, Format, Question
from shiftrm.serve.metrics import Metrics
from shiftrm.serve.model import ServedModel
from shiftrm.serve.models import Models
from shiftrm.serve.output import RequestLog, steady
from shiftrm.serve.settings import TOKEN, Settings, token_matches

__all__ = ["VERSION_HEADER", "Service", "make_app"]

T = TypeVar("T")

VERSION_HEADER = "X-Model-Version"

ON_CPU, ON_ACCELERATOR = 2048, 8192
"""Tokens of a pass. On a CPU, larger ones leave its caches; an accelerator must be filled."""

GONE = 499
"""Status of a request whose client left, for the counters; nothing is sent."""

PLACES = (
    "/health",
    "/metrics",
    "/reload",
    "/v1/models",
    *(p for f in FORMATS.values() for p in f.paths),
)


class Refused(Exception):
    """Raised for a request that gets an error as its answer."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """What the routes share.

    Args:
        log: gets each request and its rewards, if requests are to be logged.
        say: called with a line for each new model and each unexpected error; may raise anything.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        *,
        log: RequestLog | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.models, self.settings, self.metrics = models, settings, Metrics()
        self.log, self.say = log, steady(say)
        self._unlogged: set[str] = set()
        if log is not None:
            log.failed = self._not_logged
        metrics = self.metrics
        models.changed = self._changed
        self._now(models.current)
        budget = settings.batch_tokens or (ON_CPU if accelerator() is None else ON_ACCELERATOR)
        self.batcher = Batcher(budget=budget, observe=metrics.observe_pass)
        # One thread reads, as tokenizers and templates are cached for one.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self.reading_since: float | None = None
        self.running = self.answered = 0
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: self.batcher.waiting)

    def close(self) -> None:
        """End the threads; jobs that wait are scored first."""
        while self.reading_since is not None and not self.stuck():
            time.sleep(0.05)
        self.reader.shutdown(wait=not self.stuck(), cancel_futures=True)
        self.batcher.close()

    def _not_logged(self, reason: str) -> None:
        self.metrics.unlogged.inc()
        if reason not in self._unlogged:
            self._unlogged.add(reason)
            self.say(f"requests are answered but not logged: {reason}")

    def _now(self, served: ServedModel) -> None:
        self.metrics.model.info({"name": served.name, "version": served.version})
        shared = "prefixes are shared"
        if served.obstacle is not None:
            shared = f"prefixes are not shared: {served.obstacle}"
        self.say(f"model {served.version} from {served.folder} ({shared})")

    def _changed(self, found: ServedModel | str) -> None:
        self.metrics.reloads.labels("failed" if isinstance(found, str) else "done").inc()
        if isinstance(found, str):
            self.say(f"the model stays as it is: {found}")
        else:
            self._now(found)

    # -- one request -------------------------------------------------------------------------

    async def answer(
        self, request: Request, act: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Run `act` within all limits; every error becomes an answer."""
        path, start = request.url.path, time.perf_counter()
        self.running += 1
        try:
            self._admit(request)
            response = await act(request)
        except Refused as error:
            response = error_response(error.status, error.message, error.headers)
        except UserError as error:
            response = error_response(400, str(error))
        except BrokenModelError as error:
            response = error_response(500, str(error))
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except TimeoutError:
            response = error_response(504, f"not done within {self.settings.timeout:g} s")
        except Exception as error:  # a bug: say where, but nothing of the request
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
            self.say(f"{path}: {type(error).__name__} at {where}")
            response = error_response(500, f"the server failed ({type(error).__name__})")
        finally:
            self.running -= 1
        self.answered += 1
        self.metrics.requests.labels(path, response.status_code).inc()
        self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
        return response

    def _admit(self, request: Request) -> None:
        token = self.settings.token
        if token and not token_matches(request.headers.get("authorization"), token):
            raise Refused(
                401,
                "the token is missing or wrong; send 'Authorization: Bearer ...' with the value "
                f"of {TOKEN}",
                WWW_Authenticate="Bearer",
            )
        if self.running > self.settings.max_requests:
            raise Refused(
                503,
                f"{self.settings.max_requests} requests are running; send this one again later",
                Retry_After="1",
            )

    async def body(self, request: Request) -> bytes:
        """Return the request's body.

        Raises:
            Refused: it is larger than allowed.
        """
        most = self.settings.max_bytes
        large = Refused(413, f"the request has more than {most} bytes; send fewer texts in each")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise large
        found = bytearray()
        async with asyncio.timeout(self.settings.timeout):
            async for chunk in request.stream():
                found += chunk
                if len(found) > most:
                    raise large
        return bytes(found)

    async def score(self, form: Format, request: Request) -> Response:
        """Read a request, wait for its rewards, and write them."""
        start = time.perf_counter()
        async with asyncio.timeout(self.settings.timeout):
            raw = await self.body(request)
            scored = asyncio.create_task(self._scored(raw, form))
            job, question, rewards = await _unless_gone(scored, request)
        answer = form.write(rewards, question, job.served)
        if self.log is not None:
            await self.log.record(
                {
                    "path": request.url.path,
                    "seconds": round(time.perf_counter() - start, 4),
                    "version": job.served.version,
                    "request": question.body,
                    "rewards": list(rewards),
                }
            )
        return json_response(200, answer, {VERSION_HEADER: job.served.version})

    async def _scored(self, raw: bytes, form: Format) -> tuple[Job, Question, list[float]]:
        """Read a request and wait for its rewards; cancelling drops it from where it waits."""
        loop = asyncio.get_running_loop()
        job, question = await loop.run_in_executor(self.reader, self._read, raw, form)
        self.metrics.given.inc(job.tokens)
        self.batcher.submit(job)
        return job, question, await asyncio.wrap_future(job.done)

    def _read(self, raw: bytes, form: Format) -> tuple[Job, Question]:
        served = self.models.current  # once: read and scored by one model
        self.reading_since = time.monotonic()
        try:
            question = form.read(parsed(raw), served)
        finally:
            self.reading_since = None
        return Job(served, question.sequences), question

    def stuck(self) -> str:
        """Return what is wrong if one request, which others wait for, is read without an end."""
        since = self.reading_since
        if since is None or time.monotonic() - since < 2 * self.settings.timeout:
            return ""
        return "a request is being read without an end; start the server anew"

    # -- the other routes --------------------------------------------------------------------

    async def reload(self, request: Request) -> Response:
        """Change the model; answers when the new one is in place."""
        if not self.settings.token:
            raise Refused(403, f"/reload needs a token; start the server with {TOKEN} set")
        path = parsed(await self.body(request)).get("model")
        if not isinstance(path, str) or not path or "\0" in path:
            raise UserError("'model' must name the folder of a reward model")
        served = await asyncio.to_thread(self.models.swap, path)
        return json_response(
            200,
            {"model": served.name, "version": served.version},
            {VERSION_HEADER: served.version},
        )

    def health(self) -> Response:
        """Return 200 if the server scores; 503 with the reason if its last pass failed or a request
        is read without an end."""
        served = self.models.current
        trouble = self.batcher.trouble if self.batcher.is_alive else "the scoring thread has ended"
        trouble = trouble or self.stuck()
        said = {"model": served.name, "version": served.version}
        if trouble:
            return json_response(503, {"status": "failing", "error": printable(trouble), **said})
        return json_response(200, {"status": "ok", **said})


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(service))
        yield
        watching.cancel()
        await asyncio.to_thread(service.close)

    # Its own pages would load scripts from elsewhere; docs/serve.md describes the interface.
    app = FastAPI(
        lifespan=life, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    def route(path: str, method: str, act: Callable[[Request], Awaitable[Response]]) -> None:
        async def respond(request: Request) -> Response:
            return await service.answer(request, act)

        app.add_api_route(path, respond, methods=[method])

    for form in FORMATS.values():
        for path in form.paths:
            route(path, "POST", partial(service.score, form))
    route("/reload", "POST", service.reload)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        return json_response(200, _model_list(service.models.current))

    route("/metrics", "GET", metrics)
    route("/v1/models", "GET", models)

    # without a token, and never refused: for what restarts servers
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return service.health()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            message = f"no such path{suggest(request.url.path, list(PLACES))}"
        else:
            message = f"{request.method} is not answered here ({error.detail})"
        return error_response(error.status_code, message, dict(error.headers or {}))

    return app


def _model_list(served: ServedModel) -> dict[str, Any]:
    card = {"id": served.name, "object": "model", "owned_by": "shiftrm", "version": served.version}
    return {"object": "list", "data": [{**card, "max_model_len": served.limit}]}


async def _watch(service: Service) -> None:
    """Follow a link to the model's folder."""
    trouble = ""
    while True:
        await asyncio.sleep(service.settings.poll)
        try:
            await asyncio.to_thread(service.models.follow_link)
            trouble = ""
        except Exception as error:  # the next look may succeed
            found = type(error).__name__
            if found != trouble:
                service.say(f"the link to the model cannot be followed ({found})")
            trouble = found


async def _unless_gone(work: asyncio.Task[T], request: Request) -> T:
    """Return the result of some work; cancel it if the client leaves or its time is over.

    Clients that give up would otherwise keep the server busy with answers that nobody reads.

    Raises:
        ClientDisconnect: the client has closed the connection.
    """
    # The body was read, so the end of the connection is all that can come.
    leaving: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        leaving.cancel()
        work.cancel()


def parsed(raw: bytes) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        UserError: it is not one.
    """
    try:
        body = json.loads(raw)
    except UnicodeDecodeError:
        raise UserError("the request is not UTF-8; send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"the request is not JSON ({error.msg} at character {error.pos}); send one JSON object"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"the request is {BEYOND_JSON}") from None
    if not isinstance(body, dict):
        raise UserError(f"the request is {type(body).__name__}; send one JSON object")
    return body


def json_response(
    status: int, content: dict[str, Any], headers: dict[str, str] | None = None
) -> Response:
    """Return an answer in ASCII, as lone surrogates have no UTF-8."""
    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error: `{"error": "one line"}`."""
    return json_response(status, {"error": printable(message)}, headers)
