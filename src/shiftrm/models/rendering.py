"""Convert text to tokens and back, in the same way for training, sampling and scoring.

A prompt is a string or a list of chat messages; a response is a string or a list of messages. A
string that answers a chat is the policy's exact text after the opening of its answer; messages are
rendered by the tokenizer's template. The tokens of a prompt (`encode_prompt`) are those that a
policy continues, and the tokens of a chat with its answer begin with them. A finished answer ends
with its stop token (`stop_token_ids`), an unfinished one with its last word.

`trl.RewardTrainer` produces the same tokens (tests compare them), except that this module omits
what a template writes after the closing token and does not double EOS. A lone surrogate, which JSON
can hold but tokenizers reject, is read as "?".
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, TypeVar
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
    "option_columns",
    "pin_template",
    "stop_token_ids",
    "template_options",
]

T = TypeVar("T")
R = TypeVar("R")

Messages = list[dict[str, str]]
Text = str | Messages

PINNED_DAY = datetime.datetime(2024, 7, 26)
"""The date given to templates that ask for today's date: Llama 3's own fallback."""


def is_conversational(text: Text | None) -> bool:
    """Whether this is a list of chat messages rather than a string."""
    return isinstance(text, list)


def check_text(text: Any, what: str) -> None:
    """Check that this is a string or a non-empty list of chat messages.

    Args:
        what: its name in error messages, with file and line if any.

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
        if message.get("content") is None and not message.get("tool_calls"):
            raise UserError(f"{what}, message {number} has no 'content'; expected text")
        try:
            text_of(message, number)
        except UserError as error:
            raise UserError(f"{what}, {error}") from None


