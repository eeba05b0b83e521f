"""All numbers of one file under one reward model, as plain data for JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shiftrm.core.discrimination import (
    Floats,
    calibration_curve,
    calibration_error,
    correlation,
)
from shiftrm.core.intervals import RESAMPLES, Measured, measured, measured_mean, weighted_mean
from shiftrm.measure.diagnosis.scored import NOISE, ScoredGroup, ScoredPair, distinct
from shiftrm.measure.diagnosis.spread import Spread, spread, variance_ratio
from shiftrm.measure.sight import SightTest


@dataclass(frozen=True)
class Lengths:
    """Relation of length and reward.

    Attributes:
        length_mean: mean tokens of a response.
        correlation, correlation_within: Pearson's, of reward and length, over all distinct
            responses and after subtracting each prompt's means. None if either is constant (or
            rewards within prompts differ by less than noise).
        longest_best_share: prompts (with responses of different length) whose best response is the
            longest; responses that share the best reward count fractionally.
        longest_best_chance: the same for a random best response.
        truncated_share: responses cut off by a limit.
        truncated_gap: mean reward of cut-off minus finished responses, prompt by prompt, over the
            `truncated_prompts` prompts that have both.
    """

    length_mean: float
    correlation: float | None
    correlation_within: float | None
    longest_best_share: float | None
    longest_best_chance: float | None
    truncated_share: float
    truncated_gap: float | None
    truncated_prompts: int


def lengths(groups: Sequence[ScoredGroup]) -> Lengths:
    """See `Lengths`.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("no groups")
    responses = [response for group in groups for response in group.responses]
    single = [distinct(group) for group in groups]
    tables = [_columns(group) for group in single]  # [2, K] each: rewards and lengths
    together = np.concatenate(tables, axis=1)
    within = np.concatenate([_centred(table) for table in tables], axis=1)
    shares = [_longest_best(table) for table in tables if table[1].min() < table[1].max()]
    gaps = [gap for group in single if (gap := _cut_off_gap(group)) is not None]
    return Lengths(
        length_mean=float(np.mean([response.length for response in responses])),
        correlation=correlation(together[0], together[1]),
        correlation_within=(
            correlation(within[0], within[1]) if np.abs(within[0]).max() > NOISE else None
        ),
        longest_best_share=float(np.mean([best for best, _ in shares])) if shares else None,
        longest_best_chance=float(np.mean([chance for _, chance in shares])) if shares else None,
        truncated_share=float(np.mean([not response.finished for response in responses])),
        truncated_gap=float(np.mean(gaps)) if gaps else None,
        truncated_prompts=len(gaps),
    )


def _columns(group: ScoredGroup) -> Floats:
    """Return rewards and lengths, shape [2, K]."""
    return np.array([[r.reward, r.length] for r in group.responses], dtype=np.float64).T


def _centred(table: Floats) -> Floats:
    """Subtract each row's mean, after its first entry, so that equal values give exact zeros."""
    table = table - table[:, :1]
    return table - table.mean(axis=1, keepdims=True)


def _longest_best(table: Floats) -> tuple[float, float]:
    """Return the share of longest responses among the best ones, and among all."""
    rewards, length = table
    longest = length == length.max()
    return float(longest[rewards == rewards.max()].mean()), float(longest.mean())


def _cut_off_gap(group: ScoredGroup) -> float | None:
    cut_off = [r.reward for r in group.responses if not r.finished]
    finished = [r.reward for r in group.responses if r.finished]
    return float(np.mean(cut_off) - np.mean(finished)) if cut_off and finished else None


@dataclass(frozen=True)
class Labels:
    """Agreement of rewards with labels. Pairs with equal tokens on both sides are left out.

    Attributes:
        pairs, prompts: numbers after that.
        same_share: share of pairs that were left out.
        accuracy: share ordered as labelled, equal rewards counting 1/2.
        auc: see `discrimination.auc`.
        calibration_error: see there; without an interval, since resampling increases it.
        margin_mean: mean r(chosen) - r(rejected).
        accuracy_shorter, accuracy_longer: accuracy on pairs whose chosen response is shorter or
            longer, with the number of such pairs.
        curve: (stated probability, accuracy, pairs) of every non-empty bin.
    """

    pairs: int
    prompts: int
    same_share: float
    accuracy: Measured
    auc: Measured
    calibration_error: float
    margin_mean: Measured
    accuracy_shorter: Measured | None
    pairs_shorter: int
    accuracy_longer: Measured | None
    pairs_longer: int
    curve: list[tuple[float, float, int]] = field(default_factory=list)


def labels(
    pairs: Sequence[ScoredPair], *, seed: int = 0, resamples: int = RESAMPLES
) -> Labels | None:
    """See `Labels`; None if no pair has two different sides."""
    kept = [p for p in pairs if p.chosen.key is None or p.chosen.key != p.rejected.key]
    if not kept:
        return None
    prompts = [pair.prompt for pair in kept]
    chosen = np.array([pair.chosen.reward for pair in kept])
    rejected = np.array([pair.rejected.reward for pair in kept])
    longer_by = np.array([pair.chosen.length - pair.rejected.length for pair in kept])
    margin = chosen - rejected
    right = np.where(margin == 0, 0.5, margin > 0).astype(np.float64)
    of_auc = _WeightedAuc(chosen, rejected)

    def mean(values: Floats) -> Measured:
        return measured_mean(values, prompts, seed=seed, resamples=resamples)

    def accuracy_at(where: NDArray[np.bool_]) -> Measured | None:
        """Return the accuracy on the pairs at `where`, resampling the prompts of all pairs."""
        return measured(
            lambda w: weighted_mean(right, w * where), prompts, seed=seed, resamples=resamples
        )

    area = measured(of_auc, prompts, seed=seed, resamples=resamples)
    assert area is not None
    curve = zip(*(column.tolist() for column in calibration_curve(margin)), strict=True)
    return Labels(
        pairs=len(kept),
        prompts=len(set(prompts)),
        same_share=1 - len(kept) / len(pairs),
        accuracy=mean(right),
        auc=area,
        calibration_error=calibration_error(margin),
        margin_mean=mean(margin),
        accuracy_shorter=accuracy_at(longer_by < 0),
        pairs_shorter=int((longer_by < 0).sum()),
        accuracy_longer=accuracy_at(longer_by > 0),
        pairs_longer=int((longer_by > 0).sum()),
        curve=[(stated, share, int(count)) for stated, share, count in curve],
    )


