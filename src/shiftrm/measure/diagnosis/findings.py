"""Read files of groups or pairs, score them under reward models, and diagnose the rewards."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shiftrm.data import prompt_keys
from shiftrm.data.groups import check_group
from shiftrm.data.pairs import check_pair
from shiftrm.data.replies import has_prompt
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.diagnosis.comparison import ModelChange, compare
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, ScoredFile, diagnose
from shiftrm.measure.diagnosis.pays import Pays, pays
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredPair, ScoredResponse
from shiftrm.measure.diagnosis.verdict import DiagnosisVerdict, Overall, overall, verdicts
from shiftrm.measure.score_once import Tokens, score_once, tokens_of
from shiftrm.measure.sight import PAIRS, sight_tests
from shiftrm.models.rendering import encode_prompt, is_conversational
from shiftrm.models.responses import Response
from shiftrm.models.rope import context_limit
from shiftrm.models.scoring import Scorer, row_responses
from shiftrm.progress import Advance


@dataclass(frozen=True)
class DataFile:
    """The rows of one file, each with its location, and their kind: groups or pairs."""

    name: str
    source: str
    kind: str
    rows: tuple[tuple[str, Row], ...]


def read_data(source: str, name: str) -> DataFile:
    """Read a file of groups `{"prompt", "responses", ...}` or pairs `{"chosen", "rejected", ...}`.

    Raises:
        UserError: no such file, no rows, rows of neither kind or of both, and what `read_groups`
            and `read_pairs` refuse; the message names the row.
    """
    kind, rows = "", []
    for where, row in iterate_rows(source):
        kind = kind or _kind(row, where)
        rows.append(
            (where, check_group(row, where) if kind == "groups" else check_pair(row, where))
        )
    if not rows:
        raise UserError(f"{source}: the file has no rows; expected groups or preference pairs")
    return DataFile(name, source, kind, tuple(rows))


def _kind(row: Row, where: str) -> str:
    if "responses" in row:
        return "groups"
    if "chosen" in row and "rejected" in row:
        return "pairs"
    raise UserError(
        f"{where}: neither a group (columns 'prompt', 'responses') nor a pair ('chosen', "
        f"'rejected'); the row has {', '.join(map(repr, row)) or 'no columns'}"
    )


def score_data(
    scorer: Scorer,
    data: DataFile,
    *,
    model: str,
    batch_size: int = 64,
    progress: Advance | None = None,
) -> tuple[ScoredFile, list[Row]]:
    """Score every response of a file.

    Rows with a response longer than the model's context are left out and counted.

    Args:
        scorer: the reward model.
        model: name of the model in the diagnosis.
        batch_size: rows per forward pass.
        progress: called with (done, total), in token sequences.

    Returns:
        The scored file, and the rows behind it in the same order.

    Raises:
        UserError: text that cannot be rendered, no row that fits, or a reward that is not finite.
    """
    fitting = encode_data(scorer, data)
    places: dict[Tokens, str] = {}
    for where, _, found in fitting:
        for sequence, _ in found:
            places.setdefault(sequence, where)
    rewards = score_once(scorer, places, name=model, batch_size=batch_size, progress=progress)
    number = {sequence: i for i, sequence in enumerate(places)}
    groups, pairs = [], []
    for where, row, found in fitting:
        responses = tuple(
            ScoredResponse(rewards[sequence], length, text.finished, number[sequence])
            for (sequence, length), text in zip(found, row_responses(row, where), strict=True)
        )
        if data.kind == "groups":
            groups.append(ScoredGroup(prompt_key(row), responses))
        else:
            pairs.append(ScoredPair(prompt_key(row), *responses))
    scored = ScoredFile(
        model, data.name, tuple(groups), tuple(pairs), left_out=len(data.rows) - len(fitting)
    )
    return scored, [row for _, row, _ in fitting]


def encode_data(scorer: Scorer, data: DataFile) -> list[tuple[str, Row, list[tuple[Tokens, int]]]]:
    """Return the location of each row, the row, and token ids and length of its responses.

    Rows in which a response is longer than the model's context are left out.

    Raises:
        UserError: text that cannot be rendered, or no row that fits.
    """
    encoded = [(where, row, _encode(scorer, row, where)) for where, row in data.rows]
    fitting = [(where, row, found) for where, row, found in encoded if found is not None]
    if not fitting:
        raise UserError(
            f"{data.source}: every row is longer than the model's context "
            f"({context_limit(scorer.model.config)} tokens); shorten the responses"
        )
    return fitting


def _encode(scorer: Scorer, row: Row, where: str) -> list[tuple[Tokens, int]] | None:
    """Return token ids and length of each response; None if one exceeds the context."""
    texts = row_responses(row, where)
    sequences = tokens_of(scorer, texts, where)
    if sequences is None:
        return None
    prefix = _prompt_length(scorer.tokenizer, texts, sequences)
    return [(sequence, len(sequence) - prefix) for sequence in sequences]


def _prompt_length(tokenizer: Any, texts: Sequence[Response], sequences: Sequence[Tokens]) -> int:
    """Count the tokens of the prompt, or without a prompt those that all sides share."""
    prompt, conversational = texts[0].prompt, is_conversational(texts[0].text)
    if prompt is None or prompt == []:
        return _shared(sequences)
    if isinstance(prompt, str) and conversational:
        prompt = [{"role": "user", "content": prompt}]
    # Tokens may merge across the boundary, so count only the common prefix.
    options = dict(texts[0].template_options)
    return _shared([encode_prompt(tokenizer, prompt, template_options=options), *sequences])


def prompt_key(row: Row) -> str:
    """Return a key that is equal for equal prompts.

    Without a prompt, it is the turns that all sides share, of a chat or as HH-RLHF writes them.
    Sides that share no turn but a system message may begin alike by accident: such a row counts
    as a prompt of its own.
    """
    if has_prompt(row):
        return prompt_keys.prompt_key(row["prompt"])
    sides = row.get("responses") or [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        before, marker, _ = sides[0][: _shared(sides)].rpartition("\n\nAssistant:")
        if marker:
            return str(before)
    elif all(isinstance(side, list) for side in sides):
        turns = sides[0][: _shared(sides)]
        if any(message["role"] != "system" for message in turns):
            return prompt_keys.prompt_key(turns)
    return json.dumps(sorted(json.dumps(side, sort_keys=True) for side in sides))


def _shared(sequences: Sequence[Sequence[Any]]) -> int:
    """Return the length of the common prefix (in tokens, characters or messages)."""
    return next(
        (
            i
            for i, column in enumerate(zip(*sequences, strict=False))
            if column.count(column[0]) < len(column)
        ),
        min(map(len, sequences)),
    )


Bar = Callable[[str, int | None], AbstractContextManager[Advance]]
"""`bar(label, total)` yields a function to call with (done, total); total None is unknown."""


def no_bar(label: str, total: int | None) -> AbstractContextManager[Advance]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Findings:
    """The results of a diagnosis. The first four lists correspond entry by entry."""

    files: list[ScoredFile]
    rows: list[list[Row]]
    diagnoses: list[Diagnosis]
    verdicts: list[DiagnosisVerdict]
    overall: list[Overall]
    comparisons: list[ModelChange]
    change: DiagnosisVerdict | None = None
    """The effect of an adaptation over all files."""

    @cached_property
    def pays(self) -> list[Pays]:
        """Return what every model pays for on every file where that can be measured."""
        return pays(self.files, self.rows)


def find(
    models: Mapping[str, str],
    data: Sequence[DataFile],
    *,
    load: Callable[[str], Scorer],
    batch_size: int = 64,
    seed: int = 0,
    sight_pairs: int = PAIRS,
    sight_kinds: Sequence[str] | None = None,
    bar: Bar = no_bar,
) -> Findings:
    """Score every file under every model, one model in memory at a time, and judge the rewards.

    Args:
        models: paths by name; the others are compared with the first.
        data: files; the first is the reference.
        load: loads the scorer of a path onto its device.
        batch_size: rows per forward pass.
        seed: seed of the bootstrap and of the pairs of sight tests.
        sight_pairs: pairs of each sight test on groups; 0 makes none.
        sight_kinds: the sight tests; by default all that are registered.
        bar: shows progress, in token sequences of a file.

    Raises:
        UserError: as `load` and `score_data`.
    """
    files, rows = [], []
    for model, path in models.items():
        scorer = load(path)
        for file in data:
            with bar(f"scoring {file.name} with {model}", None) as update:
                scored, behind = score_data(
                    scorer,
                    file,
                    model=model,
                    batch_size=batch_size,
                    progress=update,
                )
            if scored.groups and sight_pairs:
                with bar(f"sight tests on {file.name} with {model}", None) as update:
                    tests = sight_tests(
                        scorer,
                        behind,
                        kinds=sight_kinds,
                        count=sight_pairs,
                        seed=seed,
                        batch_size=batch_size,
                        progress=update,
                    )
                scored = replace(scored, sight=tuple(tests))
            files.append(scored)
            rows.append(behind)
        del scorer
    diagnoses = diagnose(files, seed=seed)
    words = verdicts(diagnoses)
    return Findings(
        files=files,
        rows=rows,
        diagnoses=diagnoses,
        verdicts=words,
        overall=overall(list(zip(diagnoses, words, strict=True))),
        comparisons=compare(files, diagnoses, seed=seed),
    )
