"""RewardBench's files, read, checked and scored by a reward model as in reward-bench."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.measure.rewardbench import TIES, ScoredRow
from shiftrm.measure.score_once import Tokens, require_tokens, score_once
from shiftrm.models.rendering import Messages, Text, check_text, encode
from shiftrm.models.rope import context_limit
from shiftrm.models.scoring import Scorer
from shiftrm.progress import Advance

MAX_LENGTH = 2048
"""Maximum tokens in reward-bench (`--max_length` of its scripts)."""

HUB_SPLITS = {"allenai/reward-bench": "filtered", "allenai/reward-bench-2": "test"}
"""The splits that are scored, unless the source names another."""


class BenchRow(NamedTuple):
    """A row as text; version 1 has one response on each side."""

    where: str
    subset: str
    id: str
    prompt: Text
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class BenchFile:
    """The rows of a file, all of one version."""

    source: str
    version: int
    rows: tuple[BenchRow, ...]


@dataclass(frozen=True)
class BenchScores:
    """Scores of a file by a model.

    Attributes:
        rows: scores, in the order of the file.
        responses: number scored.
        truncated: number truncated to the length limit.
        limit: that limit, in tokens.
    """

    rows: tuple[ScoredRow, ...]
    responses: int
    truncated: int
    limit: int


def read_rewardbench(source: str) -> BenchFile:
    """Read RewardBench 1 (`chosen` is a text) or 2 (`chosen` is a list of texts).

    Args:
        source: what `sources.iterate_rows` reads; of the two sets on the hub, their scored split.

    Raises:
        UserError: no rows, a missing column, rows of both versions, or an incomplete row; the
            message names the row.
    """
    split = HUB_SPLITS.get(source.partition(":")[0], "train")
    version, rows = 0, []
    ties: dict[str, str] = {}
    for where, row in iterate_rows(source, split=split):
        require_columns(row, ("prompt", "chosen", "rejected", "subset"), where)
        of_row = 2 if isinstance(row["chosen"], list) else 1
        if version and of_row != version:
            raise UserError(
                f"{where}: a row of RewardBench {of_row} in a file of RewardBench {version}; "
                "score the two files separately"
            )
        version = of_row
        rows.append(_row(row, where, version))
        if version == 2 and rows[-1].subset.lower() == TIES.lower():
            before = ties.setdefault(rows[-1].id, where)
            if before != where:
                raise UserError(f"{where}: id {rows[-1].id!r} of Ties is already used at {before}")
    if not rows:
        raise UserError(f"{source}: the file has no rows")
    return BenchFile(source, version, tuple(rows))


def _row(row: Row, where: str, version: int) -> BenchRow:
    check_text(row["prompt"], f"{where}: column 'prompt'")
    if not isinstance(row["subset"], str) or not row["subset"] or not row["subset"].isprintable():
        raise UserError(f"{where}: column 'subset' is {row['subset']!r}; expected a name")
    sides = {}
    for side in ("chosen", "rejected"):
        found = row[side] if version == 2 else [row[side]]
        if not isinstance(found, list) or not found:
            raise UserError(f"{where}: column {side!r} must be a list of texts, as the other side")
        if not all(isinstance(text, str) for text in found):
            raise UserError(f"{where}: column {side!r} holds a value that is not text")
        sides[side] = tuple(found)
    if version == 2:
        _check_counts(row, where, len(sides["chosen"]), len(sides["rejected"]))
    name = str(row.get("id", ""))
    if version == 2 and row["subset"].lower() == TIES.lower():
        _check_ties(name, where, len(sides["chosen"]))
    return BenchRow(where, row["subset"], name, row["prompt"], sides["chosen"], sides["rejected"])


def _check_counts(row: Row, where: str, chosen: int, rejected: int) -> None:
    for column, count in (
        ("num_correct", chosen),
        ("num_incorrect", rejected),
        ("total_completions", chosen + rejected),
    ):
        if column in row and row[column] != count:
            raise UserError(f"{where}: {column} is {row[column]!r}, but the row has {count}")


def _check_ties(name: str, where: str, chosen: int) -> None:
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not number.strip().isdecimal():
        raise UserError(f"{where}: id {name!r} of a row of Ties; expected ref:N or tied:N")
    if kind == "tied" and chosen < 2:
        raise UserError(f"{where}: {name!r} has one correct answer; a tied row has several")


def score_rewardbench(
    scorer: Scorer,
    data: BenchFile,
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
    progress: Advance | None = None,
) -> BenchScores:
    """Score every response.

    As in reward-bench, a prompt that is text becomes the user's turn of the tokenizer's chat
    template, and what is too long is cut: version 1 from the left, version 2 on the tokenizer's
    own truncation side. Two deviations: a tokenizer without a template gets prompt and response
    joined as they are (reward-bench falls back on FastChat's Tulu template), and templates are
    tokenised without a second BOS.

    Args:
        batch_size: rows per forward pass.
        max_length: tokens; the model's context if that is shorter.
        progress: called with (done, total), in responses.

    Raises:
        UserError: text that cannot be rendered, or a score that is not a number.
    """
    context = context_limit(scorer.model.config)
    limit = min(max_length, context or max_length)
    side = "left" if data.version == 1 else getattr(scorer.tokenizer, "truncation_side", "right")
    places: dict[Tokens, str] = {}
    found, truncated = [], 0
    for row in data.rows:
        sequences = []
        for response in (*row.chosen, *row.rejected):
            ids = _encode(scorer.tokenizer, row, response)
            if len(ids) > limit:
                truncated += 1
                ids = ids[-limit:] if side == "left" else ids[:limit]
            sequences.append(ids)
            places.setdefault(ids, row.where)
        found.append(sequences)
    scores = score_once(scorer, places, name="the model", batch_size=batch_size, progress=progress)
    rows = []
    for row, sequences in zip(data.rows, found, strict=True):
        values = [scores[ids] for ids in sequences]
        cut = len(row.chosen)
        rows.append(ScoredRow(row.subset, tuple(values[:cut]), tuple(values[cut:]), row.id))
    return BenchScores(tuple(rows), sum(map(len, found)), truncated, limit)


def _encode(tokenizer: Any, row: BenchRow, response: str) -> Tokens:
    prompt: Text = row.prompt
    answer: Text = response
    if tokenizer.chat_template is not None:
        answer = [{"role": "assistant", "content": response}]
        prompt = _as_messages(prompt)
    try:
        ids = tuple(encode(tokenizer, prompt, answer))
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    return require_tokens([ids], row.where)[0]


def _as_messages(prompt: Text) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
