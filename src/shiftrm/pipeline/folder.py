"""The folder of a run: claiming it for one configuration, and showing progress."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shiftrm.config import differences, read_yaml
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.pipeline.engine import Stage
from shiftrm.progress import ProgressTask, current

__all__ = ["CONFIG_FILE", "claim", "progress"]

CONFIG_FILE = "config.yaml"

INPUTS_FILE = "inputs.json"
"""Hashes of the files and models that the run reads, by setting."""


def claim(
    output: Path,
    settings: Mapping[str, Any],
    readme: str,
    *,
    free: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Write the configuration, or check that the folder was made with the same one.

    Args:
        settings: the whole configuration as plain data.
        readme: text that explains the folder.
        free: settings that may differ between calls, as "a" or "a.b".
        inputs: a hash of what the run reads, by setting. Folders of earlier versions hold none.

    Raises:
        UserError: the folder belongs to another configuration, its inputs have changed since, or
            it is not a run's.
    """
    path = output / CONFIG_FILE
    if path.exists():
        old, new = (_without(found, free) for found in (read_yaml(path), settings))
        changed = differences(old, new)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{output}: made with another configuration ({'; '.join(changed[:3])}{more}); "
                "choose another --output, or delete this folder"
            )
        if inputs is not None:
            _check_inputs(output, inputs)
        return
    if output.exists() and (not output.is_dir() or any(map(_is_foreign, output.iterdir()))):
        raise UserError(f"{output}: not empty and not a run's folder; choose another --output")
    atomic_write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))  # first: it claims
    if inputs is not None:
        atomic_write_text(output / INPUTS_FILE, json.dumps(inputs, indent=1))
    atomic_write_text(output / "README.txt", readme)


def _check_inputs(output: Path, inputs: Mapping[str, str]) -> None:
    """Compare with what the run was made from, or write that where it was not known."""
    path = output / INPUTS_FILE
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:  # of an earlier version, or killed before it was written
        atomic_write_text(path, json.dumps(inputs, indent=1))
        return
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: broken; choose another --output") from None
    names = [*old, *(name for name in inputs if name not in old)]
    if changed := [name for name in names if old.get(name) != inputs.get(name)]:
        raise UserError(
            f"{output}: what it was made from has changed since ({', '.join(changed)}); choose "
            "another --output, or delete this folder"
        )


def _without(settings: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in free}
    for name in free:
        section, _, key = name.partition(".")
        if key and isinstance(kept.get(section), dict):
            kept[section].pop(key, None)
    return kept


def _is_foreign(path: Path) -> bool:
    """Whether this is not a leftover of a run that was killed at its very start."""
    return not (path.name == ".lock" or (path.name[0] == "." and path.name.endswith(".tmp")))


@contextmanager
def progress(stages: list[Stage]) -> Iterator[Any]:
    """Show a progress bar with the running stages; without a terminal, a line per stage."""
    if not sys.stderr.isatty():
        done = 0
        begun: dict[str, ProgressTask] = {}
        reporter = current()

        def plain(event: str, name: str) -> None:
            nonlocal done
            if event == "start":
                if reporter is not None:
                    begun[name] = reporter.begin(f"stage {name}", None)
                return
            if reporter is not None and name in begun:
                reporter.end(begun.pop(name))
            done += 1
            word = "already there" if event == "skipped" else "done"
            print(f"[{done}/{len(stages)}] {name} {word}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=len(stages))
        running: list[str] = []

        def live(event: str, name: str) -> None:
            if event == "start":
                running.append(name)
            else:
                bar.advance(task)
                if name in running:
                    running.remove(name)
            label = ", ".join(name.removeprefix("methods/") for name in running)
            bar.update(task, description=label or "finishing")

        yield live
