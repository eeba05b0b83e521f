"""Text to tokens and back, in one way, for training, sampling and scoring.

A prompt is a string or a list of chat messages; a response is a string or a list of messages. A
string that answers a chat is what the policy says after the opening of its answer, to the letter;
messages are written by the tokenizer's template. The tokens of a prompt (`encode_prompt`) are those
that a policy continues, and the tokens of a chat with its answer begin with them. A finished answer
ends with the token that ended it (`stop_token_ids`), an unfinished one with its last word.

Of the same rows `trl.RewardTrainer` makes the same tokens (tests hold the two together), except
that what a template writes after the closing token is left out here, and that no EOS is doubled. A
lone surrogate, which JSON can hold and no tokenizer takes, is read as "?".
"""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from shiftrm.errors import UserError
from shiftrm.files import encodable
from shiftrm.models.templates import (
    answered_text,
    end_at_closing,
    opening_text,
    render,
    text_of,
    turn,
    unfinished_text,
)

__all__ = [
    "PINNED_DAY",
    "Messages",
    "Text",
    "check_template_options",
    "check_text",
    "decode_response",
    "encode",
    "encode_prompt",
    "end_at_closing",
    "is_conversational",
    "pin_template",
    "stop_token_ids",
    "template_options",
]

Messages = list[dict[str, str]]
Text = str | Messages

PINNED_DAY = datetime.datetime(2024, 7, 26)
"""The day that templates which ask for today's date are given: Llama 3's own fallback."""


def is_conversational(text: Text | None) -> bool:
    """Whether this is a list of chat messages rather than a string."""
    return isinstance(text, list)


def check_text(text: Any, what: str) -> None:
    """Refuse what is neither a string nor a non-empty list of chat messages.

    Args:
        what: how the message calls it, with file and line if there are any.

    Raises:
        UserError: another type, no messages, or a message without role or content. A message that
            calls tools needs no content.
    """
    if isinstance(text, str):
        return
    if not isinstance(text, list):
        raise UserError(f"{what} holds {type(text).__name__}; expected text or a list of messages")
    if not text:
        raise UserError(f"{what} is an empty list; a chat needs at least one message")
    for number, message in enumerate(text, start=1):
        if not isinstance(message, dict):
            raise UserError(
                f"{what}, message {number} is {type(message).__name__}; expected an object with "
                "'role' and 'content'"
            )
        if not isinstance(message.get("role"), str):
            raise UserError(f"{what}, message {number} has no 'role'; expected a name, as 'user'")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise UserError(f"{what}, message {number} has no 'content'; expected text")
        try:
            text_of(message, number)
        except UserError as error:
            raise UserError(f"{what}, {error}") from None


def check_template_options(row: dict[str, Any], where: str) -> None:
    """Refuse a row whose columns for the chat template are of another type.

    Raises:
        UserError: `tools` that are no list (or the JSON of one), `chat_template_kwargs` that are
            no object.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: column 'tools' is not valid JSON") from None
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", options, dict)):
        if value is not None and not isinstance(value, kind):
            expected = "a list" if kind is list else "an object"
            raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected {expected}")


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's columns `tools` and `chat_template_kwargs` say to the chat template."""
    tools = row.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }


