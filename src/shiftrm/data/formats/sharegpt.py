"""ShareGPT: conversations with ChatGPT, to fine-tune on.

Columns read: `conversations`, a list of `{"from": "human" | "gpt" | "system", "value"}` (or
`conversation` or `messages`, of `{"role", "content"}`); `system` (or `system_prompt`), the system
prompt; `tools`. The data set on the hub (anon8231489123/ShareGPT_Vicuna_unfiltered) has several
files; one of them is read.

Ours: the text of `system` becomes a message before the first turn, unless the first turn has the
same text; consecutive turns of one speaker become one message; what follows the last answer is cut
off; conversations that begin with an answer (parts of longer ones) are dropped, unless
`beginning=cut` cuts that answer off.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.data.dialogues import alternating
from shiftrm.data.loaded import Options, Outcome, list_of, message, option, trimmed, wrong
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Messages, check_template_options
from shiftrm.models.templates import text_of

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
    """Options of ShareGPT."""

    beginning: str = option(
        "drop",
        "of conversations that begin with an answer: drop (default) them, or cut it off",
        choices=("drop", "cut"),
    )
    file: str = option("", f"of a hub name: which file to read (default: {HUB_FILE})")


def conversation(row: Row, where: str, *, beginning: str = "drop") -> Outcome:
    """Map one row to a demonstration `{"messages"}` that ends with an answer.

    Reasons: `unknown_speaker`, `no_answer`, and those of `dialogues.alternating`.
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


def sharegpt_rows(source: str, split: str, options: ShareGPTOptions) -> Iterable[tuple[str, Row]]:
    """Yield the rows of a local source, or of one file of a data set on the hub."""
    if options.file and Path(source).exists():
        raise UserError(f"{source}: is local, so file={options.file} has no effect; leave it out")
    file = options.file or (HUB_FILE if source == HUB_NAME else None)
    return iterate_rows(source, split=split, data_file=file)


def first_prompt(row: Row, where: str, *, beginning: str = "drop") -> Outcome:
    """Return what comes before a conversation's first answer as a prompt, or a reason."""
    outcome = conversation(row, where, beginning=beginning)
    if isinstance(outcome, str):
        return outcome
    messages = outcome["messages"]
    first = next(i for i, item in enumerate(messages) if item["role"] == "assistant")
    return {"prompt": messages[:first], **{c: outcome[c] for c in ("tools",) if c in outcome}}


def _system(row: Row, where: str) -> str:
    """Return the text of a row's system prompt; "" without one."""
    for column in SYSTEM:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise wrong(row, column, where, "text")
        if value and value.strip():
            return value
    return ""


def _turns(row: Row, where: str) -> list[tuple[str, str]]:
    """Return speakers and texts; the text of a turn without one is empty."""
    column = next((name for name in CONVERSATIONS if name in row), CONVERSATIONS[0])
    found = []
    for number, turn in enumerate(list_of(row, column, where), start=1):
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
        rows=sharegpt_rows,
        mappers={
            "demonstrations": lambda row, where, o: conversation(row, where, beginning=o.beginning),
            "prompts": lambda row, where, o: first_prompt(row, where, beginning=o.beginning),
        },
    )
)
