"""Find what a chat template writes around an answer: its opening and the token that ends it.

Templates are programs, so this module renders a conversation with a marker as the answer and reads
the text before and after the marker. No other module renders chats.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from shiftrm.errors import UserError
from shiftrm.files import encodable

PACKAGED = Path(__file__).parent / "chat_templates"
"""This package's templates by name."""

Messages = list[dict[str, Any]]

MARKER = "shiftrm0answer0"
"""Placeholder for an answer; no template changes it (no spaces, no capitals, no markup)."""


@dataclass(frozen=True)
class Turn:
    """How a template ends an assistant's last turn.

    Attributes:
        tail: everything the template writes after the answer, such as `<|im_end|>` and a newline.
        closing: the tail up to and including the token that ends the answer, one text per token;
            only the tokenizer's EOS if the template writes no such token.
        stop_id: the id of that token; None if there is neither.
        lead: the part of the first text before its token, such as a newline.
    """

    tail: str
    closing: tuple[str, ...]
    stop_id: int | None
    lead: str = ""


def packaged(name: str) -> str:
    """Return the path of this package's template with that name, or the name unchanged."""
    path = PACKAGED / f"{name}.jinja"
    return str(path) if path.is_file() else name


def render(
    tokenizer: Any, messages: Messages, options: dict[str, Any], *, open_answer: bool = False
) -> str:
    """Render a conversation as text.

    Args:
        options: further options of the template (`tools`, `enable_thinking`, ...).
        open_answer: end with the opening of the assistant's answer.

    Raises:
        UserError: no template, a broken template, or one that rejects this chat; content that is
            not text; tool calls that the template omits.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the data is conversational but the tokenizer has no chat template: set "
            "tokenizer.chat_template (or --chat_template_path), or use plain strings"
        )
    plain = [_with_text(message, number) for number, message in enumerate(messages, start=1)]
    if _kept(tokenizer, "parts", _takes_parts_only):
        plain = [_in_parts(message) for message in plain]
    try:
        text = _apply(tokenizer, plain, options, open_answer=open_answer)
    except Exception as error:  # a template may raise anything
        problem = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the chat template cannot render this chat ({type(error).__name__}: {problem:.200}); "
            "check the roles and contents of its messages, or the template"
        ) from None
    for number, message in enumerate(messages, start=1):
        for name in _called(message):
            if name not in text:
                raise UserError(
                    f"message {number} calls the tool {name!r}, but the chat template leaves tool "
                    "calls out; use a template that writes them, or put them into the content"
                )
    return text


def opening_text(tokenizer: Any, prompt: Messages, options: dict[str, Any]) -> str:
    """Return the text a policy continues: the prompt and the opening of its answer.

    A prompt that ends with the assistant's words is continued, not closed.
    """
    if not is_begun(prompt):
        return render(tokenizer, prompt, options, open_answer=True)
    *before, begun = prompt
    words = text_of(begun, len(prompt))
    opening = render(tokenizer, before, options, open_answer=True) if before else ""
    written, _ = _around(tokenizer, [*before, {**begun, "content": MARKER}], options)
    return opening + between(opening, written, words) + words


EMPTY_THOUGHT = re.compile(r"(<think>)?\s*</think>\s*$")


def between(opening: str, written: str, words: str) -> str:
    """Return what a template writes between the policy's opening and the answer.

    Some templates write an empty thought there (`<think></think>`) if the answer has none.

    Args:
        written: the conversation up to the answer, rendered with the answer.
        words: the answer; an answer with its own reasoning gets no thought before it.
    """
    added = _added(opening, written)
    return EMPTY_THOUGHT.sub("", added) if "</think>" in words else added


def _added(opening: str, written: str) -> str:
    """Return what the whole conversation has after the opening; if it has another opening, at most
    a thought."""
    added = written[_common(opening, written) :]
    if written.startswith(opening) or EMPTY_THOUGHT.fullmatch(added):
        return added
    return ""


def is_begun(prompt: Messages) -> bool:
    """Whether a prompt ends with words of the assistant, which an answer continues."""
    return bool(prompt) and prompt[-1].get("role") == "assistant" and not _called(prompt[-1])


def answered_text(
    tokenizer: Any, opening: str, prompt: Messages, answer: Messages, options: Any
) -> str:
    """Render prompt and answer, without what the template writes after the last message's words.

    The text begins with the opening, also for templates that change the opening when the answer is
    present (for example those that drop an earlier `<think>`).

    Args:
        opening: `opening_text` of the prompt; "" without an answer.
    """
    if is_begun(prompt) and opening:
        return opening + _continuation(tokenizer, prompt, answer, options)
    whole = _without_tail(tokenizer, render(tokenizer, [*prompt, *answer], options))
    if whole.startswith(opening):
        return whole
    # Not the common prefix: the answer itself may begin as the opening continues.
    written, _ = _around(tokenizer, [*prompt, {**answer[0], "content": MARKER}], options)
    return opening + whole[len(written) - len(_added(opening, written)) :]


def _continuation(tokenizer: Any, prompt: Messages, answer: Messages, options: Any) -> str:
    """Render messages after a begun answer; the first message continues it exactly."""
    first, *rest = answer
    words = text_of(first, len(prompt) + 1)
    if not rest and not _called(first):
        return words
    marked = [*prompt[:-1], {**first, "content": MARKER}, *rest]
    return words + _without_tail(tokenizer, render(tokenizer, marked, options)).partition(MARKER)[2]


def _without_tail(tokenizer: Any, text: str) -> str:
    return text.removesuffix(turn(tokenizer).tail)


def unfinished_text(
    tokenizer: Any, opening: str, prompt: Messages, answer: Messages, options: Any
) -> str:
    """Render prompt and answer when the last message was cut off; the text ends with its words.

    Args:
        opening: as in `answered_text`.
    """
    *before, last = answer
    words = text_of(last, len(prompt) + len(answer))
    cut = {**last, "content": MARKER}
    if is_begun(prompt) and opening:
        if not before:
            return opening + words
        written = opening + _continuation(tokenizer, prompt, [*before, cut], options)
        return written.rpartition(MARKER)[0] + words
    written, _ = _around(tokenizer, [*prompt, *before, cut], options)
    return opening + between(opening, written, words) + words


def text_of(message: dict[str, Any], number: int) -> str:
    """Return a message's content as text, with parts joined; "" if it only calls tools.

    Raises:
        UserError: the content is neither text nor a list of parts, or a part is not text, such as
            an image.
    """
    content = message.get("content")
    if isinstance(content, str):
        return str(encodable(content))
    if content is not None and not isinstance(content, list):
        raise UserError(
            f"message {number} has 'content' of type {type(content).__name__}; expected text"
        )
    return "".join(str(encodable(part["text"])) for part in _text_parts(content, number))


def _text_parts(content: Any, number: int) -> list[dict[str, Any]]:
    parts = content or []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"message {number} holds a part of type {kind!r}; only text can be read "
                '({"type": "text", "text": ...})'
            )
    return list(parts)


def turn(tokenizer: Any) -> Turn:
    """Return how this tokenizer's template ends an answer; EOS without a template."""
    return _kept(tokenizer, "turn", _read_turn)


