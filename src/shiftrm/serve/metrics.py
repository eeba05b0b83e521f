"""What `/metrics` counts, in Prometheus's format."""

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters of one server; several servers in a process have their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._make(Counter, "requests", "Answers", ["path", "status"])
        self.seconds = self._make(
            Histogram, "request_seconds", "From request to answer", ["path"], buckets=SECONDS
        )
        self.running = self._make(Gauge, "requests_running", "Requests without an answer yet")
        self.waiting = self._make(Gauge, "requests_waiting", "Requests that no pass has begun")
        self.sequences = self._make(Counter, "sequences", "Sequences computed")
        self.given = self._make(Counter, "tokens_given", "Tokens of all sequences of requests")
        self.computed = self._make(Counter, "tokens_computed", "Tokens of all passes, with padding")
        self.passes = self._make(
            Histogram, "pass_sequences", "Sequences in one forward pass", buckets=SEQUENCES
        )
        self.reloads = self._make(Counter, "reloads", "Attempts to change the model", ["result"])
        self.unlogged = self._make(
            Counter, "requests_unlogged", "Answers that --log-requests could not write"
        )
        self.model = self._make(Info, "model", "The model that new requests are scored by")

    def _make(self, kind: Any, name: str, text: str, labels: Any = (), **more: Any) -> Any:
        return kind(f"shiftrm_{name}", text, labels, registry=self.registry, **more)

    def observe_pass(self, sequences: int, tokens: int) -> None:
        """Count a pass."""
        self.passes.observe(sequences)
        self.sequences.inc(sequences)
        self.computed.inc(tokens)

    def text(self) -> bytes:
        """Return all values in the text format."""
        return generate_latest(self.registry)