NOT_FOR_TEMPLATES = frozenset(
    {
        "conversation", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""Arguments of `apply_chat_template` that are not handed to the template: they would replace it, or
change what is returned."""


def check_template_options(row: dict[str, Any], where: str) -> None:
    """Check a row's columns for the chat template.

    Raises:
        UserError: `tools` is not a list (or the JSON of one); `chat_template_kwargs` is not an
            object, or has one of `NOT_FOR_TEMPLATES`, such as another template.
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
    if taken := NOT_FOR_TEMPLATES & set(options or ()):
        raise UserError(
            f"{where}: 'chat_template_kwargs' has {min(taken)!r}, which is not an option of a "
            "template; leave it out"
        )


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """Return the chat template's options from the columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({} if tools is None else {"tools": tools}) | (row.get("chat_template_kwargs") or {})


def option_columns(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns from which `template_options` reads these options; none for none."""
    others = dict(options)
    tools = others.pop("tools", None)
    columns = {} if tools is None else {"tools": tools}
    return columns | ({"chat_template_kwargs": others} if others else {})


def encode(
    tokenizer: Any,
    prompt: Text | None,
    response: Text,
    *,
    finished: bool = True,
    template_options: dict[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt with its response, as the reward model sees it.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token (and a template, for chats).
        prompt: string or messages; None when the response holds the whole conversation.
        response: string (for a chat prompt: the assistant's text after the opening) or messages.
        finished: False for a response cut off by a length limit: it is not closed.
        template_options: further options of the chat template (`tools`, `chat_template_kwargs`).

    Returns:
        Token ids without padding. Those of a chat begin with `encode_prompt` of its prompt.

    Raises:
        UserError: a prompt or response is not text, a chat has no template or the template rejects
            it, or there is no EOS token to close a string.
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
    """Return the token ids a policy continues: the prompt and, for a chat, the answer's opening.

    A chat that ends with the assistant's words is continued after them.

    Args:
        template_options: as in `encode`.

    Raises:
        UserError: the prompt is not text, or a chat has no template or the template rejects it.
    """
    check_text(prompt, "prompt")
    if isinstance(prompt, list):
        return _plain_ids(tokenizer, opening_text(tokenizer, prompt, template_options or {}))
    return list(_last(_encode_string, tokenizer, prompt))


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the tokens that end an answer, in ascending order.

    They are the tokenizer's EOS, those of the policy's generation config, and the token that closes
    the assistant's turn in the chat template (`<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`, ...).

    Args:
        generation_config: the policy's, or None.

    Raises:
        UserError: the tokenizer has no EOS token, or the configuration names no token.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if isinstance(configured, str) or not isinstance(configured, Iterable):
        configured = [configured]
    try:
        configured = [index(token) for token in configured if token is not None]
    except TypeError:
        raise UserError(
            f"generation_config.json: eos_token_id is {generation_config.eos_token_id!r:.40}; "
            "expected the number of a token, or a list of them"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: set tokenizer.eos_token, then sample")
    named = [tokenizer.eos_token_id, turn(tokenizer).stop_id, *configured]
    found = {token for token in named if token is not None}
    return tuple(sorted(token for token in found if token >= 0))  # some configs use -1 for none


def decode_response(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    finished: bool | None = None,
) -> str:
    """Return the response's text, such that `prompt + text` reads as the sampled sequence.

    Special tokens inside the answer are kept. The one that ended it is removed, with those that the
    template writes before it. The response is decoded together with its prompt, since most
    tokenizers lose the space between them otherwise.

    Args:
        finished: whether the last token ended the response. None: if it is one of
            `stop_token_ids`.
    """
    response_ids = list(response_ids)
    if finished is None:
        finished = bool(response_ids) and response_ids[-1] in stop_token_ids(tokenizer)
    last = response_ids.pop() if finished else None
    whole = _decode(tokenizer, [*prompt_ids, *response_ids])
    opening = _last(_decode, tokenizer, list(prompt_ids))
    apart = not whole.startswith(opening)
    words = _decode(tokenizer, response_ids) if apart else whole[len(opening) :]
    ends = turn(tokenizer)
    if last is None or last != ends.stop_id or len(ends.closing) < 2:
        return words
    before = "".join(ends.closing[:-1])  # such as `<|im_end|>` where `<|im_end|><eos>` ends a turn
    return words.removesuffix(before.removeprefix(ends.lead))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pin_template(tokenizer: Any) -> None:
    """Make the chat template independent of today's date, in place.

    Some templates write today's date into the text (`strftime_now`), which would change rewards
    from day to day. Each such call is replaced by its text on `PINNED_DAY`. The template saved with
    the model then always renders the same.
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
    if isinstance(response, list) and not head:  # a whole conversation; its last turn is the answer
        head, response = response[:-1], response[-1:]
    if isinstance(response, list) and response[-1]["role"] != "assistant":  # no answer
        return _plain_ids(tokenizer, render(tokenizer, [*head, *response], options))
    # Tool results may come first: then no answer was opened.
    answers = isinstance(response, str) or response[0]["role"] == "assistant"
    opening = opening_text(tokenizer, head, options) if head and answers else ""
    ends = turn(tokenizer)
    if isinstance(response, str):
        words = str(encodable(response))
        if finished and ends.tail.strip():  # the text may already have its closing token
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
    """Return the closing tokens that the text does not yet end with."""
    for count in range(len(closing), 0, -1):
        if text.endswith("".join(closing[:count])):
            return "".join(closing[count:])
    return "".join(closing)


def _continued(tokenizer: Any, opening: str, text: str) -> list[int]:
    """Return the tokens of a text, beginning with its opening's tokens, as a policy continues."""
    ids = _plain_ids(tokenizer, text)
    first = _last(_plain_ids, tokenizer, opening) if opening else []
    if ids[: len(first)] == first:
        return ids
    return first + _plain_ids(tokenizer, text[len(opening) :])


_LAST: WeakKeyDictionary[Any, dict[Callable[..., Any], tuple[Any, Any]]] = WeakKeyDictionary()


def _last(function: Callable[[Any, T], R], tokenizer: Any, text: T) -> R:
    """Return `function(tokenizer, text)`, cached if it equals the last call.

    Responses to one prompt and the sides of a pair come one after another.
    """
    cache, key = _LAST.setdefault(tokenizer, {}), (text, len(tokenizer))
    if function not in cache or cache[function][0] != key:
        cache[function] = key, function(tokenizer, text)
    result: R = cache[function][1]
    return result


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_string(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text after the tokenizer's own prefix (BOS), which appears once.

    The tokenizer's own suffix is omitted: the caller decides whether to add EOS.
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
