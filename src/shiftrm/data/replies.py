"""The answers in groups of responses: each with its prompt, and the text that can be changed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shiftrm.data.loaded import no_text
from shiftrm.data.prompt_keys import prompt_key
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text
from shiftrm.models.responses import group_responses
from shiftrm.models.templates import text_of

ASSISTANT = "assistant"


class Answer(NamedTuple):
    """One response of a group.

    Attributes:
        key: the prompt, equal for equal prompts (`prompt_keys.prompt_key`).
        prompt, text, finished: as in a group.
        template_options: of the prompt, see `rendering.encode`.
    """

    key: str
    prompt: Text
    text: Text
    finished: bool
    template_options: Mapping[str, Any] = {}

    def under(self, other: "Answer") -> "Answer":
        """Return this answer under another one's prompt, with that prompt's template options."""
        return self._replace(prompt=other.prompt, template_options=other.template_options)


def has_prompt(row: Row) -> bool:
    """Whether a row's prompt is apart from its responses."""
    return row.get("prompt") is not None and row["prompt"] != []


def answers_of(groups: Sequence[Row]) -> list[Answer]:
    """Return every response that has a prompt of its own and is not blank, in order."""
    found = [
        Answer(
            prompt_key(row["prompt"]),
            row["prompt"],
            response.text,
            response.finished,
            response.template_options,
        )
        for row in groups
        if has_prompt(row)
        for response in group_responses(row)
    ]
    return [answer for answer in found if not no_text(answer.text)]


def reply(text: Text) -> str:
    """Return the words of a response: the string, or the text of the last assistant message.

    A message without text (a tool call, an image) gives "".
    """
    if isinstance(text, str):
        return text
    place = _place(text)
    try:
        return text_of(text[place], place + 1)
    except UserError:
        return ""


def normal_spaces(text: Text) -> Text:
    """Return the response with single spaces between words, to compare it with others."""
    if isinstance(text, str):
        return " ".join(text.split())
    words = " ".join(reply(text).split())
    return with_reply(text, words) if words else text


def with_reply(text: Text, words: str) -> Text:
    """Return the response with `words` in place of `reply(text)`."""
    if isinstance(text, str):
        return words
    place = _place(text)
    message = dict(text[place])
    parts = isinstance(message["content"], list)
    message["content"] = [{"type": "text", "text": words}] if parts else words  # type: ignore[assignment]
    return [*text[:place], message, *text[place + 1 :]]


def _place(messages: list[dict[str, str]]) -> int:
    """The index of the last assistant message; of the last one if there is none."""
    own = [i for i, message in enumerate(messages) if message.get("role") == ASSISTANT]
    return own[-1] if own else len(messages) - 1
