"""Comparison of two reward models on a file, such as before and after an adaptation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, measured_mean
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, ScoredFile
from shiftrm.measure.diagnosis.scored import ScoredPair
from shiftrm.measure.diagnosis.thresholds import ENOUGH_LABELS, FEW_PROMPTS, SPREAD_FACTOR
from shiftrm.measure.diagnosis.verdict import DiagnosisVerdict


@dataclass(frozen=True)
class ModelChange:
    """Changes between two models on a file.

    Attributes:
        name: the file.
        before, after: the models.
        accuracy_change: with its interval from paired resampling of prompts; None without
            labels.
        variance_factor: variance of reward differences, after over before, in raw units.
        relative_factor: the same after dividing each by that on the reference file; None for the
            reference itself.
        reading: "sharper", "louder, not sharper", "duller", "no clear change in accuracy", or,
            without labels, "louder" / "quieter" / "as loud" and that labels would tell.
    """

    name: str
    before: str
    after: str
    accuracy_change: Measured | None
    variance_factor: float | None
    relative_factor: float | None
    reading: str


def compare(
    files: Sequence[ScoredFile], diagnoses: Sequence[Diagnosis], *, seed: int = 0
) -> list[ModelChange]:
    """Compare every further model with the first, file by file.

    Args:
        files, diagnoses: those of all models, in the same order.
        seed: seed of the bootstrap.
    """
    models = list(dict.fromkeys(file.model for file in files))
    by_key = {(f.name, f.model): (f, d) for f, d in zip(files, diagnoses, strict=True)}
    return [
        _compare(by_key[name, models[0]], by_key[name, model], seed=seed)
        for name in dict.fromkeys(file.name for file in files)
        for model in models[1:]
        if (name, models[0]) in by_key and (name, model) in by_key
    ]


def _compare(
    before: tuple[ScoredFile, Diagnosis], after: tuple[ScoredFile, Diagnosis], *, seed: int
) -> ModelChange:
    (old_file, old), (new_file, new) = before, after
    change = _accuracy_change(old_file.pairs, new_file.pairs, seed=seed)
    factor = _ratio(new.spread.difference_variance, old.spread.difference_variance)
    relative = None
    if old.shift is not None and new.shift is not None:
        relative = _ratio(new.shift.variance_ratio, old.shift.variance_ratio)
    return ModelChange(
        name=old.name,
        before=old.model,
        after=new.model,
        accuracy_change=change,
        variance_factor=factor,
        relative_factor=relative,
        reading=_reading(change, spread_word(old, new, factor, relative)),
    )


def _accuracy_change(
    old: Sequence[ScoredPair], new: Sequence[ScoredPair], *, seed: int
) -> Measured | None:
    """Return None without labels, or if the models scored different rows."""
    if not old or [p.prompt for p in old] != [p.prompt for p in new]:
        return None
    change = _right(new) - _right(old)
    return measured_mean(change, [p.prompt for p in old], seed=seed)


def _right(pairs: Sequence[ScoredPair]) -> Floats:
    margin = np.array([pair.chosen.reward - pair.rejected.reward for pair in pairs])
    return np.where(margin == 0, 0.5, margin > 0).astype(np.float64)


def _ratio(above: Measured | None, below: Measured | None) -> float | None:
    if above is None or below is None or below.value == 0:
        return None
    return above.value / below.value


def spread_word(
    before: Diagnosis, after: Diagnosis, factor: float | None, relative: float | None
) -> str:
    """Return "louder", "quieter" or "as loud" for a file, with factors as in `ModelChange`."""
    grown = after.spread.difference_variance
    if factor is None and before.spread.difference_variance is not None:  # it was 0
        return "louder" if grown is not None and grown.value > 0 else "as loud"
    if any(f is not None and f > SPREAD_FACTOR for f in (factor, relative)):
        return "louder"
    return "quieter" if factor is not None and factor < 1 / SPREAD_FACTOR else "as loud"


def _reading(change: Measured | None, word: str) -> str:
    if change is not None and change.low is not None and change.high is not None:
        if change.low > 0:
            return "sharper"
        if change.high < 0:
            return "duller"
        return "louder, not sharper" if word == "louder" else "no clear change in accuracy"
    return f"{word}; whether it is sharper, only labels would tell"


# -- an adaptation in words ------------------------------------------------------------------

SHARPER, DULLER, MIXED = "sharper", "duller", "sharper here, duller there"
LOUDER, LOUDER_UNPROVEN = "louder, not sharper", "louder, and nothing says sharper"
QUIETER, UNCHANGED, UNCLEAR = "quieter", "unchanged", "unclear"

LABEL_MORE = f"Give about {ENOUGH_LABELS} labelled pairs of today's policy as --eval-pairs."
TRAIN_ON_LABELS = (
    "Wider differences alone do not help: label responses of today's policy, a few hundred pairs "
    "at least, and train on them (shiftrm train)."
)
KEEP_THE_OLD = "Keep the model from before."
TRY_CONTRAST = (
    "Meta steps widen differences and rarely correct their order. Without labels, contrast "
    "(--method contrast_all contrast_share=0.75) can correct it, as far as the pairs that it makes "
    "are true of your policy's responses."
)


def adaptation_verdict(
    comparisons: Sequence[ModelChange],
    diagnoses: Sequence[Diagnosis],
    *,
    meta_steps: bool = False,
) -> DiagnosisVerdict:
    """Say whether an adaptation made the model sharper or only louder, with the numbers.

    Only labels can show "sharper" or "duller". Without labels only the spread is known, and
    rewards that lie further apart may be in the wrong order.

    Args:
        comparisons: after against before, one a file.
        diagnoses: of both models; those of the files that were compared are looked up by name.
        meta_steps: whether it was by meta steps (MetaRM), for the advice.
    """
    before = {d.name: d for d in diagnoses if d.model == comparisons[0].before}
    after = {d.name: d for d in diagnoses if d.model == comparisons[0].after}
    large = [c for c in comparisons if before[c.name].spread.prompts >= FEW_PROMPTS]
    labelled = [c for c in large if _has_interval(c)]
    words = {
        c.name: spread_word(before[c.name], after[c.name], c.variance_factor, c.relative_factor)
        for c in comparisons
    }
    parts = [_accuracy(c, before[c.name], after[c.name]) for c in labelled]
    parts += [_spread(c, words[c.name]) for c in comparisons]
    parts += [_sight(c, before[c.name], after[c.name]) for c in comparisons if after[c.name].sight]
    warnings = [
        f"{c.name}: {before[c.name].spread.prompts} prompts; fewer than {FEW_PROMPTS} show nothing."
        for c in comparisons
        if c not in large
    ]
    word = _word(large, labelled, words)
    unlabelled = [c.name for c in comparisons if c not in labelled]
    if unlabelled:
        warnings.append(
            f"Nothing says whether it orders the responses of {' and '.join(unlabelled)} better: "
            "spread is not sight."
        )
    return DiagnosisVerdict(
        word, "\n".join(parts), tuple(warnings), _advice(word, bool(labelled), meta_steps)
    )


def _has_interval(c: ModelChange) -> bool:
    change = c.accuracy_change
    return change is not None and change.low is not None and change.high is not None


def _word(
    large: Sequence[ModelChange], labelled: Sequence[ModelChange], spread: Mapping[str, str]
) -> str:
    if not large:
        return UNCLEAR
    readings = {c.reading for c in labelled}
    if {"sharper", "duller"} <= readings:
        return MIXED
    if readings & {"sharper", "duller"}:
        return DULLER if "duller" in readings else SHARPER
    words = {spread[c.name] for c in large}
    if "louder" in words:
        return LOUDER if labelled else LOUDER_UNPROVEN
    return QUIETER if "quieter" in words else UNCHANGED


def _accuracy(c: ModelChange, before: Diagnosis, after: Diagnosis) -> str:
    assert before.labels is not None
    assert after.labels is not None
    assert c.accuracy_change is not None
    change = c.accuracy_change
    return (
        f"Accuracy on {c.name}: {before.labels.accuracy.value:.3f} before, "
        f"{after.labels.accuracy.value:.3f} after (change {change.value:+.3f}, "
        f"95 % interval {change.low:+.3f} to {change.high:+.3f}): {c.reading}."
    )


def _spread(c: ModelChange, word: str) -> str:
    if c.variance_factor is None:
        now = "now they differ" if word == "louder" else "and are so now"
        return f"On {c.name} the rewards to one prompt were all equal before; {now}."
    relative = (
        "" if c.relative_factor is None else f", {c.relative_factor:.3g} relative to the reference"
    )
    return (
        f"On {c.name} the variance of reward differences is {c.variance_factor:.3g} times what it "
        f"was{relative}: {word}."
    )


def _sight(c: ModelChange, before: Diagnosis, after: Diagnosis) -> str:
    """Say how often each model prefers a response to one that is presumably worse."""
    old = {test.kind: test for test in before.sight}
    found = [
        f"{test.label} {old[test.kind].share} before, {test.share} after"
        for test in after.sight
        if test.share is not None and test.kind in old and old[test.kind].share is not None
    ]
    if not found:
        return f"No sight test applies to {c.name}."
    return f"Sight tests on {c.name} (share preferred to): {'; '.join(found)}."


def _advice(word: str, labelled: bool, meta_steps: bool) -> tuple[str, ...]:
    if word in (DULLER, MIXED):
        return (KEEP_THE_OLD, *((TRY_CONTRAST,) if meta_steps else ()))
    if word == LOUDER:
        return (*((TRY_CONTRAST,) if meta_steps else ()), TRAIN_ON_LABELS)
    return () if labelled else (LABEL_MORE,)
