"""The wire formats: what a request's JSON holds, and the JSON of its answer.

- `score`: ours.
- `get_reward`: what OpenRLHF's client sends to `--reward.remote_url` (openrlhf/utils/agent.py).
- `classify`: vLLM's, as verl's reward loop uses it (verl/experimental/reward_loop/reward_loop.py).
- `embeddings`: OpenAI's, as verl uses it with SGLang: a reward is an embedding of one number.
"""

import base64
import difflib
import math
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shiftrm.errors import UserError, shortened, suggest
from shiftrm.files import Row
from shiftrm.models.rendering import check_template_options, check_text, template_options
from shiftrm.models.responses import Response
from shiftrm.models.scoring import row_responses
from shiftrm.serve.model import ServedModel

__all__ = ["FORMATS", "Format", "Question"]

Ids = list[int]


@dataclass(frozen=True)
class Question:
    """A request as the served model reads it.

    Attributes:
        sequences: token ids to score.
        body: the request, for the answer's form.
        sizes: how many sequences each row has, for `score`.
    """

    sequences: list[Ids]
    body: Mapping[str, Any]
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """One wire format.

    Attributes:
        paths: where it is served, as POST.
        read: the request's JSON -> question; raises UserError.
        write: rewards, question, model -> the answer's JSON.
    """

    paths: tuple[str, ...]
    read: Callable[[Mapping[str, Any], ServedModel], Question]
    write: Callable[[Sequence[float], Question, ServedModel], dict[str, Any]]


NEAR = 0.9
"""Likeness of two names (difflib's ratio) from which one is a misspelling of the other."""


def _check_names(body: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a misspelt name whose value would be lost without a word; others are ignored."""
    absent = [name for name in known if name not in body]
    for name in body:
        if name not in known and difflib.get_close_matches(name, absent, n=1, cutoff=NEAR):
            raise UserError(f"{where}: {name!r} is not known{suggest(name, absent)}")


def _flag(body: Mapping[str, Any], name: str) -> bool | None:
    """Return an option that is true, false or not given."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{name!r} is {shortened(repr(value), 40)}; expected true or false")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _named(served: ServedModel) -> dict[str, Any]:
    return {"model": served.name, "version": served.version}


TEXT_COLUMNS = (
    "prompt", "finished", "chosen_finished", "rejected_finished", "tools", "chat_template_kwargs",
)  # fmt: skip
"""What changes the reward of a row where it is given."""

# -- ours ------------------------------------------------------------------------------------------


def _read_score(body: Mapping[str, Any], served: ServedModel) -> Question:
    """Read one row as `shiftrm score` takes it, or several as `rows`."""
    rows = body.get("rows")
    if rows is not None and (not isinstance(rows, list) or not rows):
        raise UserError("'rows' must be a list of objects with 'prompt' and 'responses'")
    found = [
        _row_sequences(row, served, f"row {number}" if rows else "request")
        for number, row in enumerate(rows or [body])
    ]
    return Question([ids for row in found for ids in row], body, [len(row) for row in found])


def _row_sequences(row: Any, served: ServedModel, where: str) -> list[Ids]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is {type(row).__name__}; expected an object")
    if "response_ids" in row and not {"responses", "response", "chosen"} & set(row):
        _check_names(row, ("prompt_ids",), where)
        if row.get("prompt"):
            raise UserError(
                f"{where}: 'response_ids' without 'responses' are read after 'prompt_ids', and "
                "'prompt' would be lost; give the prompt as 'prompt_ids', or add 'responses'"
            )
        return _row_of_ids(row, served, where)
    _check_names(row, TEXT_COLUMNS, where)
    given = row.get("responses")
    for number, text in enumerate(given if isinstance(given, list) else ()):
        check_text(text, f"{where}: response {number}")
    return [
        served.response_ids(response, name=f"{where}, response {number}")
        for number, response in enumerate(row_responses(row, where))
    ]


def _row_of_ids(row: Row, served: ServedModel, where: str) -> list[Ids]:
    """Return `prompt_ids` with each of `response_ids`: token ids of the served model."""
    prompt, responses = row.get("prompt_ids"), row["response_ids"]
    if prompt is None:
        prompt = []
    if prompt != [] and not _is_ids(prompt):
        raise UserError(f"{where}: 'prompt_ids' must be a list of token ids")
    if not isinstance(responses, list) or not responses:
        raise UserError(f"{where}: 'response_ids' must be a list of lists of token ids")
    found = []
    for number, ids in enumerate(responses):
        if not isinstance(ids, list) or (ids and not _is_ids(ids)):
            raise UserError(f"{where}: 'response_ids' must be a list of lists of token ids")
        found.append(served.checked([*prompt, *ids], f"{where}, response {number}"))
    return found


def _write_score(
    rewards: Sequence[float], question: Question, served: ServedModel
) -> dict[str, Any]:
    rest = iter(rewards)
    nested = [[next(rest) for _ in range(size)] for size in question.sizes]
    return {"rewards": nested if question.body.get("rows") else nested[0], **_named(served)}


