"""A judge on an OpenAI-compatible server. It sees both orders and never asks a question twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from shiftrm.concurrency import map_bounded
from shiftrm.errors import UserError
from shiftrm.measure.judges.cache import AnswerCache, question_key
from shiftrm.measure.judges.comparing import (
    Comparison,
    JudgeAnswer,
    Verdict,
    of_both_orders,
)
from shiftrm.measure.judges.questions import Template, parse_verdict
from shiftrm.models.endpoint import Completion, Endpoint, RefusedRequest
from shiftrm.progress import Advance

PARAMETERS: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}
"""Default parameters of a request; `max_tokens` leaves room for the reasoning."""

_CHARACTERS_A_TOKEN = 4  # OpenAI's rule of thumb for English
_TOKENS_A_MESSAGE = 4  # role and borders of a message, OpenAI's chat format
_GIVE_UP_AFTER = 10  # refusals without any answer: the prompts are not the cause


@dataclass(frozen=True)
class _Question:
    key: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class CostEstimate:
    """The requests that are still to be sent, and their estimated cost.

    Attributes:
        requests: number still to be sent; cached: number of answers in the cache.
        tokens_in: tokens of the requests; `counted` says how they were counted.
        tokens_out: tokens of the answers; `basis` says how they were estimated.
        cost: in the currency of the prices; None without prices.
    """

    requests: int
    cached: int
    tokens_in: int
    tokens_out: int
    counted: str
    basis: str
    cost: float | None = None

    def __str__(self) -> str:
        if not self.requests:
            return f"Nothing to ask: all {self.cached} answers are in the cache."
        cost = "" if self.cost is None else f"; about {self.cost:.3g} at the given prices"
        have = f" ({self.cached} answers are in the cache)" if self.cached else ""
        return (
            f"To ask: {self.requests} requests{have}, about {self.tokens_in} tokens in "
            f"({self.counted}) and {self.tokens_out} out ({self.basis}){cost}."
        )


class EndpointJudge:
    """Asks a chat model twice, once with each response first; a win needs both answers to agree.

    Identical responses are a tie, without a request. A request that the server refuses (for
    example, because it is too long) gives no outcome; if all are refused, that is an error.

    Args:
        model: its name on the server.
        parameters: override `PARAMETERS`; None removes one.
        cache: where answers are kept; by default in memory.
        max_requests: if more are needed, nothing is sent.

    Raises:
        UserError: parameters that cannot be written as JSON.

    Attributes:
        asked: number of answers from the server, not from the cache.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        template: Template,
        *,
        parameters: Mapping[str, Any] | None = None,
        cache: AnswerCache | None = None,
        max_requests: int | None = None,
    ) -> None:
        self.endpoint, self.model, self.template = endpoint, model, template
        both = {**PARAMETERS, **(parameters or {})}
        self.parameters = {name: value for name, value in both.items() if value is not None}
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"the parameters of requests cannot be sent ({error})") from None
        self.cache = cache if cache is not None else AnswerCache()
        self.max_requests = max_requests
        self.asked = 0
        self.name = f"{model} ({template.name})"

    def estimate(
        self,
        comparisons: Sequence[Comparison],
        *,
        price_in: float | None = None,
        price_out: float | None = None,
        tokenizer: Any = None,
    ) -> CostEstimate:
        """Estimate the requests that judging these comparisons would send.

        Args:
            price_in, price_out: price per million tokens.
            tokenizer: a Hugging Face tokenizer; by default, four characters count as a token.
        """
        asked = self._questions(comparisons)
        missing = [question for question in asked.values() if self.cache.get(question.key) is None]
        texts = [message["content"] for question in missing for message in question.messages]
        if tokenizer is None:
            inner = sum(map(len, texts)) / _CHARACTERS_A_TOKEN
            counted = f"counted as {_CHARACTERS_A_TOKEN} characters each"
        else:
            inner = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) if texts else 0
            counted = f"counted with {tokenizer.name_or_path or 'the given tokenizer'}"
        tokens_in = round(inner + _TOKENS_A_MESSAGE * len(texts))
        per_answer, basis = self._answer_length(asked)
        tokens_out = round(per_answer * len(missing))
        cost = None
        if price_in is not None or price_out is not None:
            cost = (tokens_in * (price_in or 0.0) + tokens_out * (price_out or 0.0)) / 1e6
        return CostEstimate(
            requests=len(missing),
            cached=len(asked) - len(missing),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            counted=counted,
            basis=basis,
            cost=cost,
        )

    def judge(
        self, comparisons: Sequence[Comparison], *, progress: Advance | None = None
    ) -> list[Verdict]:
        """See `Judge`; progress counts requests.

        Raises:
            UserError: more requests than `max_requests`, or the server fails despite retries.
                Answers received so far are in the cache, so the same call can be repeated.
        """
        asked = self._questions(comparisons)
        unique = {question.key: question for question in asked.values()}
        missing = [q for key, q in unique.items() if self.cache.get(key) is None]
        if self.max_requests is not None and len(missing) > self.max_requests:
            raise UserError(
                f"judging needs {len(missing)} requests, more than the limit of "
                f"{self.max_requests}; raise max_requests, or judge fewer prompts"
            )
        refused = self._ask_all(missing, len(unique), progress)
        return [
            self._verdict(comparison, asked, refused, index)
            for index, comparison in enumerate(comparisons)
        ]

    # -- asking ------------------------------------------------------------------------------

    def _questions(self, comparisons: Sequence[Comparison]) -> dict[tuple[int, bool], _Question]:
        """Return the questions by (index of the comparison, whether ours is response A)."""
        found = {}
        for index, comparison in enumerate(comparisons):
            if comparison.same_text:
                continue
            for ours_first in (True, False):
                messages = self.template.messages(comparison, ours_first=ours_first)
                key = question_key(
                    base_url=self.endpoint.base_url,
                    model=self.model,
                    messages=messages,
                    parameters=self.parameters,
                )
                found[index, ours_first] = _Question(key, messages)
        return found

    def _ask_all(
        self, missing: list[_Question], total: int, progress: Advance | None
    ) -> dict[str, str]:
        """Fill the cache; return the server's message for each refused request, by key."""
        refused: dict[str, str] = {}
        done = answered = total - len(missing)
        if missing:
            self.endpoint.check(self.model)
        results = map_bounded(self._ask, missing, concurrency=self.endpoint.config.concurrency)
        with closing(
            results
        ):  # Ctrl-C waits for requests in flight, so that their answers are kept
            for index, error in results:
                done += 1
                if error is None:
                    answered += 1
                    self.asked += 1
                else:
                    refused[missing[index].key] = str(error)
                    if not answered and len(refused) >= min(_GIVE_UP_AFTER, len(missing)):
                        raise error
                if progress is not None:
                    progress(done, total)
        return refused

    def _ask(self, question: _Question) -> RefusedRequest | None:
        # In the worker thread, so that the answer is saved whatever happens to the main thread.
        try:
            answer = self.endpoint.chat(self.model, question.messages, **self.parameters)
        except RefusedRequest as error:
            return error
        self.cache.add(question.key, answer, model=self.model)
        return None

    # -- reading -----------------------------------------------------------------------------

    def _verdict(
        self,
        comparison: Comparison,
        asked: Mapping[tuple[int, bool], _Question],
        refused: Mapping[str, str],
        index: int,
    ) -> Verdict:
        if comparison.same_text:
            return Verdict(comparison, "tie", note="identical")
        first, second = (
            self._read(asked[index, ours_first].key, refused) for ours_first in (True, False)
        )
        answers = (first, second)
        if first.letter is None or second.letter is None:
            problems = [answer.problem for answer in answers if answer.letter is None]
            return Verdict(comparison, None, answers, note="; ".join(dict.fromkeys(problems)))
        return Verdict(comparison, of_both_orders(first.letter, second.letter), answers)

    def _read(self, key: str, refused: Mapping[str, str]) -> JudgeAnswer:
        answer = self.cache.get(key)
        if answer is None:
            return JudgeAnswer(refused.get(key, ""), None, "refused by the server")
        letter, problem = parse_verdict(answer.text, answer.finish_reason)
        return JudgeAnswer(answer.text, letter, problem, answer.finish_reason)

    def _answer_length(self, asked: Mapping[Any, _Question]) -> tuple[float, str]:
        """Return the estimated tokens of an answer, and the basis of the estimate."""
        found: list[Completion] = []
        for question in asked.values():
            if (answer := self.cache.get(question.key)) is not None:
                found.append(answer)
        counts = [answer.tokens_out for answer in found if answer.tokens_out is not None]
        if counts:
            return sum(counts) / len(counts), f"the mean of {len(counts)} earlier answers"
        limits = [self.parameters.get(n) for n in ("max_tokens", "max_completion_tokens")]
        limit = next((value for value in limits if isinstance(value, int)), None)
        if limit is None:
            return 300.0, "300 an answer, a guess: there is no limit"
        return float(limit), "at most"


def approve(
    estimate: CostEstimate,
    *,
    limit: int,
    yes: bool,
    ask: Callable[[str], bool] | None,
) -> None:
    """Approve up to `limit` requests; above it, only with `yes` or after asking the user.

    Args:
        ask: asks the user a yes-no question; None without a terminal.

    Raises:
        UserError: not approved.
    """
    if yes or estimate.requests <= limit:
        return
    if ask is not None:
        if ask(f"{estimate.requests} requests are more than {limit}. Send them?"):
            return
        raise UserError("not sent; judge fewer prompts, or use a cache with more of the answers")
    raise UserError(
        f"{estimate.requests} requests are more than --max-requests {limit}; give --yes to send "
        "them, raise --max-requests, or judge fewer prompts (--limit)"
    )
