"""Diversity of responses in files, within and across prompts.

Within prompts: similarity of the K responses to a prompt, averaged over prompts, with bootstrap
intervals. Across prompts: similarity of a set with one response per prompt, as in the MetaRM paper.
Both are from Kirk et al. 2024 (arXiv 2310.06452).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, measured_mean
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.diagnosis.thresholds import FEW_PROMPTS
from shiftrm.measure.diversity import (
    SELF_BLEU_ORDERS,
    Ngrams,
    jackknifed,
    set_diversity,
    tokenise,
)
from shiftrm.measure.embeddings import Embedder
from shiftrm.models.rendering import Text
from shiftrm.models.scoring import row_responses
from shiftrm.progress import Advance

WITHIN, ACROSS = "within prompts", "across prompts"

_LONG_WORD = 15.0  # mean characters per token from which the script seems to lack spaces
_TEXTS_A_CALL = 512  # texts embedded between updates of the progress bar


@dataclass(frozen=True)
class ResponseFile:
    """Responses by prompt, in the order of the file; none of them empty.

    Attributes:
        groups: by prompt (as JSON); prompts whose responses are all empty are left out.
        empty: number of responses left out as empty or only spaces.
    """

    name: str
    source: str
    groups: dict[str, tuple[str, ...]]
    empty: int


@dataclass(frozen=True)
class Diversity:
    """Numbers of a file in a scope.

    Attributes:
        name: name of the file.
        scope: `WITHIN` or `ACROSS`.
        prompts, responses: numbers compared, after cutting all files to one size.
        values: by metric, see `diversity.set_diversity`; across, with intervals of a jackknife.
    """

    name: str
    scope: str
    prompts: int
    responses: int
    values: dict[str, Measured]


@dataclass(frozen=True)
class DiversityReport:
    """All files.

    Attributes:
        diversities: by file and scope.
        lengths: mean tokens of a response, by file.
        empty, duplicates: responses left out as empty, and share of responses to one prompt that
            are the same text as an earlier one, by file.
        lines: the comparison in words; warnings begin with "!".
    """

    diversities: tuple[Diversity, ...]
    lengths: dict[str, float]
    empty: dict[str, int]
    duplicates: dict[str, float]
    lines: tuple[str, ...]


def read_responses(source: str, name: str) -> ResponseFile:
    """Read rows `{"prompt", "responses"}` or `{"prompt", "response"}`, and merge equal prompts.

    Raises:
        UserError: no rows, a row without responses, or no response that is not empty.
    """
    groups: dict[str, list[str]] = {}
    empty = 0
    for where, row in iterate_rows(source, required=("prompt",)):
        texts = groups.setdefault(json.dumps(row["prompt"]), [])
        for response in _responses(row, where):
            if response.strip():
                texts.append(response)
            else:
                empty += 1
    if not groups:
        raise UserError(f"{source}: the file has no rows")
    kept = {prompt: tuple(texts) for prompt, texts in groups.items() if texts}
    if not kept:
        raise UserError(f"{source}: every response is empty, so there is nothing to compare")
    return ResponseFile(name, source, kept, empty)


def _responses(row: Row, where: str) -> list[str]:
    if "response" not in row and "responses" not in row:
        raise UserError(
            f"{where}: expected a column 'responses' or 'response'; the row has "
            f"{', '.join(map(repr, row))}"
        )
    return [_plain(text.text) for text in row_responses(row, where)]


def _plain(text: Text) -> str:
    """Return a response's text, or the contents of its messages."""
    if isinstance(text, str):
        return text
    parts = []
    for message in text:
        content = message.get("content") or ""
        parts.append(content if isinstance(content, str) else json.dumps(content))
    return "\n".join(parts)


