"""The folder of a monitor: everything that it knows, so that a run can be continued."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, encodable, json_line, write_jsonl
from shiftrm.monitor.audits import Audit, read_audit, write_audit
from shiftrm.monitor.evidence import Alarm
from shiftrm.monitor.settings import MonitorConfig

__all__ = ["MonitorFolder", "State"]

CONFIG, STEPS, EVENTS, PROBE = "monitor.json", "steps.jsonl", "events.jsonl", "probe.jsonl"
ALARM, GROUPS, ERRORS, AUDITS = "alarm.json", "groups.jsonl", "errors.log", "audits"

FIXED = ("threshold", "alpha", "budget", "audit_pairs")
"""Settings of the test, which a continued run cannot change: the alarm's probability is theirs."""


@dataclass
class State:
    """What a monitor remembers.

    Attributes:
        step: steps seen.
        series: every signal's values, in order.
        probe: the frozen groups with their rewards.
        episode: 1, and one more for each change of the reward model.
        alarmed: whether there was an alarm in this episode.
    """

    step: int = 0
    series: dict[str, list[float]] = field(default_factory=dict)
    probe: list[Row] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    episode: int = 1
    alarmed: bool = False


class MonitorFolder:
    """Reads and writes the files of a monitor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, config: MonitorConfig) -> None:
        """Write the settings of the test, or check that they are those of the folder.

        Raises:
            UserError: other settings, or a folder of something else.
        """
        ours = {name: getattr(config, name) for name in FIXED}
        path = self.path / CONFIG
        if path.is_file():
            try:
                theirs = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                theirs = None
            if not isinstance(theirs, dict):
                raise UserError(f"{path}: not the settings of a monitor; move it") from None
            for name in FIXED:
                if theirs.get(name) != ours[name]:
                    raise UserError(
                        f"{self.path}: {name} was {theirs.get(name)} and is {ours[name]}; a run's "
                        "test cannot change: give the same, or another folder"
                    )
            return
        if self.path.exists() and not _empty(self.path):
            raise UserError(f"{self.path}: holds something else than a monitor; give a new folder")
        try:
            atomic_write_text(path, json.dumps(ours, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}); give another folder"
            ) from None

    def state(self) -> State:
        """Read what an earlier part of the run left.

        Raises:
            UserError: a malformed audit.
        """
        state = State(probe=_lines(self.path / PROBE, PROBED))
        for event in _lines(self.path / EVENTS, ("event", "step")):
            if event["event"] == "model_changed":
                state.episode = event["episode"]
                state.alarmed = False
            elif event["event"] == "alarm" and event["episode"] == state.episode:
                state.alarmed = True
        for row in _lines(self.path / STEPS, ("step", "signals")):
            state.step = max(state.step, row["step"])
            if row.get("episode", 1) == state.episode:
                for name, value in row["signals"].items():
                    state.series.setdefault(name, []).append(value)
        number = 1
        while (folder := self.audit(number)).is_dir():
            state.audits.append(read_audit(folder, number, []))  # the next step says what is wrong
            number += 1
        return state

    def add_step(self, row: Row) -> None:
        _append(self.path / STEPS, row)

    def event(self, name: str, step: int, **about: Any) -> None:
        _append(self.path / EVENTS, {"event": name, "step": step, **about})

    def add_error(self, text: str) -> None:
        with open(self.path / ERRORS, "a", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n")

    def write_probe(self, rows: Sequence[Row]) -> None:
        write_jsonl(self.path / PROBE, rows)

    @property
    def groups(self) -> Path:
        return self.path / GROUPS

    def write_groups(self, rows: Sequence[Row]) -> Path:
        """Write unlabelled groups of at least two responses, as `shiftrm adapt` reads them."""
        kept = ("prompt", "responses", "finished")
        several = [row for row in rows if len(row["responses"]) > 1]
        return write_jsonl(self.groups, [{name: row[name] for name in kept} for row in several])

    def write_alarm(self, alarm: Alarm, episode: int) -> None:
        plain = {**asdict(alarm), "groups": str(alarm.groups), "output": str(alarm.output)}
        text = json.dumps({**encodable(plain), "episode": episode}, indent=1) + "\n"
        atomic_write_text(self.path / ALARM, text)

    def write_audit(self, audit: Audit) -> None:
        write_audit(self.audit(audit.number), audit)

    def read_audit(self, audit: Audit, problems: list[str]) -> Audit:
        """Return the audit with the answers that are there now."""
        if len(audit.answered) == len(audit.drawn):
            return audit
        return read_audit(self.audit(audit.number), audit.number, problems)

    def audit(self, number: int) -> Path:
        """Return the folder of an audit."""
        return self.path / AUDITS / f"{number:04d}"


def _empty(path: Path) -> bool:
    """Whether this is a folder without files but hidden ones: another process may be writing."""
    return path.is_dir() and all(p.name.startswith(".") for p in path.iterdir())


def _append(path: Path, row: Row) -> None:
    """Add a line; one that a kill cut off gets its end first, so that it stays alone."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json_line(row).encode())


PROBED = ("prompt", "responses", "finished", "rewards")


def _lines(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read JSON lines; one that a kill cut off is left out.

    Raises:
        UserError: a line that is JSON of something else.
    """
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or not row.keys() >= set(columns):
                raise UserError(f"{path}: holds something else than a monitor's; move the folder")
            rows.append(row)
    return rows
