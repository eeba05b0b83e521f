"""A response in a row: its text, and its tokens if this project sampled it.

Rows that we sample hold `prompt_ids`, `response_ids` and the name of their tokenizer. Code that
scores, trains on or measures such a row uses the tokens if its tokenizer is the same; otherwise, or
for files from elsewhere, it uses the text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import (
    Text,
    check_template_options,
    check_text,
    decode_response,
    encode,
    encode_prompt,
    template_options,
)

PROMPT_IDS, IDS, TOKENIZER = "prompt_ids", "response_ids", "tokenizer"
"""The columns of tokens: of the prompt, of each response, and the tokenizer's name."""


@dataclass(frozen=True)
class Response:
    """One response to a prompt.

    Attributes:
        prompt: None if the text holds the whole conversation.
        text: see `rendering.encode`.
        finished: False if a length limit cut it off.
        ids: its sampled tokens, with the stop token; None for a response from elsewhere.
        tokenizer: `tokenizer_name` of the tokenizer of `ids`.
        template_options: see `rendering.encode`.
    """

    prompt: Text | None
    text: Text
    finished: bool = True
    ids: Sequence[int] | None = None
    tokenizer: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict, hash=False)


_NAMES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def tokenizer_name(tokenizer: Any) -> str:
    """Return a short name that is equal for tokenizers that split every text into the same tokens.

    It depends on the vocabulary, the merges and the splitting of text, not on added tokens and the
    chat template: `encode_response` checks whether these agree.
    """
    if tokenizer not in _NAMES:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            parts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        else:
            whole = json.loads(backend.to_str())
            parts = [whole.get(key) for key in ("model", "normalizer", "pre_tokenizer", "decoder")]
        text = json.dumps(parts, sort_keys=True)
        _NAMES[tokenizer] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return _NAMES[tokenizer]


def encode_response(
    tokenizer: Any, response: Response, *, vocabulary: int | None = None
) -> list[int]:
    """Return the token ids of prompt and response, the sampled ones if they are this tokenizer's.

    Args:
        vocabulary: number of ids that the reading model accepts. A policy may have more, and sample
            tokens without text.

    Raises:
        UserError: as `rendering.encode`.
    """
    options = dict(response.template_options)
    if response.ids and response.prompt is not None and response.prompt != []:
        prompt_ids = encode_prompt(tokenizer, response.prompt, template_options=options)
        ids = sampled_ids(tokenizer, response, prompt_ids)
        if ids is not None and _readable(tokenizer, ids, response.finished, vocabulary):
            return prompt_ids + ids
    return encode(
        tokenizer,
        response.prompt,
        response.text,
        finished=response.finished,
        template_options=options,
    )


def _readable(tokenizer: Any, ids: list[int], finished: bool, vocabulary: int | None) -> bool:
    """Whether the reader knows all tokens, including the stop token of another tokenizer."""
    if vocabulary is not None and max(ids) >= vocabulary:
        return False
    return not finished or tokenizer.convert_ids_to_tokens(ids[-1]) is not None


def sampled_ids(tokenizer: Any, response: Response, prompt_ids: Sequence[int]) -> list[int] | None:
    """Return the sampled tokens if they are this tokenizer's and still match the text.

    The tokenizer must have the same name and decode them to the row's text, so edited text is read
    as edited.
    """
    if not response.ids or response.tokenizer != tokenizer_name(tokenizer):
        return None
    ids = list(response.ids)
    text = decode_response(tokenizer, prompt_ids, ids, finished=response.finished)
    return ids if text == response.text else None


def group_responses(row: Row) -> list[Response]:
    """Return the responses of a checked row (`prompt`, `responses`, and optional columns)."""
    responses = row["responses"]
    flags = row.get("finished") or [True] * len(responses)
    ids = row.get(IDS) or [None] * len(responses)
    options = template_options(row)
    return [
        Response(row.get("prompt"), text, done, tokens, row.get(TOKENIZER), options)
        for text, done, tokens in zip(responses, flags, ids, strict=True)
    ]


def check_finished(row: Row, column: str, where: str) -> bool:
    """Return whether a response is finished; True if the row does not say.

    Raises:
        UserError: the column holds something else.
    """
    value = row.get(column)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise UserError(f"{where}: column {column!r} is {value!r:.40}; expected true or false")
    return value


def check_group(row: Row, where: str, *, least: int = 2) -> Row:
    """Check that a group's columns match and it has `least` responses; return the row unchanged."""
    require_columns(row, ("prompt", "responses"), where)
    check_template_options(row, where)
    check_prompt(row, where)
    responses = check_responses(row, where)
    if len(responses) < least:
        raise UserError(
            f"{where}: the group has {len(responses)} response(s); at least two are needed to "
            "measure a difference: sample more with num_responses >= 2"
        )
    return row


def check_prompt(row: Row, where: str) -> None:
    """Check that the prompt is text; None or no messages mean that the responses hold it all."""
    if row.get("prompt") is not None and row["prompt"] != []:
        check_text(row["prompt"], f"{where}: column 'prompt'")


def check_responses(row: Row, where: str) -> list[Text]:
    """Check that each response is text and that all columns match; return the responses."""
    responses, finished = row["responses"], row.get("finished")
    if not isinstance(responses, list):
        raise UserError(
            f"{where}: column 'responses' holds {type(responses).__name__}; expected a list"
        )
    for number, response in enumerate(responses, start=1):
        check_text(response, f"{where}: response {number}")
    check_ids(row, where)
    if finished is None:
        return responses
    if not isinstance(finished, list) or not all(isinstance(f, bool) for f in finished):
        raise UserError(f"{where}: column 'finished' must be a list of true and false")
    if len(finished) != len(responses):
        raise UserError(
            f"{where}: 'finished' has {len(finished)} entries for {len(responses)} responses"
        )
    return responses


def check_ids(row: Row, where: str) -> None:
    """Check that the token columns are lists of integers, one list per response."""
    ids, prompt_ids = row.get(IDS), row.get(PROMPT_IDS)
    if ids is not None and (not isinstance(ids, list) or len(ids) != len(row["responses"])):
        raise UserError(f"{where}: column {IDS!r} must hold one list of token ids a response")
    for column, tokens in ((PROMPT_IDS, prompt_ids), *((IDS, one) for one in ids or ())):
        if tokens is None:
            continue
        if not isinstance(tokens, list) or not all(type(i) is int and i >= 0 for i in tokens):
            raise UserError(f"{where}: column {column!r} must hold lists of token ids")
    if not isinstance(row.get(TOKENIZER), str | None):
        raise UserError(f"{where}: column {TOKENIZER!r} must name the tokenizer of the ids")
