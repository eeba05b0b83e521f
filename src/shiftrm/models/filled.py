"""Loading a checkpoint whose files fill the whole model and are read to the end.

transformers fills weights that no file holds with random numbers, and leaves out layers that the
configuration does not count. It prints a table of them and goes on.
"""

import json
import logging
import re
import tempfile
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

NOT_SAVED = re.compile(r"\.ranknum\b|\.trainable_tokens_delta\b")
"""Weights of adapters that PEFT does not save: AdaLoRA's, and copies of tied embeddings' rows."""


class Loaded(NamedTuple):
    """A model, and the weights in which it and its files differ; none is of its layers.

    Attributes:
        missing: weights that no file holds and that are random, such as those of a new head.
        unexpected: weights of the files that are not read.
    """

    model: Any
    missing: list[str]
    unexpected: list[str]


def load_filled(kind: Any, path: str | Path, *, quiet: bool, **options: Any) -> Loaded:
    """Load a model with `kind.from_pretrained`.

    Args:
        kind: an auto class of transformers.
        quiet: whether transformers' table of differences is left out.
        options: for `from_pretrained`.

    Raises:
        UserError: a weight of the layers, of an embedding or of an adapter is in no file, or the
            files hold further layers. The base of an adapter is not checked if it is quantised.
        OSError, ValueError, RuntimeError: as `from_pretrained`.
    """
    from transformers.utils import find_adapter_config_file

    adapter = find_adapter_config_file(str(path))
    if adapter is None:
        with quiet_loading() if quiet else nullcontext():
            model, info = kind.from_pretrained(str(path), output_loading_info=True, **options)
        return _checked(path, model, info)
    about = json.loads(Path(adapter).read_text(encoding="utf-8"))
    if about.get("use_dora"):
        raise UserError(
            f"{path}: is a DoRA adapter, whose magnitudes transformers does not read; give the "
            "model that it was merged into (`shiftrm` writes it beside the adapter)"
        )
    with quiet_loading():
        model, info = kind.from_pretrained(str(path), output_loading_info=True, **options)
        for name in sorted(info["missing_keys"]):
            if not NOT_SAVED.search(name):
                raise UserError(
                    f"{path}: the adapter's files lack {_plain(name)}; copy or save it again"
                )
        if getattr(model.config, "quantization_config", None) is not None:
            return Loaded(model, [], [])
        passed = {name: options[name] for name in PASSED_ON if name in options}
        found = _of_base(kind, Path(path), about["base_model_name_or_path"], passed)
    saved = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
    heads = {f"{name.partition('.modules_to_save.')[0]}." for name in saved}
    missing = [name for name in found.missing if not any(map(name.startswith, heads))]
    return Loaded(model, missing, found.unexpected)


def _of_base(kind: Any, path: Path, named: str, options: dict[str, Any]) -> Loaded:
    """Return the differences of an adapter's base: the same folder's model, if it holds one.

    Loading the adapter reports its own alone. On the meta device no weights are read.
    """
    whole = (path / "config.json").is_file()
    with _without_adapter(path) if whole else nullcontext(named) as place:
        bare, info = kind.from_pretrained(
            place, output_loading_info=True, device_map="meta", **options
        )
    return _checked(path if whole else named, bare, info)


@contextmanager
def _without_adapter(path: Path) -> Iterator[str]:
    """Yield a folder of links to a model's files but those of the adapter beside them."""
    with tempfile.TemporaryDirectory() as folder:
        for file in path.resolve().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file)
        yield folder


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


def _checked(path: str | Path, model: Any, info: dict[str, Iterable[str]]) -> Loaded:
    """Refuse random weights in a model's layers or embeddings, and layers that it does not have."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    body = f"{model.base_model_prefix}."
    for name in missing:
        if name.startswith(body) and "pooler" not in name:
            raise UserError(
                f"{path}: its files lack the weight {name}, which would be random; copy or save "
                "the model again, and see that config.json belongs to it"
            )
    kinds = {NUMBER.sub(".0.", name) for name, _ in model.named_parameters()}
    extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0)
    for name in unexpected:  # layers that predict further tokens stand beyond the others
        if not extra and NUMBER.search(name) and NUMBER.sub(".0.", name) in kinds:
            raise UserError(
                f"{path}: its files hold {name}, a layer that config.json does not count, so the "
                "model would be cut; give the folder the config.json that belongs to it"
            )
    return Loaded(model, missing, unexpected)


def _plain(name: str) -> str:
    """Return an adapter's weight without the marks that PEFT adds to names."""
    return name.replace(".modules_to_save", "").replace(".default", "")
