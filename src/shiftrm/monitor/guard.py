"""Keeps errors of watching away from the run that is watched."""

import contextlib
import traceback
import warnings
from collections.abc import Iterator

from shiftrm.monitor.folder import MonitorFolder

__all__ = ["Guard"]


class Guard:
    """Counts errors, writes them into the monitor's folder, and warns of the first.

    with guard("an audit could not be answered"):
        ...
    """

    def __init__(self, folder: MonitorFolder) -> None:
        self.folder, self.count, self._warned = folder, 0, False

    @contextlib.contextmanager
    def __call__(self, what: str = "the drift monitor could not watch a step") -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a hook that exits would end training
            self.failed(f"{what}: {error}")

    def failed(self, what: str) -> None:
        """Count an error and write it down; warn of the first."""
        self.count += 1
        with contextlib.suppress(OSError):
            self.folder.add_error(f"{what}\n{traceback.format_exc()}")
        if not self._warned:
            self._warned = True
            with contextlib.suppress(Warning):  # where warnings are errors, too
                warnings.warn(
                    f"{what}. The rewards are passed on; see {self.folder.path / 'errors.log'}, "
                    "where later errors are written without another warning",
                    stacklevel=4,
                )
