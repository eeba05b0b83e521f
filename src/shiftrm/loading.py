"""What libraries raise over a model's files, as one line for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shiftrm.errors import UserError

__all__ = ["explain_loading", "refuse_gguf"]


@contextmanager
def explain_loading(path: str | Path, what: str) -> Iterator[None]:
    """Around code of libraries that reads a model's folder and does nothing else.

    Whatever it raises is about the files: each library has exceptions of its own for broken ones.

    Args:
        what: as what it is loaded, in words.

    Raises:
        UserError: for every exception but memory that ran out.
    """
    refuse_gguf(path)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        words = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
        if isinstance(error, OSError | ValueError | RuntimeError) and words:
            said = words[0]
        raise UserError(f"{path}: cannot be loaded as {what} ({said})") from None


def refuse_gguf(path: str | Path) -> None:
    """Refuse a folder of GGUF files, which transformers only reads by the file's name.

    Raises:
        UserError: says how to make a checkpoint of it.
    """
    folder = Path(path)
    try:
        found = sorted(folder.glob("*.gguf"))
        whole = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    except (OSError, ValueError):
        return
    if found and not whole:
        raise UserError(
            f"{path}: holds its weights as GGUF, which these commands do not read; load it with "
            f"transformers' from_pretrained({str(path)!r}, gguf_file={found[0].name!r}), write it "
            "with save_pretrained into another folder, tokenizer and all, and give that folder"
        )
