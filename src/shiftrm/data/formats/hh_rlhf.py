r"""Anthropic's HH-RLHF (Anthropic/hh-rlhf): pairs of dialogues, one of which people preferred.

Columns read: `chosen`, `rejected`, whole transcripts of turns "\n\nHuman: " and "\n\nAssistant: ".
The subsets are folders with `train.jsonl.gz` and `test.jsonl.gz`.

The following is ours:

- the prompt ends at the last "\n\nAssistant: " up to which both transcripts are equal. If they
  diverge at a human turn (the two sides are then different dialogues), each side keeps the rest of
  its dialogue as several messages; `responses=single` drops such pairs (`several_turns`);
- a marker is a blank line, the speaker, a colon, and a space, a line break or the end of the
  transcript: `"\n\nHuman:"` inside quotation marks is not a turn;
- consecutive turns of one speaker become one message, joined with a blank line;
- white space is stripped from a message's ends only.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shiftrm.data.dialogues import alternating, last_answer, parted
from shiftrm.data.loaded import Options, Outcome, message, option, text_of
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.models.rendering import Messages

SUBSETS: dict[str, tuple[str, ...]] = {
    "helpful": ("helpful-base", "helpful-online", "helpful-rejection-sampled"),
    "harmless": ("harmless-base",),
    "all": ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"),
}
"""Names for several folders; each folder name is also a subset."""

RED_TEAM = "red-team-attempts"

MARKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):(?: |(?=\s)|\Z)")

ROLES = {"Human": "user", "Assistant": "assistant"}


class TranscriptTurn(NamedTuple):
    """One turn of a transcript, unchanged; text before the first marker has speaker ""."""

    marker: str
    speaker: str
    text: str


def parse_transcript(transcript: str) -> list[TranscriptTurn]:
    """Cut a transcript at its markers; `join_turns` gives it back, byte for byte."""
    turns: list[TranscriptTurn] = []
    marker, speaker, start = "", "", 0
    for match in MARKER.finditer(transcript):
        if match.start() > start or speaker:
            turns.append(TranscriptTurn(marker, speaker, transcript[start : match.start()]))
        marker, speaker, start = match[0], match[1], match.end()
    if speaker or transcript:
        turns.append(TranscriptTurn(marker, speaker, transcript[start:]))
    return turns


def join_turns(turns: Iterable[TranscriptTurn]) -> str:
    """Return the transcript that `parse_transcript` cut."""
    return "".join(turn.marker + turn.text for turn in turns)


def transcript_messages(transcript: str) -> Messages | str:
    """Return alternating messages, the user's first and the assistant's last; or a reason.

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
    """Map one row to a conversational preference row.

    Reasons: those of `transcript_messages` and `dialogues.parted`.
    """
    sides = []
    for column in ("chosen", "rejected"):
        messages = transcript_messages(text_of(row, column, where))
        if isinstance(messages, str):
            return messages
        sides.append(messages)
    return parted(*sides, responses=responses)


def hh_demonstration(row: Row, where: str) -> Outcome:
    """Return the preferred dialogue's last turn as a demonstration, or a reason."""
    messages = transcript_messages(text_of(row, "chosen", where))
    return messages if isinstance(messages, str) else last_answer(messages)


@dataclass(frozen=True)
class HHOptions(Options):
    """Options of HH-RLHF."""

    subset: str = option(
        "",
        "of a folder or hub name: helpful-base, helpful-online, helpful-rejection-sampled, "
        "harmless-base, helpful (the first three), harmless, or all (default)",
    )
    responses: str = option(
        "any",
        "any (default), or single: drop pairs whose sides diverge before the last turn",
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


def hh_rows(source: str, split: str, options: HHOptions) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, of a folder that is laid out as the hub's, or of the hub.

    Raises:
        UserError: as `iterate_rows`; a subset of a single file, a missing folder, or rows of
            `RED_TEAM`.
    """
    subset, path = options.subset, Path(source)
    folders = SUBSETS.get(subset or "all", (subset,))
    parts: list[tuple[str | Path, str | None]]
    if path.is_file():
        if subset:
            raise UserError(
                f"{source}: is one file, so subset={subset} has no effect; leave it out"
            )
        parts = [(source, None)]
    elif not path.is_dir():
        parts = [(source, folder) for folder in folders]
    else:
        found = [path / folder for folder in folders if (path / folder).is_dir()]
        if subset and len(found) < len(folders):
            raise UserError(f"{path}: subset={subset} needs folders {', '.join(folders)} in it")
        parts = [(folder, None) for folder in found or [path]]  # or the folder of one subset
    for part, folder in parts:
        for where, row in iterate_rows(part, split=split, data_dir=folder):
            if "transcript" in row and "chosen" not in row:
                raise UserError(
                    f"{where}: a row of {RED_TEAM}, which holds no preferences; read helpful-base, "
                    "helpful-online, helpful-rejection-sampled or harmless-base"
                )
            yield where, row


FORMATS.register("hh_rlhf")(
    Format(
        about="Anthropic HH-RLHF: dialogues, helpful and harmless",
        hub=("Anthropic/hh-rlhf",),
        options=HHOptions,
        rows=hh_rows,
        mappers={
            "pairs": lambda row, where, o: hh_pair(row, where, responses=o.responses),
            "demonstrations": lambda row, where, _: hh_demonstration(row, where),
        },
    )
)
