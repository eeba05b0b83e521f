"""ShareGPT: conversations of people with ChatGPT, to fine-tune on.

Columns read: `conversations`, a list of `{"from": "human" | "gpt" | "system", "value"}`. On the hub
it is one file of a data set that holds several (anon8231489123/ShareGPT_Vicuna_unfiltered).

Ours: turns of one speaker in a row become one message; what follows the last answer is cut off;
conversations that begin with an answer (continued parts of longer ones) are dropped, unless
`beginning=cut` cuts that answer off.
"""

from dataclasses import dataclass
from pathlib import Path

from shiftrm.data.dialogues import alternating
from shiftrm.data.loaded import Outcome, Outcomes, each, message, option
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.rendering import Messages

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


@dataclass(frozen=True)
class ShareGPTOptions:
    """Options of `read_sharegpt`.

    Raises:
        UserError: a value that there is not, on construction.
    """

    beginning: str = option(
        "drop", "of conversations that begin with an answer: drop (default) them, or cut it off"
    )
    file: str = option("", f"of a hub name: which file to read (default: {HUB_FILE})")

    def __post_init__(self) -> None:
        if self.beginning not in ("drop", "cut"):
            raise UserError(f"beginning is {self.beginning!r}; give 'drop' or 'cut'")


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
    if beginning == "cut":
        while messages and messages[0]["role"] == "assistant":
            messages = messages[1:]
    while messages and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        messages = messages[:-1]
    if turns and not messages:
        return "no_answer"
    alternate = alternating(messages)
    return alternate if isinstance(alternate, str) else {"messages": alternate}


def read_sharegpt(source: str, kind: str, split: str, options: ShareGPTOptions) -> Outcomes:
    """Outcomes of conversations; as prompts, what comes before the first answer."""
    if options.file and Path(source).exists():
        raise UserError(f"{source}: is here, so file={options.file} says nothing; leave it out")
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
    return {"prompt": messages[:first]}


def _turns(row: Row, where: str) -> list[tuple[str, str]]:
    """Speakers and texts; a turn without a text has an empty one."""
    require_columns(row, ("conversations",), where)
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise UserError(f"{where}: column 'conversations' is {turns!r:.40}; expected a list")
    found = []
    for number, turn in enumerate(turns, start=1):
        speaker, text = (
            (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        )
        if not isinstance(speaker, str) or not isinstance(text, str | None):
            raise UserError(
                f"{where}: conversations, turn {number} is {turn!r:.60}; expected an object with "
                "'from' and 'value'"
            )
        found.append((speaker.lower(), text or ""))
    return found
