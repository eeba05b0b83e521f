"""What libraries raise over a model's files, as one line for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.models.checkpoints import embeddings, require_words

__all__ = ["check_vocabulary", "explain_loading", "refuse_gguf", "to_accelerator"]


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


def check_vocabulary(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Refuse a tokenizer that writes words by tokens which the model does not have.

    Added tokens may lie beyond the embedding: many checkpoints have such a pad token, which stands
    behind the mask alone.

    Raises:
        UserError: names one of them; or the tokenizer knows no words at all.
    """
    require_words(tokenizer, str(path))
    size = embeddings(model)
    if size is None or len(tokenizer) <= size:
        return
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    vocabulary = tokenizer.get_vocab().items()
    beyond = sorted((i, token) for token, i in vocabulary if i >= size and i not in added)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"{path}: the tokenizer is not this model's: token {token!r} has the number {number}, "
            f"and the model has embeddings for {size}; give the folder the tokenizer that the "
            "model was trained with"
        )


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


def to_accelerator(model: Any) -> Any:
    """Move the model to this machine's accelerator, if there is one."""
    import torch

    device = torch.accelerator.current_accelerator()
    return model if device is None else model.to(device)