def measure_diversity(
    files: Sequence[ResponseFile],
    *,
    embed: Embedder | None = None,
    scopes: Sequence[str] = (WITHIN, ACROSS),
    tokenizer: str = "13a",
    max_prompts: int | None = None,
    seed: int = 0,
    progress: Advance | None = None,
) -> DiversityReport:
    """Measure the diversity of every file, cut to prompts and responses that all files have.

    If all files contain the prompts of the smallest one, these are compared, otherwise as many from
    each. A scope for which a file is too small is left out with a remark.

    Args:
        embed: maps texts to vectors; None for no embedding similarity and no sum.
        scopes: within prompts, the first K responses to a prompt are used, where K is the minimum
            of any prompt (at least two); across prompts, the first one.
        tokenizer: see `diversity.tokenise`.
        max_prompts: if there are more, so many are drawn at random.
        seed: seed of that draw, the bootstrap and the jackknife.
        progress: called with (done, total), in responses.

    Raises:
        UserError: no scope can be measured.
    """
    chosen = _same_prompts(files, max_prompts, seed)
    plans = {scope: _sets(chosen, scope) for scope in (WITHIN, ACROSS) if scope in scopes}
    total = sum(len(group) for cut in plans.values() for sets in cut for group in sets)
    count = _Count(embed, progress, total)
    found: list[Diversity] = []
    missing: list[str] = []
    for scope, cut in plans.items():
        for file, sets in zip(files, cut, strict=True):
            if len(sets) < (1 if scope == WITHIN else 2):
                need = "two responses to one prompt" if scope == WITHIN else "two prompts"
                missing.append(f"! {file.name}: not measured {scope}, which needs {need}.")
                continue
            measure = _within if scope == WITHIN else _across
            found.append(measure(file.name, sets, count, tokenizer=tokenizer, seed=seed))
    if not found:
        raise UserError(
            f"{files[0].source}: nothing to compare; give two responses to a prompt, or two prompts"
        )
    report = DiversityReport(
        diversities=tuple(found),
        lengths={
            file.name: _mean_length(groups, tokenizer)
            for file, groups in zip(files, chosen, strict=True)
        },
        empty={file.name: file.empty for file in files},
        duplicates={file.name: _duplicates(file) for file in files},
        lines=(),
    )
    words = [*_comparisons(report), *_cautions(report, files, chosen, tokenizer), *missing]
    return replace(report, lines=tuple(words))


class _Count:
    """The embedder, if any, and the progress over all sets, in responses."""

    def __init__(self, embed: Embedder | None, progress: Advance | None, total: int) -> None:
        self._embed, self._total, self._done = embed, total, 0
        self._progress = progress or (lambda done, total: None)

    def vectors(self, texts: Sequence[str]) -> Floats | None:
        """Return the vectors of all texts; None without an embedder."""
        if self._embed is None:
            return None
        found = []
        for start in range(0, len(texts), _TEXTS_A_CALL):
            found.append(self._embed(texts[start : start + _TEXTS_A_CALL]))
            self._add(len(found[-1]))
        return np.concatenate(found)

    def measured(self, count: int) -> None:
        """Count measured responses, unless the embedder has counted them."""
        if self._embed is None:
            self._add(count)

    def _add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _sets(chosen: Sequence[dict[str, tuple[str, ...]]], scope: str) -> list[list[tuple[str, ...]]]:
    """Return the sets of each file: K responses of each prompt, or the first of each."""
    if scope == ACROSS:
        return [[texts[:1] for texts in groups.values()] for groups in chosen]
    sizes = {len(texts) for groups in chosen for texts in groups.values() if len(texts) > 1}
    size = min(sizes, default=0)
    return [[t[:size] for t in groups.values() if len(t) >= size > 1] for groups in chosen]


def _same_prompts(
    files: Sequence[ResponseFile], max_prompts: int | None, seed: int
) -> list[dict[str, tuple[str, ...]]]:
    """Return the prompts of each file that are compared."""
    smallest = min(files, key=lambda file: len(file.groups))
    shared = [p for p in smallest.groups if all(p in file.groups for file in files)]
    count = min(len(smallest.groups), max_prompts or len(smallest.groups))
    rng = np.random.default_rng(seed)
    if len(shared) == len(smallest.groups):
        kept = _draw(shared, count, rng)
        return [{prompt: file.groups[prompt] for prompt in kept} for file in files]
    return [
        {prompt: file.groups[prompt] for prompt in _draw(list(file.groups), count, rng)}
        for file in files
    ]