# -- OpenRLHF --------------------------------------------------------------------------------------


def _read_get_reward(body: Mapping[str, Any], served: ServedModel) -> Question:
    """Read `query`, whole conversations with their special tokens; `prompts` and `labels` are not
    needed."""
    queries = body.get("query")
    if isinstance(queries, str) or _is_ids(queries):
        queries = [queries]
    if not isinstance(queries, list):
        raise UserError("'query' must be a list of texts, each a prompt with its response")
    return Question(_whole(queries, served, "query"), body)


def _write_get_reward(
    rewards: Sequence[float], question: Question, served: ServedModel
) -> dict[str, Any]:
    tokens = [float(len(ids)) for ids in question.sequences]
    return {
        "rewards": list(rewards),
        "scores": list(rewards),
        "extra_logs": {"reward_tokens": tokens},  # the client makes tensors of these
        **_named(served),
    }


# -- vLLM and SGLang -------------------------------------------------------------------------------

UNKNOWN = {
    "truncate_prompt_tokens": "texts are not cut: shorten them yourself",
    "dimensions": "a reward is one number",
    "chat_template": "the model's own is used",
}
"""Options of other servers that would change the reward, and why they are refused."""


SQUASH = ("use_activation", "activation", "softmax")
"""Names of the option for a sigmoid, in vLLM's releases."""

OPTIONS = (*SQUASH, "add_special_tokens", "encoding_format", "tools", "chat_template_kwargs")
"""What changes the answer where it is given."""


def _read_input(body: Mapping[str, Any], served: ServedModel) -> Question:
    """Read `input` (a text, token ids, or a list of either), or a chat as `messages`."""
    for name, why in UNKNOWN.items():
        if body.get(name) is not None:
            raise UserError(f"{name!r} is not supported ({why}); leave it out")
    _check_names(body, OPTIONS, "request")
    special = _flag(body, "add_special_tokens")
    for name in SQUASH:
        _flag(body, name)
    if body.get("encoding_format") not in (None, "float", "base64"):
        form = shortened(repr(body["encoding_format"]), 40)
        raise UserError(f"'encoding_format' is {form}; expected 'float' or 'base64'")
    if body.get("messages") is not None:
        if not isinstance(body["messages"], list):
            kind = type(body["messages"]).__name__
            raise UserError(f"'messages' holds {kind}; expected a list of messages")
        check_text(body["messages"], "messages")
        check_template_options(dict(body), "request")
        response = Response(None, body["messages"], template_options=template_options(dict(body)))
        return Question([served.response_ids(response, name="messages")], body)
    given = body.get("input")
    if isinstance(given, str) or _is_ids(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise UserError("'input' must be a text, a list of texts, token ids, or a list of them")
    return Question(_whole(given, served, "input", special=special is not False), body)


def _whole(
    given: Sequence[Any], served: ServedModel, name: str, *, special: bool = True
) -> list[Ids]:
    """Return the tokens of whole conversations, given as texts or as token ids."""
    found = []
    for number, one in enumerate(given):
        where = f"{name} {number}"
        if isinstance(one, str):
            found.append(served.whole_ids(one, special=special, name=where))
        elif _is_ids(one):
            found.append(served.checked(one, where))
        else:
            kind = "an empty list" if one == [] else type(one).__name__
            raise UserError(f"{where}: is {kind}; expected a text or a list of token ids")
    return found


def _usage(question: Question) -> dict[str, int]:
    tokens = sum(map(len, question.sequences))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def _write_classify(
    rewards: Sequence[float], question: Question, served: ServedModel
) -> dict[str, Any]:
    """Write the reward itself as the only "probability"; its sigmoid only where it is asked for."""
    asked = (question.body.get(name) for name in SQUASH)
    squash = any(value is True for value in asked)
    values = [_sigmoid(reward) if squash else reward for reward in rewards]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "data": [
            {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for index, value in enumerate(values)
        ],
        "usage": _usage(question),
        **_named(served),
    }


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def _write_embeddings(
    rewards: Sequence[float], question: Question, served: ServedModel
) -> dict[str, Any]:
    packed = question.body.get("encoding_format") == "base64"  # the openai client's default
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(r) if packed else [r]}
            for index, r in enumerate(rewards)
        ],
        "usage": _usage(question),
        **_named(served),
    }


def _base64(reward: float) -> str:
    return base64.b64encode(struct.pack("<f", reward)).decode("ascii")


FORMATS = {
    "score": Format(("/score",), _read_score, _write_score),
    "get_reward": Format(("/get_reward",), _read_get_reward, _write_get_reward),
    "classify": Format(("/classify", "/v1/classify"), _read_input, _write_classify),
    "embeddings": Format(("/v1/embeddings",), _read_input, _write_embeddings),
}
"""All formats by name."""
