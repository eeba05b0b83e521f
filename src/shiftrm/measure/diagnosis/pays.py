"""What a reward model pays for: its rewards by measurable features, within prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured
from shiftrm.core.within import fit_within, spread_within
from shiftrm.files import Row
from shiftrm.measure.diagnosis.diagnosis import ScoredFile
from shiftrm.measure.diagnosis.scored import NOISE
from shiftrm.measure.features import FEATURES, measure_text, reading
from shiftrm.models.scoring import row_responses


@dataclass(frozen=True)
class Price:
    """What a model pays for one feature.

    Attributes:
        feature: its name.
        pays: change of the reward by one standard deviation more of the feature, the other features
            kept, in standard deviations of the reward; both are within prompts, on this file.
        change: `pays` less that of the first model; None for the first.
        spread: the standard deviation of the feature within prompts.
    """

    feature: str
    pays: Measured
    change: Measured | None
    spread: float


@dataclass(frozen=True)
class Pays:
    """What a model pays for on a file.

    Attributes:
        model, name: names of the reward model and of the file.
        against: the first model; None for itself, and if the rows differ.
        prompts, responses: numbers of prompts with two distinct responses, and these responses.
        explained: share of the variance within prompts that the features explain.
        prices: the features that vary within enough prompts, in the order of `FEATURES`.
    """

    model: str
    name: str
    against: str | None
    prompts: int
    responses: int
    explained: float
    prices: tuple[Price, ...]


_NO_CHANGE = Measured(0.0, 0.0, 0.0)  # where the two rewards do not differ at all


def prices(
    features: Mapping[str, Floats],
    rewards: Floats,
    prompts: Sequence[Hashable],
    *,
    unit: float,
    against: tuple[Floats, float] | None = None,
) -> tuple[tuple[Price, ...], tuple[float, int, int]] | None:
    """Return the prices, and the share explained with the numbers of prompts and responses.

    Args:
        features: values of each feature, one per response.
        rewards: of the same responses.
        prompts: the prompt of every response.
        unit: rewards are divided by it.
        against: other rewards of the same responses, and what they are divided by.

    Returns:
        None if nothing can be measured (see `fit_within`).
    """
    values = np.column_stack([*features.values()])
    fit = fit_within(values, rewards, prompts, scale=unit)
    if fit is None:
        return None
    change = None
    if against is not None:
        # One fit of the difference: its errors know that both models read the same responses.
        change = fit_within(values, rewards / unit - against[0] / against[1], prompts)
    found = []
    for i, name in enumerate(features):
        pays = fit.measured(i)
        if pays is not None:
            more = _NO_CHANGE if change is None else change.measured(i)
            found.append(
                Price(name, pays, None if against is None else more, float(fit.spreads_F[i]))
            )
    return tuple(found), (fit.explained, fit.prompts, fit.rows)


def pays(files: Sequence[ScoredFile], rows: Sequence[Sequence[Row]]) -> list[Pays]:
    """Return what every model pays for on every file, where that can be measured.

    Args:
        files: in the order of the user; further models are compared with the first.
        rows: the rows behind each file.
    """
    texts = _Texts()
    first: dict[str, _Distinct] = {}
    found = []
    for file, behind in zip(files, rows, strict=True):
        kept = _Distinct.of(file, behind)
        start = first.setdefault(file.name, kept)
        if kept.spread <= NOISE:
            continue
        other = start if kept.same_responses(start) and start.spread > NOISE else None
        measured = prices(
            texts.features(kept.places),
            kept.rewards,
            kept.prompts,
            unit=kept.spread,
            against=None if other is None else (other.rewards, other.spread),
        )
        if measured is not None:
            against = None if other is None else other.model
            priced, (explained, prompts, count) = measured
            found.append(Pays(file.model, file.name, against, prompts, count, explained, priced))
    return found


@dataclass(frozen=True)
class _Distinct:
    """The distinct responses to each prompt of a file: (row, number in the row), and rewards."""

    model: str
    places: list[tuple[Row, int]]
    rewards: Floats
    prompts: list[Hashable]

    @classmethod
    def of(cls, file: ScoredFile, rows: Sequence[Row]) -> _Distinct:
        places, rewards, prompts = [], [], []
        for row, group in zip(rows, file.unlabelled, strict=True):
            seen: set[Hashable] = set()
            for number, response in enumerate(group.responses):
                if response.key is None or response.key not in seen:
                    seen.add(response.key)
                    places.append((row, number))
                    rewards.append(response.reward)
                    prompts.append(group.prompt)
        return cls(file.model, places, np.array(rewards, dtype=np.float64), prompts)

    @property
    def spread(self) -> float:
        return spread_within(self.rewards, self.prompts)

    def same_responses(self, other: _Distinct) -> bool:
        """Whether another model scored the same responses."""
        return self.model != other.model and self.places == other.places


class _Texts:
    """Features of responses, measured once for all models."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Row, list[dict[str, float]]]] = {}

    def features(self, responses: Sequence[tuple[Row, int]]) -> dict[str, Floats]:
        """Return the values of every feature for (row, number of the response in it)."""
        found = [self._of_row(row)[number] for row, number in responses]
        return {
            name: np.array([values[name] for values in found], dtype=np.float64)
            for name in FEATURES.names()
        }

    def _of_row(self, row: Row) -> list[dict[str, float]]:
        if id(row) not in self._known:
            measured = [measure_text(reading(one)) for one in row_responses(row, "")]
            self._known[id(row)] = row, measured  # the row too, so that its id stays taken
        return self._known[id(row)][1]
