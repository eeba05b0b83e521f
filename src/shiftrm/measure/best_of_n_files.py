"""Samples of a policy from a file, with proxy and gold scores from columns or reward models.

Files may be large (a thousand prompts with 16,384 samples), so they are read row by row, and only
the scores are kept.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.score_once import Tokens, score_once, tokens_of
from shiftrm.models.scoring import Scorer, row_responses
from shiftrm.progress import Advance
from shiftrm.world.world import World

Scores = Callable[[Sequence[tuple[str, Row]]], list[Floats | None]]
"""Maps rows with their locations to scores of each row's samples; None leaves a row out."""

_SAMPLES_A_CALL = 1024  # samples between updates of the progress bar


@dataclass
class ScoredSamples:
    """Scores by prompt.

    Attributes:
        proxy, gold: one array per prompt, of equal length.
        left_out: number of rows with a sample longer than a model's context.
    """

    proxy: list[Floats] = field(default_factory=list)
    gold: list[Floats] = field(default_factory=list)
    left_out: int = 0


def column_scores(name: str) -> Scores:
    """Return scores from a column: a list per row, or one number if a row is a sample."""

    def scores(rows: Sequence[tuple[str, Row]]) -> list[Floats | None]:
        return [_numbers(row[name], f"{where}: column {name!r}") for where, row in rows]

    return scores


def gold_world_scores(world: World) -> Scores:
    """Return a gold world's true rewards; a prompt that is not in its language is a `UserError`."""

    def scores(rows: Sequence[tuple[str, Row]]) -> list[Floats | None]:
        return [_gold(world, row, where) for where, row in rows]

    return scores


def _gold(world: World, row: Row, where: str) -> Floats:
    texts = row_responses(row, where)
    try:
        return np.array(
            [world.gold_reward(t.prompt, t.text, finished=t.finished) for t in texts]  # type: ignore[arg-type]
        )
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(
            f"{where}: not a row of the gold world ({error}); give a reward model as --gold"
        ) from None


def model_scores(scorer: Scorer, name: str, *, batch_size: int = 64) -> Scores:
    """Return rewards of a model; equal samples of a row get equal rewards.

    Args:
        name: name of the model in errors.
    """

    def scores(rows: Sequence[tuple[str, Row]]) -> list[Floats | None]:
        found = [tokens_of(scorer, row_responses(row, where), where) for where, row in rows]
        places: dict[Tokens, str] = {}
        for (where, _), sequences in zip(rows, found, strict=True):
            for sequence in sequences or ():
                places.setdefault(sequence, where)
        rewards = score_once(scorer, places, name=name, batch_size=batch_size)
        return [None if s is None else np.array([rewards[tokens] for tokens in s]) for s in found]

    return scores


def count_samples(source: str, *, columns: Sequence[str], texts: bool) -> int:
    """Count the samples of a file, and check every row.

    Args:
        columns: scores that every row must have.
        texts: whether the samples are required, for a model to read.

    Raises:
        UserError: no rows, an incomplete row, or lists of different length.
    """
    total = 0
    for where, row in iterate_rows(source, required=("prompt",)):
        sizes = {}
        if texts:
            sizes["responses"] = len(row_responses(row, where))
        for name in columns:
            if name not in row:
                raise UserError(
                    f"{where}: column {name!r} is missing; give a reward model as --proxy and "
                    f"--gold, or the name of a column of scores; the row has "
                    f"{', '.join(map(repr, row))}"
                )
            sizes[name] = len(_numbers(row[name], f"{where}: column {name!r}"))
        if len(set(sizes.values())) > 1:
            counts = " and ".join(f"{size} in {name!r}" for name, size in sizes.items())
            raise UserError(f"{where}: {counts}; every sample needs one score of each kind")
        total += next(iter(sizes.values()))
    if not total:
        raise UserError(f"{source}: the file has no samples")
    return total


def score_samples(
    source: str,
    proxy: Scores,
    gold: Scores,
    *,
    progress: Advance | None = None,
    total: int = 0,
) -> ScoredSamples:
    """Return proxy and gold of every sample; rows with the same prompt are merged.

    Args:
        source: rows as `count_samples` accepts them.
        proxy, gold: `column_scores`, `model_scores` or `gold_world_scores`.
        progress: called with (samples done, total).

    Raises:
        UserError: as the scores raise, or no row fits both models.
    """
    by_prompt: dict[str, tuple[list[Floats], list[Floats]]] = {}
    left_out, done = 0, 0
    for rows in _chunks(source):
        found = zip(proxy(rows), gold(rows), strict=True)
        for (_, row), (proxies, golds) in zip(rows, found, strict=True):
            if proxies is None or golds is None:
                left_out += 1
                continue
            kept = by_prompt.setdefault(json.dumps(row["prompt"]), ([], []))
            kept[0].append(proxies)
            kept[1].append(golds)
        done += sum(_size(row) for _, row in rows)
        if progress is not None:
            progress(done, total)
    if not by_prompt:
        raise UserError(f"{source}: every row is longer than a model's context; shorten the texts")
    scored = ScoredSamples(left_out=left_out)
    for proxies_, golds_ in by_prompt.values():
        scored.proxy.append(np.concatenate(proxies_))
        scored.gold.append(np.concatenate(golds_))
    return scored


def _chunks(source: str) -> Iterator[list[tuple[str, Row]]]:
    rows: list[tuple[str, Row]] = []
    held = 0
    for where, row in iterate_rows(source, required=("prompt",)):
        rows.append((where, row))
        held += _size(row)
        if held >= _SAMPLES_A_CALL:
            yield rows
            rows, held = [], 0
    if rows:
        yield rows


def _size(row: Row) -> int:
    sizes = [len(value) for value in row.values() if isinstance(value, list)]
    return max([len(row["responses"])] if "responses" in row else [*sizes, 1])


def _numbers(value: Any, what: str) -> Floats:
    values = value if isinstance(value, list) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(f"{what} holds {number!r:.40}; expected numbers")
        if not abs(number) <= sys.float_info.max:  # JSON integers are unbounded
            raise UserError(f"{what} holds {number!r:.40}; expected finite numbers")
    if not values:
        raise UserError(f"{what} is an empty list; remove the row")
    return np.array(values, dtype=np.float64)
