"""Which prompts a policy can answer at the length that is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState

from shiftrm.data.prompts import warn_of_joined_ends
from shiftrm.errors import UserError
from shiftrm.models.rendering import Text, encode_prompt

__all__ = ["fitting_prompts"]


def fitting_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    room: int,
    limit: int | None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """Prompts that leave `room` tokens in the context and have at most `limit`; and the others.

    The main process warns of ends that the tokenizer joins with a response.

    Returns:
        The prompts, and how many were dropped, by reason.

    Raises:
        UserError: none is left, or one that the tokenizer or its chat template cannot take.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = None if context is None else context - room
    options = dict(template_options or {})
    lengths = []
    for row, prompt in enumerate(prompts):
        try:
            lengths.append(len(encode_prompt(tokenizer, prompt, template_options=options)))
        except UserError as error:
            raise UserError(f"prompts, row {row}: {error}") from None
    reasons = {}
    if limit is not None:
        reasons[f"longer than max_prompt_length={limit} tokens"] = limit
    if most is not None:
        reasons[f"that leave less than {room} of the {context} tokens of the context"] = most
    kept = list(zip(prompts, lengths, strict=True))
    dropped = {"without tokens": sum(length == 0 for length in lengths)}
    kept = [(prompt, length) for prompt, length in kept if length]
    for reason, longest in reasons.items():
        before = len(kept)
        kept = [(prompt, length) for prompt, length in kept if length <= longest]
        dropped[reason] = before - len(kept)
    if not kept:
        words = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(f"no prompt is left after dropping {words}")
    if PartialState().is_main_process:
        warn_of_joined_ends(tokenizer, [prompt for prompt, _ in kept], source="--prompts")
    return [prompt for prompt, _ in kept], {r: n for r, n in dropped.items() if n}
