"""Registries: named entries of one kind, to which users add their own by import path."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from shiftrm.errors import UserError, shortened, suggest

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, in the order of registration.

    ```
    METRICS = Registry[Metric]("metric", Metric, home="shiftrm.metrics")
    METRICS.register("loss")(Metric(...))
    METRICS.get("loss"), METRICS.get("my_package.my_module:MY_METRIC")
    ```

    Args:
        what: the name of the kind in messages, such as "meta objective".
        kind: the class that entries are instances of; None if they are functions.
        home: the module that registers the entries, or a package each of whose modules does.
            Imported at the first look-up.
    """

    def __init__(self, what: str, kind: type[T] | None = None, *, home: str = "") -> None:
        self.what = what
        self._kind = kind
        self._home = home
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Add an entry; works as a decorator.

        Raises:
            ValueError: the name is taken, or is written like an import path.
        """
        if ":" in name:
            raise ValueError(f"{self.what} {name!r}: names of entries have no colon")

        def add(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            return entry

        return add

    def names(self) -> list[str]:
        """The registered names."""
        self._load()
        return list(self._entries)

    def get(self, name: str) -> T:
        """Return the entry of this name, or import it if the name is `package.module:attribute`.

        Raises:
            UserError: no such entry, module or attribute, or the attribute is of another kind.
        """
        if ":" in name:
            return self._imported(name)
        self._load()
        if name not in self._entries:
            raise UserError(
                f"unknown {self.what} {shortened(name)!r}{suggest(name, list(self._entries))} "
                "(or give package.module:attribute)"
            )
        return self._entries[name]

    def _load(self) -> None:
        home, self._home = self._home, ""
        if home:
            package = importlib.import_module(home)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{home}.{module.name}")

    def _imported(self, path: str) -> T:
        module_name, _, attribute = path.partition(":")
        if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
            raise UserError(f"{self.what} {shortened(path)!r}: write package.module:attribute")
        where = f"{self.what} {shortened(path)!r}"
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # the console script, unlike `python -m`, leaves it out
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{module_name}.".startswith(f"{missing}."):
                near = suggest(missing, _modules_beside(missing))
                raise UserError(f"{where}: no module named {missing!r}{near}") from None
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: importing {module_name} failed: {reason}") from error
        if not hasattr(module, attribute):
            near = suggest(attribute, [n for n in vars(module) if not n.startswith("_")])
            raise UserError(f"{where}: {module_name} has no {attribute!r}{near}")
        entry: T = getattr(module, attribute)
        if not (callable(entry) if self._kind is None else isinstance(entry, self._kind)):
            expected = "a function" if self._kind is None else f"a {self._kind.__name__}"
            raise UserError(f"{where}: expected {expected}, found {type(entry).__name__}")
        return entry


def _modules_beside(name: str) -> list[str]:
    """Modules in the folder where this one was looked for; none for top-level names."""
    parent = name.rpartition(".")[0]
    if parent not in sys.modules:
        return []
    folders = getattr(sys.modules[parent], "__path__", ())
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(folders)]
