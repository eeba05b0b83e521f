"""A client of the reward server, for TRL's `reward_funcs` and wherever a reward function is taken.

Needs the standard library only, unless it is given the policy's tokenizer.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shiftrm.errors import UserError, printable, shortened
from shiftrm.models.rendering import option_columns

if TYPE_CHECKING:
    from shiftrm.models.responses import Response

__all__ = ["RewardClient"]

TOKEN = "SHIFTRM_TOKEN"

AGAIN = (408, 429, 502, 503, 504)
"""Statuses after which the same request may succeed."""

LONGEST_PAUSE = 8.0
"""Seconds between two attempts, at most."""

RESCORINGS = 3
"""How often a call that met a change of the model is scored anew, to have one model's rewards."""


class RewardClient:
    """The rewards of a `shiftrm serve` server.

    >>> reward = RewardClient("http://127.0.0.1:8000", tokenizer=tokenizer)      # doctest: +SKIP
    >>> trainer = GRPOTrainer(model=policy, reward_funcs=[reward], ...)          # doctest: +SKIP

    All rewards of one call come from one model, also if the server changes it meanwhile.

    Args:
        url: the server's address.
        token: the server's token; by default the value of $SHIFTRM_TOKEN.
        tokenizer: the policy's. With it, a response is the exact text after the prompt, one that
            does not end with a stop token counts as cut off, and a reward model with the same
            tokenizer reads the sampled tokens. Without it, TRL's decoded text counts as finished.
        template_options: further options of the policy's chat template.
        timeout: seconds for each attempt.
        retries: attempts after the first on lost connections, time-outs and a busy server.
        batch_size: responses in one request.
        name: name of the rewards in TRL's logs.

    Attributes:
        version: of the model that scored the last call; "" before.
        swaps: how often the version changed between two calls.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        tokenizer: Any = None,
        template_options: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        batch_size: int = 256,
        name: str = "reward_server",
    ) -> None:
        self.url = _checked(url)
        self._token = os.environ.get(TOKEN, "") if token is None else token
        if not self._token.isascii() or not all(c.isprintable() for c in self._token):
            raise UserError(f"{TOKEN} holds characters that a token cannot have; set it again")
        self.tokenizer, self.template_options = tokenizer, dict(template_options or {})
        self.timeout, self.retries, self.batch_size = timeout, retries, batch_size
        self.__name__ = name
        self.version, self.swaps = "", 0
        local = urlsplit(self.url).hostname in ("127.0.0.1", "::1", "localhost")
        proxies = urllib.request.ProxyHandler({} if local else None)
        self._opener = urllib.request.build_opener(proxies)
        self._adapter: Any = None

    def __repr__(self) -> str:
        return f"RewardClient({self.url!r})"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        finished: Sequence[bool] | None = None,
        **others: Any,
    ) -> list[float]:
        """Return rewards as a reward function of TRL's GRPO and RLOO trainers, or as a `Scorer`.

        Args:
            prompts, completions: texts, or lists of chat messages.
            completion_ids: the sampled tokens; read with the tokenizer only.
            finished: False where a text was cut off. Default: all finished.
            others: what else the trainer passes; `log_metric` gets the number of model changes.

        Raises:
            UserError: the server cannot be reached or refuses the request.
        """
        if self.tokenizer is not None and completion_ids is not None:
            rewards = self._text_reward()(
                prompts=list(prompts), completion_ids=[list(ids) for ids in completion_ids]
            )
        else:
            ended = [True] * len(completions) if finished is None else finished
            rows = [
                {"prompt": prompt, "responses": [completion], "finished": [bool(end)]}
                for prompt, completion, end in zip(prompts, completions, ended, strict=True)
            ]
            rewards = self.score_rows(rows)
        log_metric = others.get("log_metric")
        if callable(log_metric):
            log_metric(f"{self.__name__}/swaps", float(self.swaps))
        return rewards

    def _text_reward(self) -> Any:
        if self._adapter is None:
            from shiftrm.policies.text_rewards import TextReward

            self._adapter = TextReward(self, self.tokenizer, self.template_options)
        return self._adapter

    def score(self, responses: "Sequence[Response]") -> list[float]:
        """Return rewards of responses, as `Scorer.score` does."""
        return self.score_rows([_row(response) for response in responses])

    def score_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the rewards of rows with one response each, in their order.

        Responses to one prompt go into one row of the request. If the model changes during the
        call, everything is scored anew.

        Raises:
            UserError: the server cannot be reached or refuses a request, or changes its model
                faster than the rows can be scored.
        """
        for _ in range(1 + RESCORINGS):
            found: dict[int, float] = {}
            versions = set()
            for numbers, grouped in _requests(rows, self.batch_size):
                answer = self.post("/score", {"rows": grouped})
                versions.add(str(answer.get("version")))
                rewards = _flat(answer, len(numbers), self.url)
                found |= dict(zip(numbers, rewards, strict=True))
            if len(versions) <= 1:
                for version in versions:
                    self.swaps += int(bool(self.version) and version != self.version)
                    self.version = version
                return [found[i] for i in range(len(rows))]
        raise UserError(
            f"{self.url}: changed its model during each of {1 + RESCORINGS} attempts to score one "
            "batch; reload less often, or score fewer responses at once"
        )

    def reload(self, folder: str) -> str:
        """Make the server load another model; return its version.

        Raises:
            UserError: the server cannot load it, and keeps the old one; or it has no token.
        """
        return str(self.post("/reload", {"model": str(folder)}, timeout=3600.0)["version"])

    # -- one request -------------------------------------------------------------------------

    def post(
        self, path: str, content: Mapping[str, Any], *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send JSON and return the answer's JSON; see `retries`.

        Raises:
            UserError: an error that remains, in one line.
        """
        request = urllib.request.Request(
            self.url + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        for attempt in range(self.retries + 1):
            again = attempt < self.retries
            try:
                with self._opener.open(request, timeout=timeout or self.timeout) as answer:
                    return self._parsed(answer.read())
            except urllib.error.HTTPError as error:
                said, pause = _said(error), _pause(error.headers.get("Retry-After"), attempt)
                status = error.code
                error.close()
                if status not in AGAIN or not again:
                    raise self._explained(status, said) from None
            except (OSError, HTTPException) as error:  # no connection, or lost
                if not again:
                    why = printable(str(getattr(error, "reason", error)) or type(error).__name__)
                    raise UserError(
                        f"{self.url}: cannot be reached ({shortened(why, 120)}); check the address "
                        "and that `shiftrm serve` runs"
                    ) from None
                pause = _pause(None, attempt)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.url}: does not answer as `shiftrm serve`; check the address")
        return found

    def _explained(self, status: int, said: str) -> UserError:
        if status in (401, 403):
            return UserError(f"{self.url}: refuses access (status {status}{said}); check {TOKEN}")
        if status < 500:
            return UserError(f"{self.url}: refuses the request (status {status}{said})")
        return UserError(f"{self.url}: fails (status {status}{said}); look at the server's output")


def _row(response: "Response") -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": response.prompt,
        "responses": [response.text],
        "finished": [response.finished],
    }
    if response.ids:
        row |= {"response_ids": [list(response.ids)], "tokenizer": response.tokenizer}
    return row | option_columns(response.template_options)


LISTS = ("responses", "finished", "response_ids")


def _requests(
    rows: Sequence[Mapping[str, Any]], most: int
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Yield the numbers of up to `most` rows, and those rows with equal prompts joined."""
    for start in range(0, len(rows), most):
        groups: dict[str, list[int]] = {}
        for number in range(start, min(start + most, len(rows))):
            row = rows[number]
            alike = {k: v for k, v in row.items() if k not in LISTS} | {"has": sorted(row)}
            groups.setdefault(json.dumps(alike, sort_keys=True), []).append(number)
        joined = []
        for numbers in groups.values():
            whole = dict(rows[numbers[0]])
            for key in LISTS:
                if key in whole:
                    whole[key] = [value for n in numbers for value in rows[n][key]]
            joined.append(whole)
        yield [n for numbers in groups.values() for n in numbers], joined


def _flat(answer: Mapping[str, Any], count: int, url: str) -> list[float]:
    try:
        rewards = [float(reward) for row in answer["rewards"] for reward in row]
    except (KeyError, TypeError, ValueError):
        rewards = []
    if len(rewards) != count:
        raise UserError(
            f"{url}: sent {len(rewards)} rewards for {count} responses; check the address"
        )
    return rewards


def _said(error: urllib.error.HTTPError) -> str:
    """Return `: the server's message`; "" without one."""
    try:
        message = json.loads(error.read(65536)).get("error")
    except (OSError, HTTPException, ValueError, AttributeError, RecursionError):
        return ""
    return f": {printable(shortened(message, 300))}" if isinstance(message, str) else ""


def _pause(after: str | None, attempt: int) -> float:
    """Return the seconds before the next attempt: as the server says, or 0.5, 1, 2, ..."""
    usual = min(0.5 * 2**attempt, LONGEST_PAUSE)
    return min(float(after), LONGEST_PAUSE) if after is not None and after.isdigit() else usual


def _checked(url: str) -> str:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url}: not an address; expected one like http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"the address of {parts.hostname} holds a user, a password or a query; give only the "
            f"address, and the token as ${TOKEN}"
        )
    return url.strip().rstrip("/")
