"""A disk cache of judges' answers, so that no question is paid for twice."""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.models.endpoint import Completion

_BEGINNING = b'{"key": "'


def question_key(
    *,
    base_url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
) -> str:
    """Return the SHA-256 of everything that determines an answer.

    This includes the address, since local servers often use one name for different models, and the
    template, through the messages.
    """
    asked = [base_url, model, list(messages), dict(parameters)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by key, in an append-only file of JSON lines.

    Each answer is written and flushed to disk at once. An incomplete line left by a killed process
    is dropped at the next write. Threads may share an object and processes may share a file:
    writes hold a lock, and a lookup reads new lines from other processes before it reports a miss.

    Args:
        path: file of the cache; None keeps the answers in memory only.

    Raises:
        UserError: the file is not a cache.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._answers: dict[str, Completion] = {}
        self._read_to = 0
        self._lock = threading.Lock()
        if self.path is not None and self.path.is_file():
            _require_cache(self.path)
        self._refresh()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Completion | None:
        """Return the cached answer, or None."""
        with self._lock:
            if key not in self._answers:
                self._refresh()
            return self._answers.get(key)

    def add(self, key: str, answer: Completion, *, model: str) -> None:
        """Store an answer. It is on disk when this returns."""
        line = {
            "key": key,
            "model": model,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
        }
        raw = json.dumps(line).encode() + b"\n"  # ASCII: lone surrogates survive as they are
        with self._lock:
            self._answers[key] = answer
            if self.path is not None:
                self._append(self.path, raw)

    def _append(self, path: Path, raw: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # closing releases it
            self._refresh()
            handle.truncate(self._read_to)  # an incomplete last line is from a killed process
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())

    def _refresh(self) -> None:
        """Read complete lines that were added since the last read."""
        if self.path is None or not self.path.is_file():
            return
        with open(self.path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size < self._read_to:
                self._read_to = 0  # the file was replaced
            handle.seek(self._read_to)
            whole = handle.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            found = _parsed(line)
            if found is not None:
                self._answers.setdefault(*found)


def _require_cache(path: Path) -> None:
    """Reject a file that does not start like a cache (its first line may be incomplete)."""
    with open(path, "rb") as handle:
        start = handle.read(len(_BEGINNING))
    if not _BEGINNING.startswith(start):
        raise UserError(f"{path}: is not a cache of a judge's answers; choose another file")


def _parsed(line: bytes) -> tuple[str, Completion] | None:
    """Parse key and answer; None for a broken line, whose question is then asked again."""
    try:
        row = json.loads(line)
        key, text = row["key"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(key, str) or not isinstance(text, str):
        return None
    return key, Completion(
        text, row.get("finish_reason"), row.get("tokens_in"), row.get("tokens_out")
    )