_KEPT: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _kept(tokenizer: Any, what: str, read: Callable[[Any], Any]) -> Any:
    """Return `read(tokenizer)`, cached for each template and EOS of the tokenizer."""
    found = _KEPT.setdefault(tokenizer, {})
    key = (what, str(tokenizer.chat_template), tokenizer.eos_token)
    if key not in found:
        found[key] = read(tokenizer)
    return found[key]


def _read_turn(tokenizer: Any) -> Turn:
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    by_eos = Turn("", () if eos is None else (eos,), eos_id)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
    tail = _after(tokenizer, chat)
    if tail is None:  # some templates need a system message, others reject one
        chat = [{"role": "system", "content": "a"}, *chat]
        tail = _after(tokenizer, chat)
    if tail is None:
        return by_eos
    lead, closing = _closing(tokenizer, tail)
    if not closing and not tail.strip():  # the next turn's opening ends this one, as in GLM
        further = _after(tokenizer, [*chat, {"role": "user", "content": "a"}]) or ""
        lead, closing = _closing(tokenizer, further)
        closing = [] if lead.strip() else closing[:1]  # after words it ends the next turn
        if closing and closing[0][1] == tokenizer.bos_token:  # BOS does not end a text
            closing = []
    if not closing:
        return Turn(tail, by_eos.closing, eos_id)
    texts = (lead + closing[0][1], *(text for _, text in closing[1:]))
    return Turn(tail, texts, closing[-1][0], lead)


