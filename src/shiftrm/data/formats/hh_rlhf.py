r"""Anthropic's HH-RLHF (Anthropic/hh-rlhf): dialogues of which people preferred one ending.

Columns read: `chosen`, `rejected`, whole transcripts of turns "\n\nHuman: " and "\n\nAssistant: ".
The subsets are folders with `train.jsonl.gz` and `test.jsonl.gz`.

What the data set does not say, and we do:

- the prompt ends at the last "\n\nAssistant: " up to which both transcripts agree. Where they part
  at an assistant's turn this is that turn; where they part earlier, at a human turn (the two sides
  are then different dialogues), each side keeps the rest of its dialogue as several messages, which
  `responses=single` drops instead (`several_turns`);
- a marker is a blank line, the speaker, a colon, and a space, a line break or the end of the
  transcript: `"\n\nHuman:"` inside quotation marks is not a turn;
- turns of one speaker in a row become one message, with a blank line between them;
- white space at a message's ends is cut off, and only there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shiftrm.data.dialogues import alternating, last_answer, parted
from shiftrm.data.folders import SUFFIXES
from shiftrm.data.loaded import (
    KINDS,
    Options,
    Outcome,
    Outcomes,
    each,
    message,
    option,
    prompts_of,
    text_of,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.models.rendering import Messages

__all__ = [
    "HUB_NAME",
    "SUBSETS",
    "Turn",
    "hh_pair",
    "join_turns",
    "parse_transcript",
    "read_hh",
    "transcript_messages",
]

HUB_NAME = "Anthropic/hh-rlhf"

SUBSETS: dict[str, tuple[str, ...]] = {
    "helpful": ("helpful-base", "helpful-online", "helpful-rejection-sampled"),
    "harmless": ("harmless-base",),
    "all": ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"),
}
"""Names for several folders; each folder name is also a subset."""

RED_TEAM = "red-team-attempts"

MARKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):(?: |(?=\s)|\Z)")

ROLES = {"Human": "user", "Assistant": "assistant"}


class Turn(NamedTuple):
    """One turn as it stands in a transcript; text before the first marker has speaker ""."""

    marker: str
    speaker: str
    text: str


def parse_transcript(transcript: str) -> list[Turn]:
    """Cut a transcript at its markers; `join_turns` gives it back, byte for byte."""
    turns: list[Turn] = []
    marker, speaker, start = "", "", 0
    for match in MARKER.finditer(transcript):
        if match.start() > start or speaker:
            turns.append(Turn(marker, speaker, transcript[start : match.start()]))
        marker, speaker, start = match[0], match[1], match.end()
    if speaker or transcript:
        turns.append(Turn(marker, speaker, transcript[start:]))
    return turns


def join_turns(turns: Iterable[Turn]) -> str:
    """The transcript that `parse_transcript` has cut."""
    return "".join(turn.marker + turn.text for turn in turns)


def transcript_messages(transcript: str) -> Messages | str:
    """Chat messages that alternate, first the user's and last the assistant's; or why not.

    Reasons: `no_transcript` (empty, or text before the first marker), `ends_with_human`, and those
    of `dialogues.alternating`.
    """
    turns = parse_transcript(transcript)
    if not turns or not turns[0].speaker:
        return "no_transcript"
    messages = alternating([message(ROLES[turn.speaker], turn.text) for turn in turns])
    if not isinstance(messages, str) and messages[-1]["role"] != "assistant":
        return "ends_with_human"
    return messages


def hh_pair(row: Row, where: str, *, responses: str = "any") -> Outcome:
    """Map one row to a conversational preference row, or say why not.

    Reasons: those of `transcript_messages` and `dialogues.parted`.

    Raises:
        UserError: a missing column or one that is not text.
    """
    sides = []
    for column in ("chosen", "rejected"):
        messages = transcript_messages(text_of(row, column, where))
        if isinstance(messages, str):
            return messages
        sides.append(messages)
    return parted(*sides, responses=responses)


def hh_demonstration(row: Row, where: str) -> Outcome:
    """The preferred dialogue's last turn as a demonstration, or the reason why not."""
    messages = transcript_messages(text_of(row, "chosen", where))
    return messages if isinstance(messages, str) else last_answer(messages)


