"""Measurements as JSON lines, the format between running something and showing it.

A record's key is (stage, method, round, step, metric, seed), not its position in the file. It
contains no time, so that two runs with the same seed give identical files.
"""

import functools
import importlib.metadata
import math
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from shiftrm.errors import UserError, shortened
from shiftrm.files import Row, is_number, iterate_jsonl, write_jsonl
from shiftrm.metrics import UndeclaredMetric
from shiftrm.metrics import metric as declared

Value = float | list[float]


@dataclass(frozen=True)
class Record:
    """One measured number (or a list of them, for `*_values` metrics).

    Attributes:
        stage: what was running: "reward_model", "ppo", "evaluate", "compare", "world".
        method: the arm of the comparison, such as "fixed" or "metarm_paper".
        round: round of iterative RLHF, from 1; 0 is before the first.
        step: optimizer or PPO step inside the stage; None for a final value.
        metric: what was measured, a name that `metrics` declares.
        value: the number, or numbers.
        n: the number of samples it is computed from, if that is meaningful.
        seed: the run's seed.
        commit: git commit of the source tree, or "unknown".
        versions: the versions of libraries that could change the number.
    """

    stage: str
    method: str
    round: int
    metric: str
    value: Value
    step: int | None = None
    n: int | None = None
    seed: int = 0
    commit: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        values = self.value if isinstance(self.value, list) else [self.value]
        if not all(map(is_number, values)):
            raise ValueError(
                f"record {self.stage}/{self.method}/{self.metric}: value is not finite"
            )
        declared(self.metric)


class Recorder:
    """Collects the records of one stage, whose constants are given once."""

    def __init__(self, *, stage: str, method: str, round: int, seed: int) -> None:
        self._base = {"stage": stage, "method": method, "round": round, "seed": seed}
        self._base |= {"commit": source_commit(), "versions": library_versions()}
        self.records: list[Record] = []

    def add(
        self, metric: str, value: Value | None, *, step: int | None = None, n: int | None = None
    ) -> None:
        """Add one number; None and non-finite numbers (not measured) are left out.

        Raises:
            metrics.UndeclaredMetric: no metric has this name, whatever the value.
        """
        declared(metric)
        if value is None or (not isinstance(value, list) and not math.isfinite(value)):
            return
        if isinstance(value, list):
            value = [round(float(v), 6) for v in value]
        else:
            value = round(float(value), 8)
        self.records.append(
            Record(metric=metric, value=value, step=step, n=n, **self._base)  # type: ignore[arg-type]
        )


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically."""
    write_jsonl(path, (asdict(record) for record in records))


def read_records(path: str | Path) -> list[Record]:
    """Read a records file.

    Raises:
        UserError: an unknown or missing field, or a metric that this version does not know; the
            message names the line.
    """
    names = [field.name for field in fields(Record)]
    records = []
    for where, row in iterate_jsonl(path, required=("stage", "method", "round", "metric", "value")):
        unknown = set(row) - set(names)
        if unknown:
            raise UserError(f"{where}: unknown field {sorted(unknown)[0]!r} in a record")
        _check_types(row, where)
        try:
            records.append(Record(**row))
        except UndeclaredMetric:
            raise UserError(
                f"{where}: this version of shiftrm does not know the metric {row['metric']!r}; "
                "the run is from another version: run it again, or read it with that version"
            ) from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    return records


def _check_types(row: Row, where: str) -> None:
    """Raise `UserError` for a field of another type, or a number that no record can have."""
    for name, value in row.items():
        if name == "value":
            values = value if isinstance(value, list) else [value]
            good, expected = all(map(is_number, values)), "a finite number, or a list of them"
        elif name in ("round", "step", "n", "seed"):
            optional = name in ("step", "n")
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
            good, expected = whole or (optional and value is None), "a whole number from 0"
        else:
            good, expected = isinstance(value, str), "text"
        if not good:
            shown = shortened(repr(value))
            raise UserError(f"{where}: field {name!r} is {shown}; expected {expected}")


@functools.cache
def source_commit() -> str:
    """Return the commit of the source tree this package runs from, or "unknown"."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: any git above is another project's
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


@functools.cache
def library_versions() -> str:
    """Return the versions of libraries that could change a number."""
    from shiftrm import __version__

    parts = [f"shiftrm {__version__}"]
    for name in ("torch", "transformers", "trl"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} missing")
    return ", ".join(parts)
