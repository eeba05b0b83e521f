"""Run many slow calls concurrently, up to a limit."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_bounded(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    concurrency: int,
    grace: float = 10.0,
) -> Generator[tuple[int, Result], None, None]:
    """Yield `(index, function(item))` as results arrive, with at most `concurrency` calls at once.

    A result that the consumer has not yet taken counts as one of the `concurrency`, so no more than
    that many calls are ever started ahead of what the consumer has seen.

    When a call raises or the consumer stops (such as by Ctrl-C), no further call is started,
    running calls get `grace` seconds to finish and save their results, and the error propagates.
    The threads are daemons, so a stalled server does not keep the program from exiting.
    """
    waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    for entry in enumerate(items):
        waiting.put(entry)
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()
    free = threading.Semaphore(concurrency)

    def work() -> None:
        while True:
            free.acquire()
            if stop.is_set():
                return
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, function(item), None))
            except BaseException as error:  # handed to the consumer, whatever it is
                stop.set()
                done.put((index, None, error))

    threads = [
        threading.Thread(target=work, name=f"request-{i}", daemon=True)
        for i in range(min(concurrency, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(items)):
            index, result, error = done.get()
            if error is not None:
                raise error
            yield index, result
            free.release()
    finally:
        stop.set()
        free.release(max(1, len(threads)))  # wakes waiting threads, which then see `stop`
        deadline = time.monotonic() + grace
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
