"""Did an adaptation make a reward model sharper, or only louder? The comparisons, in words.

Labels alone decide on sharper and duller. Without them there is only spread, and the words say so:
rewards that lie further apart may lie further apart in the wrong order.
"""

from collections.abc import Mapping, Sequence

from shiftrm.measure.diagnosis.comparison import ModelChange, spread_word
from shiftrm.measure.diagnosis.diagnosis import Diagnosis
from shiftrm.measure.diagnosis.thresholds import ENOUGH_LABELS, FEW_PROMPTS
from shiftrm.measure.diagnosis.verdict import DiagnosisVerdict

SHARPER, DULLER, MIXED = "sharper", "duller", "sharper here, duller there"
LOUDER, LOUDER_UNPROVEN = "louder, not sharper", "louder, and nothing says sharper"
QUIETER, UNCHANGED, UNCLEAR = "quieter", "unchanged", "unclear"

LABEL_MORE = f"Give about {ENOUGH_LABELS} labelled pairs of today's policy as --eval-pairs."
TRAIN_ON_LABELS = (
    "Wider differences alone help nobody: label responses of today's policy, a few hundred pairs "
    "at least, and train on them (shiftrm train)."
)
KEEP_THE_OLD = "Keep the model from before, or adapt with a smaller step (meta_learning_rate)."


def adaptation_verdict(
    comparisons: Sequence[ModelChange], diagnoses: Sequence[Diagnosis]
) -> DiagnosisVerdict:
    """One word over all files, and the numbers that say it, a line each.

    Args:
        comparisons: after against before, one a file.
        diagnoses: of both models; those of the files that were compared are looked up by name.
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
    return DiagnosisVerdict(word, "\n".join(parts), tuple(warnings), _advice(word, bool(labelled)))


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


def _advice(word: str, labelled: bool) -> tuple[str, ...]:
    if word in (DULLER, MIXED):
        return (KEEP_THE_OLD,)
    if word == LOUDER:
        return (TRAIN_ON_LABELS,)
    return () if labelled else (LABEL_MORE,)
