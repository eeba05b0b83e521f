"""The format of requests to an OpenAI-compatible server, and of its answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """One text from the server; None for what it did not send.

    Attributes:
        finish_reason: "stop", "length" (cut off), or another word of the server's.
        tokens_in, tokens_out: of the whole request, as the server counts.
        token_ids: of the text, with the closing token; only from vLLM, on request.
    """

    text: str
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dialect:
    """How one model takes its parameters.

    Attributes:
        completion_tokens: `max_completion_tokens` in place of `max_tokens`, as OpenAI's reasoning
            models require.
        own_temperature: no `temperature`, which those models also refuse.
    """

    completion_tokens: bool = False
    own_temperature: bool = False

    def after(self, refusal: str) -> "Dialect":
        """Return the dialect after the server has refused a request with this message."""
        words = refusal.lower()
        unsupported = any(word in words for word in ("unsupported", "not support", "instead"))
        other = unsupported and "max_tokens" in words and "max_completion_tokens" in words
        default = unsupported and "temperature" in words
        return Dialect(self.completion_tokens or other, self.own_temperature or default)

    def spoken(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters as this model takes them."""
        found = dict(parameters)
        if self.completion_tokens and "max_tokens" in found:
            limit = found.pop("max_tokens")
            found.setdefault("max_completion_tokens", limit)
        if self.own_temperature:
            found.pop("temperature", None)
        return found


def read_answers(body: Any) -> list[Completion] | None:
    """Return the texts of a completion or chat completion; None if the body is neither."""
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
        if not isinstance(message, dict) or not isinstance(message.get(key, 0), str | None):
            return None
        reason, index = choice.get("finish_reason"), choice.get("index")
        answer = Completion(
            message[key] or "",  # null: a refusal, or all tokens went into hidden reasoning
            reason if isinstance(reason, str) else None,
            _whole(counts.get("prompt_tokens")),
            _whole(counts.get("completion_tokens")),
            _whole_numbers(choice.get("token_ids")),
        )
        answers.append((index if isinstance(index, int) else position, answer))
    return [answer for _, answer in sorted(answers, key=lambda entry: entry[0])]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(_whole(number) is None for number in value):
        return None
    return tuple(value)
