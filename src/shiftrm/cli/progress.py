"""Progress of long work: a bar on a terminal, otherwise lines (`shiftrm.progress`)."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shiftrm.progress import only_on_terminals, task

__all__ = ["bar", "only_on_terminals"]


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function to call with (done, total); total None is unknown."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with (
        task(label, total) as advance,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        shown = progress.add_task(escape(label), total=total)

        def update(done: int, total: int | None = None) -> None:
            advance(done, total)
            if total is not None:
                progress.update(shown, total=total)
            progress.update(shown, completed=done)

        yield update
