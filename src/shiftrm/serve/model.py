"""The model that is served: loaded, checked, named by its content, and able to read requests."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shiftrm.errors import UserError, printable
from shiftrm.files import encodable
from shiftrm.models.finite import require_finite_weights
from shiftrm.models.loading import checkpoint_fingerprint, require_known_ids
from shiftrm.models.prefix import pack
from shiftrm.models.probes import sharing_obstacle
from shiftrm.models.rendering import encode
from shiftrm.models.responses import Response
from shiftrm.models.rope import context_limit
from shiftrm.models.scoring import Scorer
from shiftrm.models.templates import MARKER, render, turn
from shiftrm.serve.passes import Row, compute, rows_of

__all__ = ["ServedModel", "load_served", "resolved"]

HASH = 12
"""Characters of the checkpoint's hash in a version."""

LONG_TOKEN = 100
"""Characters that one token may stand for, at least: WordPiece's limit for an unknown word."""

CLOSE = 1e-5
"""Allowed difference of rewards with and without shared prefixes, relative to the larger of 1 and
the reward."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A reward model in the server. Requests that it has read are scored by it alone.

    Attributes:
        name: last part of its path.
        version: `name@hash`, equal for equal configuration, tokenizer and weights.
        folder: the path that was loaded, with links resolved.
        limit: maximum tokens of a sequence; None without one.
        obstacle: why responses to one prompt do not share it; None if they do.
        leads: how a chat begins in its template; see `_leads`.
        most: maximum characters of a text with its prompt; None without a limit.
    """

    scorer: Scorer
    name: str
    version: str
    folder: str
    limit: int | None
    obstacle: str | None
    leads: tuple[tuple[str, str], ...] = field(default=())
    most: int | None = None

    def whole_ids(self, text: str, *, special: bool = True, name: str = "text") -> list[int]:
        """Return the tokens of a text that holds a whole conversation, as a client has written it.

        Nothing is added at its end. What a chat template writes after the token that closes an
        answer, such as ChatML's newline, is left out: the reward is read at that token, as in
        training. BOS stands once at the start: before a chat if its template writes it (verl
        removes it there), before other texts if the tokenizer adds it.

        Args:
            special: False to read the text without BOS and whole.

        Raises:
            UserError: no tokens, or too many.
        """
        tokenizer = self.scorer.tokenizer
        self._require_readable(len(text), name)
        if special:
            ends = turn(tokenizer)
            if ends.tail.strip() and text.endswith(ends.tail):
                text = text[: -len(ends.tail)] + "".join(ends.closing)
            for bos, lead in self.leads:
                if text.startswith((bos + lead, lead)):
                    text, special = bos + text.removeprefix(bos), False
                    break
        if special:
            ids = encode(tokenizer, None, text, finished=False)
        else:
            ids = list(tokenizer(encodable(text), add_special_tokens=False)["input_ids"])
        return self.checked(ids, name)

    def response_ids(self, response: Response, *, name: str = "response") -> list[int]:
        """Return the tokens of a prompt with its response, as `Scorer` reads them.

        Raises:
            UserError: as `Scorer.encode_response`, or too many tokens.
        """
        content = (response.prompt, response.text, response.template_options)
        self._require_readable(_characters(content), name)
        if self.limit is not None and len(response.ids or ()) > self.limit:
            self._refuse_length(len(response.ids or ()), name)
        return self.checked(self.scorer.encode_response(response, name=name), name)

    def checked(self, ids: Sequence[int], name: str) -> list[int]:
        """Return token ids after checking that the model can read them.

        Raises:
            UserError: none, too many, or one that the model has no embedding for.
        """
        if not ids:
            raise UserError(f"{name}: has no tokens, so there is nothing to score")
        if self.limit is not None and len(ids) > self.limit:
            self._refuse_length(len(ids), name)
        require_known_ids(ids, self.scorer.vocabulary, name=name)
        return list(ids)

    def _refuse_length(self, tokens: int, name: str) -> None:
        raise UserError(
            f"{name}: has {tokens} tokens, and at most {self.limit} are served; shorten it, or "
            "leave it out"
        )

    def _require_readable(self, characters: int, name: str) -> None:
        """Refuse a text that cannot fit before it is made into tokens: others wait meanwhile."""
        if self.most is not None and characters > self.most:
            raise UserError(
                f"{name}: prompt and response have {characters} characters, and at most "
                f"{self.limit} tokens are served; texts of more than {self.most} characters are "
                "not read"
            )


