"""Prints how long the stages of a study take, and keeps it."""

import sys
import time


class StageClock:
    """An `on_progress` of `run_stages`.

    Attributes:
        seconds: on the clock, of each stage that has ended.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __call__(self, event: str, name: str) -> None:
        if event == "start":
            self._began[name] = time.monotonic()
        elif event == "done":
            self.seconds[name] = time.monotonic() - self._began[name]
            line = f"{self.label}: {name} done in {self.seconds[name]:.0f} s"
            print(line, file=sys.stderr, flush=True)
