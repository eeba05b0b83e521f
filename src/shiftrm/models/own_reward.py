"""Our reading of a reward against the model's own, where both must be the same."""

from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.rewards import model_config, sequence_rewards
from shiftrm.models.sharing import FLOOR, evaluating, precision_of

__all__ = ["require_own_reward"]

ROWS, TOKENS = 4, 8


@torch.no_grad()
def require_own_reward(model: nn.Module) -> None:
    """Rewards of a few rows without padding must be the model's own logits.

    The rows have neither the pad token, which the model's own pooling would look for, nor, but at
    their end, EOS, where encoder-decoders pool. Costs two short passes in evaluation mode.

    Raises:
        UserError: they differ, as where a model takes the mean over tokens and we the last one.
    """
    ids = _rows(model_config(model).get_text_config())
    if ids is None:
        return
    ids = ids.to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    with evaluating(model), precision_of(model) as precision:
        logits = getattr(model(input_ids=ids, attention_mask=mask, use_cache=False), "logits", None)
        if logits is None or logits.shape != (ROWS, 1):  # no classifier of transformers
            return
        ours = sequence_rewards(model, ids, mask)
    theirs = logits[:, 0].to(ours.dtype)
    scale = float(theirs.abs().max().clamp(min=1e-6))
    worst = int((ours - theirs).abs().argmax())
    if not float((ours - theirs).abs().max()) > FLOOR[precision[0]] * scale:
        return
    raise UserError(
        f"{type(model).__name__} pools in a way of its own: its reward of a text is "
        f"{float(theirs[worst]):.4g} where its last token's score is {float(ours[worst]):.4g}; use "
        "a model that scores the last token, as decoders do, or the first, as BERT does"
    )


def _rows(config: Any) -> Tensor | None:
    """Token ids [ROWS, TOKENS]; None where the vocabulary has no ordinary token."""
    ends = _listed(config.eos_token_id)
    special = {config.pad_token_id, config.bos_token_id, *ends}
    size = config.vocab_size
    words = [i for i in range(min(size, 8 * ROWS * TOKENS)) if i not in special]
    if not words:
        return None
    words = (words * ROWS * TOKENS)[: ROWS * TOKENS]
    ids = torch.tensor(words).view(ROWS, TOKENS)
    end = next((i for i in ends if i != config.pad_token_id and 0 <= i < size), None)
    if end is not None:
        ids[:, -1] = end
    return ids


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