def load_served(
    path: str | Path, *, max_length: int | None = None, hub: bool = True
) -> ServedModel:
    """Load a reward model, check it, and measure whether it can share prefixes.

    Args:
        path: checkpoint folder (of an ensemble, too) or hub name. A link is followed once.
        max_length: maximum tokens of a sequence, if below the model's context.
        hub: False to take the base of an adapter only from this machine.

    Raises:
        UserError: no such folder; as `Scorer.from_pretrained`; weights or rewards that are not
            finite.
    """
    given, folder = str(path), resolved(str(path))
    if not os.path.exists(folder) and _is_path(given):
        raise UserError(f"{given}: no such folder; give the folder of a reward model")
    fingerprint = checkpoint_fingerprint(folder)
    scorer = Scorer.from_pretrained(folder, **({} if hub else {"local_files_only": True}))
    require_finite_weights(scorer.model, folder)
    scorer.to_accelerator()
    scorer.model.requires_grad_(False)
    hashed = fingerprint or getattr(scorer.model.config, "_commit_hash", None) or "unknown"
    name = printable(Path(given).name or given)
    limits = [n for n in (context_limit(scorer.model.config), max_length) if n is not None]
    limit = min(limits, default=None)
    sequences = _probe(scorer, limit)
    alone = compute(scorer, sequences, rows_of(sequences, shared=False, budget=0))
    scorer.require_finite(list(alone.values()), [f"{given}: a short test"] * len(alone))
    return ServedModel(
        scorer,
        name,
        version=f"{_ascii(name)}@{hashed[:HASH]}",
        folder=folder,
        limit=limit,
        obstacle=_obstacle(scorer, sequences, alone),
        leads=_leads(scorer.tokenizer),
        most=None if limit is None else limit * _longest_token(scorer.tokenizer),
    )


def _longest_token(tokenizer: Any) -> int:
    """Return the characters that one token may stand for."""
    return max(LONG_TOKEN, *map(len, tokenizer.get_vocab()))


def _characters(content: Any) -> int:
    """Return the number of characters in all texts of a prompt, messages or options."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Mapping):
        return sum(map(_characters, content.values()))
    return sum(map(_characters, content)) if isinstance(content, list | tuple) else 0


def resolved(path: str) -> str:
    """Return a path with its links resolved; a hub name as it is."""
    return os.path.realpath(path) if os.path.exists(path) else path


def _is_path(given: str) -> bool:
    """Whether a name that does not exist is a path rather than `model` or `owner/model`."""
    parts = Path(given).parts
    if len(parts) != 2:
        return len(parts) != 1 or given != parts[0]
    return parts[0] in (os.sep, "..", "~") or given.startswith(".") or os.path.isdir(parts[0])


def _ascii(name: str) -> str:
    """Return a name that an HTTP header can hold."""
    return name.encode("ascii", "backslashreplace").decode("ascii")


def _probe(scorer: Scorer, limit: int | None) -> list[list[int]]:
    """Return four short sequences of unequal length with a common prefix."""
    size = scorer.vocabulary or len(scorer.tokenizer)
    special = set(scorer.tokenizer.all_special_ids)
    words = [i for i in range(min(size, 512)) if i not in special] or [0]
    most = 24 if limit is None else max(2, min(24, limit))
    prefix = [words[(7 * k) % len(words)] for k in range(most // 2)]
    rests = [(k + 1) * (most - len(prefix)) // 4 or 1 for k in range(4)]
    return [
        prefix + [words[(5 * k + 11 * n + 1) % len(words)] for n in range(rest)]
        for k, rest in enumerate(rests)
    ]


@torch.no_grad()
def _obstacle(scorer: Scorer, sequences: list[list[int]], alone: dict[int, float]) -> str | None:
    """Return why prefixes cannot be shared: a known reason, or rewards other than those `alone`."""
    if type(scorer) is not Scorer:
        return "its rewards come from several models, or from a posterior"
    rows = pack([sequences], pad_token_id=scorer.pad_token_id)
    device = next(scorer.model.parameters()).device
    found = sharing_obstacle(scorer.model, type(rows)(*(tensor.to(device) for tensor in rows)))
    if found is not None:
        return found
    row = Row(int(rows.lengths[0]), list(range(len(sequences))))
    shared = compute(scorer, sequences, [row])
    apart = max(abs(alone[i] - r) / max(1.0, abs(alone[i])) for i, r in shared.items())
    exact = next(scorer.model.parameters()).dtype in (torch.float32, torch.float64)
    if exact and apart > CLOSE:
        return f"its rewards then differ by {apart:.1e}"
    return None


def _leads(tokenizer: Any) -> tuple[tuple[str, str], ...]:
    """Return BOS as the chat template writes it, and what it writes between BOS and a first message
    of each role."""
    found = set()
    for role in ("system", "user"):
        try:
            text = render(tokenizer, [{"role": role, "content": MARKER}], {})
        except UserError:
            continue
        lead, bos = text.partition(MARKER)[0], tokenizer.bos_token or ""
        start = bos if bos and lead.startswith(bos) else ""
        if lead[len(start) :].strip():
            found.add((start, lead[len(start) :]))
    return tuple(sorted(found))
