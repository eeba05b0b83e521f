"""Loading a checkpoint whose files fill the whole model and are read to the end.

transformers fills weights that no file holds with random numbers, and leaves out layers that the
configuration does not count. It prints a table of them and goes on.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from shiftrm.errors import UserError

__all__ = ["Loaded", "load_filled", "quiet_loading"]

NUMBER = re.compile(r"\.\d+\.")
"""A layer's number in the name of a weight."""

PASSED_ON = ("num_labels", "trust_remote_code", "local_files_only")
"""Options that the base of an adapter is read with."""


class Loaded(NamedTuple):
    """A model, and the names in which it and its files differ; none is of its body."""

    model: Any
    missing: list[str]
    unexpected: list[str]


def load_filled(kind: Any, path: str | Path, *, quiet: bool, **options: Any) -> Loaded:
    """Load a model with `kind.from_pretrained`.

    Args:
        kind: an auto class of transformers.
        quiet: whether transformers' table of differences is left out.
        options: for `from_pretrained`.

    Returns:
        The model; the weights of its head that no file holds, which are random; and the weights of
        the files that are not read. A pooling layer that a new head needs counts as its head.

    Raises:
        UserError: a weight of the body or of an adapter is in no file, or the files hold further
            layers.
        OSError, ValueError, RuntimeError: as `from_pretrained`.
    """
    from transformers.utils import find_adapter_config_file

    adapter = find_adapter_config_file(str(path))
    with quiet_loading() if quiet or adapter is not None else nullcontext():
        model, info = kind.from_pretrained(str(path), output_loading_info=True, **options)
        if adapter is None:
            return _checked(path, model, info)
        if lacking := sorted(info["missing_keys"]):
            raise UserError(
                f"{path}: the adapter's files lack {_plain(lacking[0])}; copy or save it again"
            )
        base = _base(Path(path), Path(adapter))
        passed = {name: options[name] for name in PASSED_ON if name in options}
        # Its own report is lost. On the meta device no weights are read.
        bare, info = kind.from_pretrained(
            base, output_loading_info=True, device_map="meta", **passed
        )
        found = _checked(base, bare, info)
    saved = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
    heads = {name.partition(".modules_to_save.")[0] for name in saved}
    missing = [name for name in found.missing if name.rpartition(".")[0] not in heads]
    return Loaded(model, missing, found.unexpected)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' report on missing and unused weights."""
    noisy = logging.getLogger("transformers.modeling_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _base(path: Path, adapter_config: Path) -> str:
    """Return the model that an adapter is loaded onto: the same folder's, if it is a whole one."""
    if (path / "config.json").is_file():
        return str(path)
    return str(json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _checked(path: str | Path, model: Any, info: dict[str, Iterable[str]]) -> Loaded:
    """Refuse random weights in a model's body and layers that it does not have."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    body = f"{model.base_model_prefix}."
    for name in missing:
        if name.startswith(body) and "pooler" not in name:
            raise UserError(
                f"{path}: its files lack the weight {name}, which would be random; copy or save "
                "the model again, and see that config.json belongs to it"
            )
    kinds = {NUMBER.sub(".0.", name) for name, _ in model.named_parameters()}
    for name in unexpected:
        if NUMBER.search(name) and NUMBER.sub(".0.", name) in kinds:
            raise UserError(
                f"{path}: its files hold {name}, a layer that config.json does not count, so the "
                "model would be cut; give the folder the config.json that belongs to it"
            )
    return Loaded(model, missing, unexpected)


def _plain(name: str) -> str:
    """Return an adapter's weight without the marks that PEFT adds to names."""
    return name.replace(".modules_to_save", "").replace(".default", "")
