"""Text embeddings by sentence-transformers, or by a transformers model with mean pooling."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.errors import UserError
from shiftrm.files import encodable
from shiftrm.models.loading import check_vocabulary, to_accelerator
from shiftrm.models.rope import context_limit

Embedder = Callable[[Sequence[str]], Floats]
"""Maps texts to vectors of length 1: (texts, d)."""

_PLAIN_MODULES = ("Transformer", "Pooling", "Normalize")


def load_embedder(path: str, *, batch_size: int = 64) -> Embedder:
    """Load an embedding model from a folder or the hub.

    With sentence-transformers installed, it loads what is in its format. Without it, a folder of a
    plain transformers model is mean-pooled, and so is a folder in its format that does no more than
    that.

    Args:
        path: a folder, or a hub name.
        batch_size: texts per forward pass.

    Raises:
        UserError: no such model, or one that needs sentence-transformers, which is missing.
    """
    folder = Path(path)
    in_format = (folder / "modules.json").is_file()
    installed = find_spec("sentence_transformers") is not None
    if installed and (in_format or not folder.is_dir()):
        return _sentence_transformer(path, batch_size)
    if in_format and not _mean_pooled(folder):
        raise UserError(
            f"{path}: needs sentence-transformers, which is not installed; run pip install "
            "'shiftrm[embed]', or give the folder of a plain transformers model"
        )
    return _mean_pooling(path, batch_size)


def _sentence_transformer(path: str, batch_size: int) -> Embedder:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(path, error) from None

    def embed(texts: Sequence[str]) -> Floats:
        vectors = model.encode(
            [encodable(text) for text in texts], batch_size=batch_size, show_progress_bar=False
        )
        return _unit(np.asarray(vectors), path)

    return embed


def _mean_pooled(folder: Path) -> bool:
    """Return whether a folder in sentence-transformers' format only does mean pooling."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        if not all(module["type"].rpartition(".")[2] in _PLAIN_MODULES for module in modules):
            return False
        for module in modules:
            kind, at = module["type"].rpartition(".")[2], folder / module["path"]
            if kind == "Pooling":
                pooling = json.loads((at / "config.json").read_text(encoding="utf-8"))
                modes = [name for name, on in pooling.items() if name[:8] == "pooling_" and on]
                if modes != ["pooling_mode_mean_tokens"]:
                    return False
            if kind == "Transformer" and module["path"]:  # the weights are elsewhere
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _mean_pooling(path: str, batch_size: int) -> Embedder:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from shiftrm.models.filled import quiet_loading

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        with quiet_loading():  # do not report an unneeded head
            model = AutoModel.from_pretrained(path).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_load(path, error) from None
    model = to_accelerator(model)
    check_vocabulary(model, tokenizer, path)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{path}: the tokenizer has neither a pad nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    limit = _limit(path, tokenizer, model)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Floats:
        found: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = tokenizer(
                [encodable(texts[i]) for i in chunk],
                padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt",
            ).to(model.device)  # fmt: skip
            mask = batch["attention_mask"]
            hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            weights = mask[..., None].to(torch.float32)
            pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            for i, vector in zip(chunk, pooled.cpu().numpy(), strict=True):
                found[i] = vector
        return _unit(np.array(found), path)

    return embed


def _limit(path: str, tokenizer: Any, model: Any) -> int | None:
    """Return the maximum tokens of a text: the folder's setting, or the model's context."""
    limits = [tokenizer.model_max_length]
    file = Path(path) / "sentence_bert_config.json"
    if file.is_file():
        limits.append(json.loads(file.read_text(encoding="utf-8")).get("max_seq_length"))
    # RoBERTa's positions start after the padding token, so fewer are usable.
    context = context_limit(model.config)
    if context is not None:
        roberta = getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "mpnet")
        limits.append(context - 2 if roberta else context)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**6]
    return min(known, default=None)


def _unit(vectors: Any, path: str) -> Floats:
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise UserError(f"{path}: gives a vector that is zero or not finite; use another embedder")
    return np.asarray(vectors / norms)


def _cannot_load(path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: cannot be loaded as an embedding model ({reason})")