class _WeightedAuc:
    """AUC for weighted pairs. It sorts once, since a bootstrap calls it a thousand times."""

    def __init__(self, chosen: Floats, rejected: Floats) -> None:
        values, rank = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
        self._size = values.size
        self._chosen, self._rejected = rank[: chosen.size], rank[chosen.size :]

    def __call__(self, weights: Floats) -> float:
        total = weights.sum()
        if total == 0:
            return float("nan")
        at = np.bincount(self._rejected, weights, minlength=self._size)
        not_above = np.cumsum(at) - 0.5 * at  # below, and half of those equal
        return float((weights * not_above[self._chosen]).sum() / total**2)


_MANY = 20_000  # from this many rows on, fewer resamples suffice


@dataclass(frozen=True)
class ScoredFile:
    """One reward model's scores of one file: groups, or labelled pairs.

    Attributes:
        left_out: rows longer than the model's context.
        sight: sight tests on the groups; none for pairs.
    """

    model: str
    name: str
    groups: tuple[ScoredGroup, ...] = ()
    pairs: tuple[ScoredPair, ...] = ()
    left_out: int = 0
    sight: tuple[SightTest, ...] = ()

    @property
    def kind(self) -> str:
        """Return "pairs" or "groups"."""
        return "pairs" if self.pairs else "groups"

    @property
    def unlabelled(self) -> tuple[ScoredGroup, ...]:
        """Return the groups, or the pairs as groups of two."""
        return self.groups or tuple(pair.as_group() for pair in self.pairs)


@dataclass(frozen=True)
class Shift:
    """A file compared with the reference file under the same reward model.

    Attributes:
        reference, reference_kind: the reference file's name, and whether it holds groups or pairs.
        variance_ratio: variance of reward differences over the reference's; None if that is 0.
        reward_shift: mean reward minus the reference's, in standard deviations of the latter.
        length_ratio: mean length over the reference's.
        duplicates_change: duplicate share minus the reference's.
    """

    reference: str
    reference_kind: str
    variance_ratio: Measured | None
    reward_shift: float | None
    length_ratio: float | None
    duplicates_change: float


@dataclass(frozen=True)
class Diagnosis:
    """All numbers of one file under one model.

    Attributes:
        model, name: names of the reward model and of the file.
        kind: "groups" or "pairs".
        rows, left_out: number of rows scored, and number too long for the model.
        labels: None for groups, or if both sides of every pair are the same.
        shift: None for the reference file itself.
        sight: sight tests; none for pairs, or if they were switched off.
    """

    model: str
    name: str
    kind: str
    rows: int
    left_out: int
    spread: Spread
    lengths: Lengths
    labels: Labels | None
    shift: Shift | None
    sight: tuple[SightTest, ...] = ()


def diagnose(files: Sequence[ScoredFile], *, seed: int = 0) -> list[Diagnosis]:
    """Compute the numbers of every file; each model's first file is its reference.

    Args:
        files: in the order given by the user.
        seed: seed of the bootstrap.

    Raises:
        ValueError: a file without rows, or with a group of fewer than two responses.
    """
    references: dict[str, tuple[ScoredFile, Diagnosis]] = {}
    found = []
    for file in files:
        diagnosis = _diagnose(file, references.get(file.model), seed=seed)
        references.setdefault(file.model, (file, diagnosis))
        found.append(diagnosis)
    return found


def _diagnose(
    file: ScoredFile, reference: tuple[ScoredFile, Diagnosis] | None, *, seed: int
) -> Diagnosis:
    groups = file.unlabelled
    resamples = RESAMPLES if len(groups) < _MANY else RESAMPLES // 5
    spread_ = spread(groups, seed=seed, resamples=resamples)
    lengths_ = lengths(groups)
    shift = None
    if reference is not None:
        other, numbers = reference
        before, length = numbers.spread, numbers.lengths.length_mean
        shift = Shift(
            reference=other.name,
            reference_kind=other.kind,
            variance_ratio=variance_ratio(groups, other.unlabelled, seed=seed, resamples=resamples),
            reward_shift=_over(spread_.reward_mean - before.reward_mean, before.reward_std),
            length_ratio=_over(lengths_.length_mean, length),
            duplicates_change=spread_.duplicate_share - before.duplicate_share,
        )
    return Diagnosis(
        model=file.model,
        name=file.name,
        kind=file.kind,
        rows=len(groups),
        left_out=file.left_out,
        spread=spread_,
        lengths=lengths_,
        labels=labels(file.pairs, seed=seed, resamples=resamples) if file.pairs else None,
        shift=shift,
        sight=file.sight,
    )


def _over(above: float, below: float) -> float | None:
    return above / below if below > NOISE else None