def _draw(prompts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    if count == len(prompts):
        return prompts
    return [prompts[i] for i in np.sort(rng.choice(len(prompts), count, replace=False))]


def _within(
    name: str, sets: Sequence[Sequence[str]], count: _Count, *, tokenizer: str, seed: int
) -> Diversity:
    vectors = count.vectors([text for texts in sets for text in texts])
    per_prompt: dict[str, list[float]] = {}
    size = len(sets[0])
    for k, texts in enumerate(sets):
        of_set = None if vectors is None else vectors[k * size : (k + 1) * size]
        tokens = _tokens(texts, tokenizer)
        for metric, value in set_diversity(texts, tokens, of_set).items():
            per_prompt.setdefault(metric, []).append(value)
        count.measured(size)
    values = {
        metric: measured_mean(np.array(numbers), range(len(numbers)), seed=seed)
        for metric, numbers in per_prompt.items()
    }
    return Diversity(name, WITHIN, len(sets), len(sets) * size, values)


def _across(
    name: str, sets: Sequence[Sequence[str]], count: _Count, *, tokenizer: str, seed: int
) -> Diversity:
    texts = [text for group in sets for text in group]
    ngrams = Ngrams(_tokens(texts, tokenizer), max(SELF_BLEU_ORDERS))
    vectors = count.vectors(texts)

    def statistic(kept: NDArray[np.int64]) -> dict[str, float]:
        return set_diversity(texts, ngrams, vectors, kept=kept)

    values = jackknifed(statistic, len(texts), seed=seed)
    count.measured(len(texts))
    for metric, value in values.items():
        if metric.startswith(("self_bleu", "distinct")) and value.low is not None:
            # Clip to [0, 1], since they are shares.
            ends = (max(0.0, value.low), min(1.0, value.high or 1.0))
            values[metric] = Measured(value.value, *ends)
    return Diversity(name, ACROSS, len(texts), len(texts), values)


def _tokens(texts: Sequence[str], tokenizer: str) -> list[list[str]]:
    # A text of invisible characters may have no token; it then counts as one token.
    return [words or [text] for words, text in zip(tokenise(texts, tokenizer), texts, strict=True)]


def _duplicates(file: ResponseFile) -> float:
    repeated = sum(len(texts) - len(set(texts)) for texts in file.groups.values())
    return repeated / sum(map(len, file.groups.values()))


def _mean_length(groups: dict[str, tuple[str, ...]], tokenizer: str) -> float:
    texts = [text for group in groups.values() for text in group]
    return sum(map(len, _tokens(texts, tokenizer))) / len(texts)


def _comparisons(report: DiversityReport) -> list[str]:
    """Compare every further file with the first, by the sum or, without vectors, by Self-BLEU."""
    lines = []
    for scope in (WITHIN, ACROSS):
        found = [d for d in report.diversities if d.scope == scope]
        for other in found[1:]:
            first = found[0]
            metric = "similarity" if "similarity" in first.values else "self_bleu"
            called = "similarity" if metric == "similarity" else "Self-BLEU"
            a, b = first.values[metric], other.values[metric]
            numbers = f"{called} {b} against {a}"
            if other.prompts < FEW_PROMPTS:
                numbers += f" ({other.prompts} prompts; fewer than {FEW_PROMPTS} show nothing)"
            lines.append(
                f"{other.name} is {_word(a, b, other.prompts)} {first.name} {scope}: {numbers}."
            )
    return lines


def _word(before: Measured, after: Measured, prompts: int) -> str:
    """Compare two values; clear only if intervals do not overlap (stricter than a 5 % test)."""
    ends = (before.low, before.high, after.low, after.high)
    if prompts >= FEW_PROMPTS and all(end is not None for end in ends):
        if after.low > before.high:  # type: ignore[operator]
            return "less diverse than"
        if after.high < before.low:  # type: ignore[operator]
            return "more diverse than"
    return "not clearly more or less diverse than"


def _cautions(
    report: DiversityReport,
    files: Sequence[ResponseFile],
    chosen: Sequence[dict[str, tuple[str, ...]]],
    tokenizer: str,
) -> list[str]:
    lines = []
    low, high = min(report.lengths.values()), max(report.lengths.values())
    if high > 1.5 * low:
        lines.append(
            f"! Responses differ in length ({low:.0f} to {high:.0f} tokens on average), and "
            "Self-BLEU, distinct n-grams and compression depend on it."
        )
    for file in files:
        if file.empty:
            lines.append(f"! {file.name}: {file.empty} empty responses left out.")
        if report.duplicates[file.name] > 0.2:
            share = f"{100 * report.duplicates[file.name]:.0f} %"
            lines.append(f"! {file.name}: {share} of the responses repeat another to the prompt.")
    for file, groups in zip(files, chosen, strict=True):
        if len(groups) < len(file.groups):
            lines.append(
                f"! {file.name}: {len(groups)} of {len(file.groups)} prompts are compared."
            )
        characters = sum(len("".join(t.split())) for group in groups.values() for t in group)
        words = report.lengths[file.name] * sum(map(len, groups.values()))
        if tokenizer != "char" and characters / words > _LONG_WORD:
            lines.append(
                f"! {file.name}: {characters / words:.0f} characters a token, as in scripts "
                "without spaces; use --tokenize char."
            )
    return lines