def encode(
    tokenizer: Any,
    prompt: Text | None,
    response: Text,
    *,
    finished: bool = True,
    template_options: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt with its response, as the reward model sees it.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token (and a template, for chats).
        prompt: string or messages; None when the response holds the whole conversation.
        response: string (for a chat prompt: what the assistant says after the opening) or messages.
        finished: False for a response cut off by a length limit: it is not closed.
        template_options: what else the chat template takes (`tools`, `chat_template_kwargs`).

    Returns:
        Token ids without padding. Those of a chat begin with `encode_prompt` of its prompt.

    Raises:
        UserError: a prompt or response that is no text, a chat without a template or one that the
            template refuses, or no EOS token to close a string with.
    """
    if prompt is not None and prompt != []:
        check_text(prompt, "prompt")
    check_text(response, "response")
    if (is_conversational(prompt) and prompt) or is_conversational(response):
        return _encode_chat(tokenizer, prompt, response, finished, template_options or {})
    ids = _encode_string(tokenizer, f"{prompt or ''}{response}")
    if finished:
        if tokenizer.eos_token is None:
            raise UserError("tokenizer has no EOS token: set tokenizer.eos_token before rendering")
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    return ids


def encode_prompt(
    tokenizer: Any, prompt: Text, *, template_options: dict[str, Any] | None = None
) -> list[int]:
    """Token ids a policy continues: the prompt and, for a chat, the opening of its answer.

    A chat that ends with the assistant's words is continued after them.

    Args:
        template_options: as `encode`.

    Raises:
        UserError: the prompt is no text, or a chat without a template or one that it refuses.
    """
    check_text(prompt, "prompt")
    if isinstance(prompt, list):
        return _plain_ids(tokenizer, opening_text(tokenizer, prompt, template_options or {}))
    return _encode_string(tokenizer, prompt)


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """The tokens that end an answer, in ascending order; the one place that says so.

    The tokenizer's EOS, those of the policy's generation config, and the token with which the chat
    template closes the assistant's turn (`<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`, ...).

    Args:
        generation_config: the policy's, or None.

    Raises:
        UserError: the tokenizer has no EOS, with which to close a text.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is None or isinstance(configured, int):
        configured = [configured]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: set tokenizer.eos_token, then sample")
    named = [tokenizer.eos_token_id, turn(tokenizer).stop_id, *configured]
    found = {int(token) for token in named if token is not None}
    return tuple(sorted(token for token in found if token >= 0))  # some configs say -1 for none


def decode_response(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    finished: bool | None = None,
) -> str:
    """The response's text, such that `prompt + text` reads as the sampled sequence.

    Special tokens inside the answer stay; the one that ended it does not. Decoded together with its
    prompt, since decoding the response alone loses the space between the two with most tokenizers.

    Args:
        finished: whether the last token is the one that ended the response. None: if it is one of
            `stop_token_ids`.
    """
    response_ids = list(response_ids)
    if finished is None:
        finished = bool(response_ids) and response_ids[-1] in stop_token_ids(tokenizer)
    if finished:
        response_ids = response_ids[:-1]
    whole = _decode(tokenizer, [*prompt_ids, *response_ids])
    opening = _decode(tokenizer, list(prompt_ids))
    if whole.startswith(opening):
        return whole[len(opening) :]
    return _decode(tokenizer, response_ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pin_template(tokenizer: Any) -> None:
    """Make the chat template say the same on every day, in place.

    Some templates write today's date into the text (`strftime_now`), so that a response would have
    another reward tomorrow. Each such call becomes the text it gives on `PINNED_DAY`. Saved with
    the model, the template then renders the same for whoever loads it.
    """

    def pinned(template: str) -> str:
        return re.sub(
            r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
            lambda call: f'"{PINNED_DAY.strftime(call[2])}"',
            template,
        )

    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = pinned(template)
    elif isinstance(template, dict):
        tokenizer.chat_template = {name: pinned(text) for name, text in template.items()}


def _encode_chat(
    tokenizer: Any, prompt: Text | None, response: Text, finished: bool, options: dict[str, Any]
) -> list[int]:
    head: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
    head = head or list(prompt or [])
    if isinstance(response, list) and not head:  # a whole conversation: its last turn is the answer
        head, response = response[:-1], response[-1:]
    if isinstance(response, list) and response[-1]["role"] != "assistant":  # there is no answer
        return _plain_ids(tokenizer, render(tokenizer, [*head, *response], options))
    # Results of tools may stand first: then nothing was opened.
    answers = isinstance(response, str) or response[0]["role"] == "assistant"
    opening = opening_text(tokenizer, head, options) if head and answers else ""
    ends = turn(tokenizer)
    if isinstance(response, str):
        words = str(encodable(response))
        if finished and ends.tail.strip():  # a text that brings its closing token
            words = words.removesuffix(ends.tail)
        text = opening + words
    elif finished:
        text = answered_text(tokenizer, opening, head, response, options)
    else:
        text = unfinished_text(tokenizer, opening, head, response, options)
    if finished:
        missing = _missing(text, ends.closing)
        if isinstance(response, str) and ends.lead and words.endswith(ends.lead):
            missing = missing.removeprefix(ends.lead)  # the policy wrote it itself
        text += missing
    return _continued(tokenizer, opening, text)


def _missing(text: str, closing: Sequence[str]) -> str:
    """What of the closing tokens the text does not end with yet."""
    for count in range(len(closing), 0, -1):
        if text.endswith("".join(closing[:count])):
            return "".join(closing[count:])
    return "".join(closing)


def _continued(tokenizer: Any, opening: str, text: str) -> list[int]:
    """Tokens of a text, such that those of its opening stand first, as where a policy goes on."""
    ids = _plain_ids(tokenizer, text)
    first = _opening_ids(tokenizer, opening) if opening else []
    if ids[: len(first)] == first:
        return ids
    return first + _plain_ids(tokenizer, text[len(opening) :])


_LAST_OPENING: WeakKeyDictionary[Any, tuple[tuple[str, int], list[int]]] = WeakKeyDictionary()


def _opening_ids(tokenizer: Any, opening: str) -> list[int]:
    """Tokens of an opening; the last one is kept, as the sides of a pair share theirs."""
    key = (opening, len(tokenizer))
    if tokenizer not in _LAST_OPENING or _LAST_OPENING[tokenizer][0] != key:
        _LAST_OPENING[tokenizer] = key, _plain_ids(tokenizer, opening)
    return _LAST_OPENING[tokenizer][1]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_string(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, after those that the tokenizer puts before every text (BOS), once.

    What it puts behind every text is left out: whether an EOS belongs there, the caller knows.
    """
    text = encodable(text)
    ids = _plain_ids(tokenizer, text)
    if not tokenizer.num_special_tokens_to_add(pair=False):
        return ids
    probe = _plain_ids(tokenizer, "a")
    around = list(tokenizer("a")["input_ids"])
    places = [i for i in range(len(around)) if around[i : i + len(probe)] == probe]
    before = around[: places[0]] if probe and places else []
    return ids if before and ids[: len(before)] == before else before + ids