def _after(tokenizer: Any, chat: Messages) -> str | None:
    """Return what the template writes after the marker; None if it rejects the chat."""
    try:
        return _around(tokenizer, chat, {})[1]
    except UserError:
        return None


def _closing(tokenizer: Any, tail: str) -> tuple[str, list[tuple[int, str]]]:
    """Return the text before the first run of special tokens in a tail, and the run, up to an EOS.

    A token counts only if its text is in the tail, so the unknown token does not.
    """
    special = special_ids(tokenizer)
    found: list[tuple[int, str]] = []
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        text = tokenizer.convert_ids_to_tokens(token)
        if token in special and text in tail:
            found.append((token, text))
            if token == tokenizer.eos_token_id:  # nothing follows EOS
                break
        elif found:
            break
    return (tail.partition(found[0][1])[0] if found else ""), found


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of special and added tokens."""
    return frozenset(tokenizer.all_special_ids) | frozenset(
        getattr(tokenizer, "added_tokens_decoder", {})
    )


def end_at_closing(tokenizer: Any) -> None:
    """Make the chat template end a finished answer with its closing token, in place.

    Our rendering ends there. Other programs (TRL, vLLM, transformers) then get the same tokens from
    the template saved with a reward model. Otherwise they would read the reward at the newline that
    ChatML writes after `<|im_end|>`, or find no closing token. A template that already ends so is
    not changed; otherwise only `{% generation %}` marks are also removed.
    """
    ends = turn(tokenizer)
    if ends.tail == "".join(ends.closing):
        return
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = _closed(template, ends)
    elif isinstance(template, dict):
        tokenizer.chat_template = {name: _closed(text, ends) for name, text in template.items()}


GENERATION = re.compile(r"{%([-+]?)\s*(end)?generation\s*([-+]?)%}")


def _closed(template: str, ends: Turn) -> str:
    closing = "".join(ends.closing)
    # Inside a block, transformers computes the positions of these marks wrongly, so remove them.
    template = GENERATION.sub(
        lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template
    )
    kept = template.removesuffix("\n")  # jinja also drops the last newline of a source
    cut = f"shiftrm_text[:{-len(ends.tail)}]" if ends.tail else "shiftrm_text"
    return (
        "{% set shiftrm_text %}{{ '' }}" + kept + "{{ '' }}{% endset %}"
        "{% if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' "
        f"and shiftrm_text.endswith({ends.tail!r}) %}}"
        f"{{{{ {cut} + {closing!r} }}}}"
        "{% else %}{{ shiftrm_text }}{% endif %}"
    )


def _around(tokenizer: Any, messages: Messages, options: dict[str, Any]) -> tuple[str, str]:
    """Return the text before and after the marker.

    Raises:
        UserError: the template does not write the marker.
    """
    text = render(tokenizer, messages, options)
    before, found, after = text.rpartition(MARKER)
    if not found:
        raise UserError("the chat template does not write the assistant's answers")
    return before, after


def _with_text(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the message with its content as one text; null stays if the message only calls tools.

    Other null fields are removed: tables give every message the fields of all others, and templates
    test whether a field exists.
    """
    given = {field: value for field, value in message.items() if value is not None}
    content = message.get("content")
    return {**given, "content": None if content is None else text_of(message, number)}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _called(message: dict[str, Any]) -> Sequence[str]:
    """Return the names of the tools that a message calls."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return ()
    functions = [call.get("function") or call for call in calls if isinstance(call, dict)]
    names = [f.get("name") for f in functions if isinstance(f, dict)]
    return [name for name in names if isinstance(name, str)]


def _takes_parts_only(tokenizer: Any) -> bool:
    """Whether a template needs content as a list of parts, and loses or rejects a string."""

    def writes(content: Any) -> bool:
        chat = [{"role": "user", "content": content}]
        try:
            return MARKER in _apply(tokenizer, chat, {}, open_answer=True)
        except Exception:  # as in `render`
            return False

    return not writes(MARKER) and writes([{"type": "text", "text": MARKER}])


def _apply(
    tokenizer: Any, messages: Messages, options: dict[str, Any], *, open_answer: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            encodable(messages), tokenize=False, add_generation_prompt=open_answer, **options
        )
    )


def _common(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
