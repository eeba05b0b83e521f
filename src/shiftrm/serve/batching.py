"""The dynamic batcher: requests that wait are scored together, in one thread.

While a pass runs, new requests collect; the next round takes them all, up to a number of tokens. So
a lone request never waits, and many clients get large passes. Jobs take turns within a round, so a
large request does not keep small ones waiting. All passes of a round are of one model.
"""

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch

from shiftrm.errors import UserError
from shiftrm.serve.model import ServedModel
from shiftrm.serve.passes import Row, compute, passes_of

__all__ = ["Batcher", "BrokenModelError", "Job", "free_memory"]

TURN = 16
"""Sequences of one job that are taken before the next job's turn; they may share a prefix."""

ROUND = 4
"""Passes' worth of tokens that a round takes: enough to order rows by length."""


class BrokenModelError(RuntimeError):
    """Raised for a request that the model could not score; the message is one line."""


class Job:
    """The sequences of one request, read by the model that will score them.

    Attributes:
        done: gets the rewards, in the order of the sequences; cancel it to drop the job.
    """

    def __init__(self, served: ServedModel, sequences: Sequence[Sequence[int]]) -> None:
        self.served = served
        self.sequences = [tuple(ids) for ids in sequences]
        self.tokens = sum(map(len, self.sequences))
        self.done: Future[list[float]] = Future()
        self._rewards: dict[int, float] = {}
        self._next = 0

    def take(self, count: int) -> range:
        """Return the next indices to be scored."""
        taken = range(self._next, min(self._next + count, len(self.sequences)))
        self._next = taken.stop
        return taken

    @property
    def is_taken(self) -> bool:
        return self._next >= len(self.sequences) or self.done.done()

    def put(self, index: int, reward: float) -> None:
        """Keep a reward; the last one completes the job."""
        self._rewards[index] = reward
        if len(self._rewards) < len(self.sequences) or self.done.done():
            return
        rewards = [self._rewards[i] for i in range(len(self.sequences))]
        try:
            names = [f"response {i}" for i in range(len(rewards))]
            self.served.scorer.require_finite(rewards, names)
        except UserError as error:
            self.fail(BrokenModelError(str(error)))
            return
        with suppress(InvalidStateError):  # cancelled meanwhile
            self.done.set_result(rewards)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.done.set_exception(error)


class Batcher:
    """Scores jobs in its own thread until it is closed.

    Args:
        budget: tokens of a pass, padding included.
        observe: called after each pass with the number of sequences and of computed tokens.

    Attributes:
        trouble: why the last pass failed; "" if it did not.
    """

    def __init__(
        self, *, budget: int, observe: Callable[[int, int], None] = lambda sequences, tokens: None
    ) -> None:
        self.budget, self.observe = budget, observe
        self.trouble = ""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._last: weakref.ref[ServedModel] | None = None
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of jobs with sequences that no round has taken yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job; `job.done` gets its rewards."""
        if not job.sequences:
            job.done.set_result([])
            return
        with self._changed:
            if self._closed:
                job.fail(BrokenModelError("the server is stopping"))
                return
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Score what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                taken = self._take()
            try:
                if taken:
                    self._score(taken)
            except Exception as error:  # a bug; the thread goes on for the next requests
                self.trouble = _words(error)
                for job, _ in taken:
                    job.fail(BrokenModelError(self.trouble))
            taken = []  # no reference to a model while waiting

    def _take(self) -> list[tuple[Job, int]]:
        """Take sequences of all jobs of the first job's model, in turns, up to a round's tokens."""
        for job in [job for job in self._waiting if job.is_taken]:  # cancelled
            self._waiting.remove(job)
        turns = deque(job for job in self._waiting if job.served is self._waiting[0].served)
        taken: list[tuple[Job, int]] = []
        room = ROUND * self.budget
        while turns and room > 0:
            job = turns.popleft()
            for index in job.take(TURN):
                taken.append((job, index))
                room -= len(job.sequences[index])
            if job.is_taken:
                self._waiting.remove(job)
            else:
                turns.append(job)
        return taken

    def _score(self, taken: Sequence[tuple[Job, int]]) -> None:
        served = taken[0][0].served
        if self._last is None or served is not self._last():  # the old model's memory is freed
            self._last = weakref.ref(served)
            free_memory()
        owners: dict[tuple[int, ...], list[tuple[Job, int]]] = {}
        for job, index in taken:  # equal sequences are computed once
            owners.setdefault(job.sequences[index], []).append((job, index))
        sequences = list(owners)
        shared = served.obstacle is None
        for rows in passes_of(sequences, shared=shared, budget=self.budget):
            wanted = [
                row
                for row in rows
                if not all(job.done.done() for i in row.members for job, _ in owners[sequences[i]])
            ]
            if wanted:
                self._pass(served, sequences, wanted, owners)

    def _pass(
        self, served: ServedModel, sequences: Sequence[Any], rows: Sequence[Row], owners: Any
    ) -> None:
        """Score rows; where that fails, halves of them, so that one row fails alone."""
        try:
            rewards = compute(served.scorer, sequences, rows)
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            if len(rows) == 1 and len(rows[0].members) == 1:
                self.trouble = _words(error)
                for job, _ in owners[sequences[rows[0].members[0]]]:
                    job.fail(BrokenModelError(self.trouble))
                return
            halves = _halves(rows, sequences)
            del error
            if memory:
                free_memory()
            for half in halves:
                self._pass(served, sequences, half, owners)
            return
        self.trouble = ""
        self.observe(len(rewards), len(rows) * max(row.length for row in rows))
        for i, reward in rewards.items():
            for job, index in owners[sequences[i]]:
                job.put(index, reward)


def _halves(rows: Sequence[Row], sequences: Sequence[Any]) -> list[list[Row]]:
    """Return two parts of a pass; a single row of several sequences becomes rows of one each."""
    if len(rows) > 1:
        middle = len(rows) // 2
        return [list(rows[:middle]), list(rows[middle:])]
    return [[Row(len(sequences[i]), [i])] for i in rows[0].members]


def _words(error: Exception) -> str:
    """Return an error in one line."""
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return f"the model failed ({type(error).__name__}: {said})"


def free_memory() -> None:
    """Return the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
