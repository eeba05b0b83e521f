"""ShareGPT: conversations of people with ChatGPT, to fine-tune on.

Columns read: `conversations`, a list of `{"from": "human" | "gpt" | "system", "value"}` (or, as
others write it, `conversation` or `messages` of `{"role", "content"}`); `system` (or
`system_prompt`), what the conversation is under; `tools`. On the hub it is one file of a data set
that holds several (anon8231489123/ShareGPT_Vicuna_unfiltered).

Ours: the text of `system` becomes a message before the first turn, unless the first turn says the
same; turns of one speaker in a row become one message; what follows the last answer is cut off;
conversations that begin with an answer (continued parts of longer ones) are dropped, unless
`beginning=cut` cuts that answer off.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.data.dialogues import alternating
from shiftrm.data.loaded import Options, Outcome, Outcomes, each, message, option, trimmed
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import Messages, check_template_options
from shiftrm.models.templates import text_of

__all__ = ["HUB_NAME", "ShareGPTOptions", "conversation", "read_sharegpt"]

HUB_NAME = "anon8231489123/ShareGPT_Vicuna_unfiltered"
HUB_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


CONVERSATIONS = ("conversations", "conversation", "messages")
SYSTEM = ("system", "system_prompt")
KEYS = (("from", "value"), ("role", "content"))
"""Names of the same, the original ones first."""


@dataclass(frozen=True)
class ShareGPTOptions(Options):
    """Options of `read_sharegpt`."""

    beginning: str = option(
        "drop",
        "of conversations that begin with an answer: drop (default) them, or cut it off",
        choices=("drop", "cut"),
    )
    file: str = option("", f"of a hub name: which file to read (default: {HUB_FILE})")


def conversation(row: Row, where: str, *, beginning: str = "drop") -> Outcome:
    """Map one row to a demonstration `{"messages"}` that ends with an answer, or say why not.

    Reasons: `unknown_speaker`, `no_answer`, and those of `dialogues.alternating`.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    turns = _turns(row, where)
    if not all(speaker in ROLES for speaker, _ in turns):
        return "unknown_speaker"
    messages: Messages = [message(ROLES[speaker], text) for speaker, text in turns]
    if system := trimmed(_system(row, where)):
        first = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        if trimmed(first) != system:
            messages = [message("system", system), *messages]
    if beginning == "cut":
        start = 1 if messages and messages[0]["role"] == "system" else 0
        while messages[start:] and messages[start]["role"] == "assistant":
            messages = messages[:start] + messages[start + 1 :]
    while messages and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        messages = messages[:-1]
    if turns and not messages:
        return "no_answer"
    alternate = alternating(messages)
    if isinstance(alternate, str):
        return alternate
    check_template_options(row, where)
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    return {"messages": alternate, **({"tools": row["tools"]} if tools else {})}


def read_sharegpt(source: str, kind: str, split: str, options: ShareGPTOptions) -> Outcomes:
    """Outcomes of conversations; as prompts, what comes before the first answer."""
    if options.file and Path(source).exists():
        raise UserError(f"{source}: is local, so file={options.file} has no effect; leave it out")
    file = options.file or (HUB_FILE if source == HUB_NAME else None)
    rows = iterate_rows(source, split=split, data_file=file)
    outcomes = each(lambda row, where: conversation(row, where, beginning=options.beginning), rows)
    if kind == "demonstrations":
        return outcomes
    return ((where, _first_prompt(outcome)) for where, outcome in outcomes)


def _first_prompt(outcome: Outcome) -> Outcome:
    if isinstance(outcome, str):
        return outcome
    messages = outcome["messages"]
    first = next(i for i, item in enumerate(messages) if item["role"] == "assistant")
    return {"prompt": messages[:first], **{c: outcome[c] for c in ("tools",) if c in outcome}}


def _system(row: Row, where: str) -> str:
    """The text of a row's system prompt; "" without one."""
    for column in SYSTEM:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected text")
        if value and value.strip():
            return value
    return ""


def _turns(row: Row, where: str) -> list[tuple[str, str]]:
    """Speakers and texts; a turn without a text has an empty one."""
    column = next((name for name in CONVERSATIONS if name in row), CONVERSATIONS[0])
    require_columns(row, (column,), where)
    turns = row[column]
    if not isinstance(turns, list):
        raise UserError(f"{where}: column {column!r} is {turns!r:.40}; expected a list")
    found = []
    for number, turn in enumerate(turns, start=1):
        speaker, text = _speaker_and_text(turn) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str | list | None):
            raise UserError(
                f"{where}: {column}, turn {number} is {turn!r:.60}; expected an object with "
                "'from' and 'value', or 'role' and 'content'"
            )
        try:
            found.append((speaker.lower(), text_of({"content": text}, number)))
        except UserError as error:
            raise UserError(f"{where}: {column}, {error}") from None
    return found


def _speaker_and_text(turn: Row) -> tuple[Any, Any]:
    return next(((turn[who], turn.get(what)) for who, what in KEYS if who in turn), (None, None))


FORMATS.register("sharegpt")(
    Format(
        about="ShareGPT: conversations with ChatGPT, to fine-tune on",
        kinds=("demonstrations", "prompts"),
        hub=(HUB_NAME,),
        options=ShareGPTOptions,
        read=read_sharegpt,
    )
)
