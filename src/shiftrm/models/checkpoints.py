"""What a checkpoint lacks or has too much of, found before its numbers are believed."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from shiftrm.errors import UserError

__all__ = ["embeddings", "require_known_ids", "require_words", "unread_heads"]

FEW_WORDS = 3
"""transformers makes a tokenizer of its special tokens alone (and a mark or two) of a folder that
has no tokenizer's files; every text is then the same."""

A_HEAD = re.compile(r"head|score|scalar|value|reward|regress|classif|rank|critic")
A_LANGUAGE_HEAD = re.compile(
    r"^(lm_head|embed_out|output_projection|cls\.|generator_|discriminator_|mtp|lm_predictions)"
    r"|\.lm_head\b|^(qa_outputs)"
)


def require_words(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that knows no words.

    Raises:
        UserError: it has special tokens only.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(words) <= FEW_WORDS:
        raise UserError(
            f"{name}: its tokenizer knows no words, so every text would be the same; put the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder"
        )


def embeddings(model: nn.Module) -> int | None:
    """How many token ids a model knows; None if it does not say."""
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def require_known_ids(ids: Collection[int], size: int | None, *, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        size: as `embeddings` returns it.
        name: how errors call these ids.

    Raises:
        UserError: an id is negative, or `size` or more.
    """
    if size is None or not len(ids):
        return
    least, most = int(min(ids)), int(max(ids))
    if least < 0 or most >= size:
        raise UserError(
            f"{name} has token id {most if most >= size else least}, and the model has embeddings "
            f"for {size} tokens; the tokenizer is not the model's"
        )


def unread_heads(unexpected_keys: Iterable[str]) -> list[str]:
    """Weights of a trained head that a sequence classifier does not read, among those left out.

    Args:
        unexpected_keys: what `from_pretrained(..., output_loading_info=True)` calls so.
    """
    return sorted(
        key
        for key in unexpected_keys
        if A_HEAD.search(key) and not A_LANGUAGE_HEAD.search(key) and ".layers." not in key
    )