@dataclass(frozen=True)
class HHOptions(Options):
    """Options of `read_hh`."""

    subset: str = option(
        "",
        "of a folder or hub name: helpful-base, helpful-online, helpful-rejection-sampled, "
        "harmless-base, helpful (the first three), harmless, or all (default)",
    )
    responses: str = option(
        "any",
        "any (default), or single: drop pairs whose sides part before the last turn",
        choices=("any", "single"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset == RED_TEAM:
            raise UserError(
                f"subset {RED_TEAM} holds single transcripts without a preference; choose "
                "helpful or harmless"
            )
        known = [*SUBSETS["all"], *SUBSETS]
        if self.subset and self.subset not in known:
            raise UserError(f"no subset {self.subset!r}{suggest(self.subset, known)}")


def read_hh(source: str, kind: str, split: str, options: HHOptions) -> Outcomes:
    """Outcomes of a file, of a folder that is laid out as the hub's, or of the hub.

    Pairs; for prompts and demonstrations the preferred dialogue up to its last turn.

    Raises:
        UserError: what `iterate_rows` refuses, a subset of a single file, or another schema.
    """
    for part, folder in hh_sources(source, options.subset, split):
        rows = _checked(iterate_rows(part, split=split, data_dir=folder))
        if kind == "pairs":
            yield from each(lambda row, w: hh_pair(row, w, responses=options.responses), rows)
        elif kind == "demonstrations":
            yield from each(hh_demonstration, rows)
        else:
            yield from prompts_of(each(hh_demonstration, rows))


def hh_sources(source: str, subset: str, split: str) -> list[tuple[str, str | None]]:
    """What `iterate_rows` is to read: sources, each with its `data_dir`."""
    path = Path(source)
    if path.is_file():
        if subset:
            raise UserError(
                f"{source}: is one file, so subset={subset} has no effect; leave it out"
            )
        return [(source, None)]
    folders = SUBSETS.get(subset or "all", (subset,))
    if not path.is_dir():
        return [(source, folder) for folder in folders]
    if not subset and not any((path / folder).is_dir() for folder in folders):
        folders = ("",)  # the folder of one subset
    found: list[tuple[str, str | None]] = []
    for folder in folders:
        # Directly rather than through `datasets`, so that errors name the line.
        names = [path / folder / f"{split}.{suffix}" for suffix in ("jsonl.gz", "jsonl")]
        files = [str(name) for name in names if name.is_file()]
        if files:
            found.append((files[0], None))
        elif _in_parts(path / folder):
            found.append((str(path / folder), None))
        elif subset or folder == "":
            raise UserError(f"{path / folder}: no {split}.jsonl.gz or {split}.jsonl in this folder")
    if not found:
        raise UserError(f"{path}: no {split}.jsonl.gz in its folders; check the split")
    return found


def _in_parts(folder: Path) -> bool:
    """Whether a folder holds data, but not as the hub's two files."""
    names = [file.name for file in folder.glob("*") if file.name.endswith(SUFFIXES)]
    return bool(names) and not any(name.startswith(("train.", "test.")) for name in names)


def _checked(rows: Iterable[tuple[str, Row]]) -> Iterable[tuple[str, Row]]:
    for where, row in rows:
        if "transcript" in row and "chosen" not in row:
            raise UserError(
                f"{where}: a row of {RED_TEAM}, which holds no preferences; read helpful-base, "
                "helpful-online, helpful-rejection-sampled or harmless-base"
            )
        yield where, row


FORMATS.register("hh_rlhf")(
    Format(
        about="Anthropic HH-RLHF: dialogues, helpful and harmless",
        kinds=KINDS,
        hub=(HUB_NAME,),
        options=HHOptions,
        read=read_hh,
    )
)
