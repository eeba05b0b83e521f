"""The current model of a server, and how another one takes its place."""

import os
import threading
from collections.abc import Callable

from shiftrm.errors import UserError
from shiftrm.serve.batching import free_memory
from shiftrm.serve.model import ServedModel, load_served, resolved

__all__ = ["Models"]


class Models:
    """Holds the model that new requests are read and scored by.

    A request keeps the model that read it, so requests under way end with the old one, which is
    freed after the last of them.

    Args:
        path: the first model's folder or hub name; a link is watched by `follow_link`, until
            another link is given to `swap`.
        max_length: as `load_served`.

    Attributes:
        current: the model for new requests.
        changed: called with each model after the first, and with the reason where one failed.

    Raises:
        UserError: the first model cannot be served.
    """

    def __init__(self, path: str, *, max_length: int | None = None) -> None:
        self._path, self._max_length = path, max_length
        self._lock = threading.Lock()
        self.changed: Callable[[ServedModel | str], None] = lambda _: None
        self.current = load_served(path, max_length=max_length)
        self._seen = self.current.folder

    def swap(self, path: str) -> ServedModel:
        """Load another model beside the current one, then let it read all new requests.

        Raises:
            UserError: it cannot be served; the current one stays.
        """
        with self._lock:  # one at a time; the last one asked for stays
            if not os.path.isdir(path):
                reason = f"{path}: no such folder; give the folder of a reward model"
                self.changed(reason)
                raise UserError(reason)
            try:
                new = load_served(path, max_length=self._max_length, hub=False)
            except Exception as error:  # running out of memory, too
                free_memory()
                reason = str(error) if isinstance(error, UserError) else _words(path, error)
                self.changed(reason)
                raise UserError(reason) from None
            if os.path.abspath(path) != new.folder:  # a link: watched from now on
                self._path, self._seen = path, new.folder
            self.current = new
            self.changed(new)
        free_memory()
        return new

    def follow_link(self) -> bool:
        """Change the model if its path is a link that now has another target; return whether.

        A target that cannot be served is tried once.
        """
        path = self._path
        target = resolved(path)
        if target == self._seen:
            return False
        self._seen = target
        try:
            self.swap(path)
        except UserError:
            return False
        return True


def _words(path: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{path}: cannot be served ({type(error).__name__}: {said})"
