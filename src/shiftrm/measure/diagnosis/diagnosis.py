"""All numbers of one file under one reward model, as plain data for JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

from shiftrm.core.intervals import RESAMPLES, Measured
from shiftrm.measure.diagnosis.labels import Labels, labels
from shiftrm.measure.diagnosis.lengths import Lengths, lengths
from shiftrm.measure.diagnosis.scored import NOISE, ScoredGroup, ScoredPair
from shiftrm.measure.diagnosis.spread import Spread, spread, variance_ratio

_MANY = 20_000  # from this many rows on, fewer resamples suffice


@dataclass(frozen=True)
class ScoredFile:
    """One reward model's scores of one file: groups, or labelled pairs."""

    model: str
    name: str
    groups: tuple[ScoredGroup, ...] = ()
    pairs: tuple[ScoredPair, ...] = ()
    left_out: int = 0

    @property
    def kind(self) -> str:
        """ "pairs" or "groups"."""
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
        model, name: of the reward model and of the file.
        kind: "groups" or "pairs".
        rows, left_out: number of rows scored, and number too long for the model.
        labels: None for groups, or if both sides of every pair are the same.
        shift: None for the reference file itself.
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


def diagnose(files: Sequence[ScoredFile], *, seed: int = 0) -> list[Diagnosis]:
    """Compute the numbers of every file; each model's first file is its reference.

    Args:
        files: in the order given by the user.
        seed: of the bootstrap.

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
    )


def _over(above: float, below: float) -> float | None:
    return above / below if below > NOISE else None
