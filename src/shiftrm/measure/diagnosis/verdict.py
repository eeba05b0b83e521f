"""Verdicts on whether a reward model still tells responses apart, and warning signs.

With labels, the accuracy decides. Without labels, only the spread is known. It can show that a
model does not see (equal rewards) but not that it sees, since different rewards may be in the
wrong order. The best verdict on an unlabelled file is therefore "tells apart".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shiftrm.core.intervals import Measured
from shiftrm.data.negatives import NEGATIVES
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, Labels
from shiftrm.measure.diagnosis.spread import Spread
from shiftrm.measure.diagnosis.thresholds import (
    CALIBRATION,
    COIN_BLIND,
    COIN_DIM,
    DUPLICATES,
    ENOUGH_LABELS,
    EQUAL_REWARDS,
    EQUAL_SHARE,
    FEW_PROMPTS,
    LENGTH_ALONE,
    LENGTH_STRONG,
    RATIO_BLIND,
    RATIO_DIM,
    REWARD_UP,
    SATURATION,
    SEES_ACCURACY,
    SIGHT_LOW,
    TRUNCATED,
    WITHIN_DIM,
)
from shiftrm.measure.sight import SightTest

LENGTH_ADVICE = (
    "Add pairs in which the better response has the length the model dislikes, or take length out "
    "of the reward in the policy's training; then look at the accuracy where the chosen response "
    "is shorter and where it is longer."
)

Sign = tuple[str, str]
"""What was seen, and what to do about it or ""."""


def warning_signs(diagnosis: Diagnosis, *, blind: bool, follows_length: bool) -> list[Sign]:
    """Return all warning signs in the numbers of a file.

    Args:
        blind, follows_length: what the verdict already says, which is not repeated.
    """
    return [
        *_policy_signs(diagnosis),
        *([] if follows_length else _length_signs(diagnosis)),
        *_size_signs(diagnosis, blind=blind),
        *_shift_signs(diagnosis),
        *_sight_signs(diagnosis),
    ]


def percent(share: float, digits: int = 0) -> str:
    """Format a share as `31 %`."""
    return f"{100 * share:.{digits}f} %"


def _policy_signs(diagnosis: Diagnosis) -> Iterator[Sign]:
    s, texts = diagnosis.spread, diagnosis.lengths
    if diagnosis.left_out:
        yield f"{diagnosis.left_out} row(s) longer than the model's context left out.", ""
    if s.duplicate_share >= DUPLICATES:
        yield (
            f"{percent(s.duplicate_share)} of the responses repeat another one to the same "
            f"prompt ({percent(s.collapsed_share)} of the prompts have one response only). "
            "They are left out of the comparisons.",
            "The policy repeats itself: sample at a higher temperature, or go back to an "
            "earlier policy and a stronger KL penalty.",
        )
    if texts.truncated_share >= TRUNCATED:
        gap = texts.truncated_gap
        text = f"{percent(texts.truncated_share)} of the responses were cut off by the limit"
        if gap is not None:
            text += f"; their reward is {gap:+.3g} against finished ones to the same prompt"
        yield f"{text}.", "Sample with a higher limit (--max-new-tokens)."


def _length_signs(diagnosis: Diagnosis) -> Iterator[Sign]:
    within = diagnosis.lengths.correlation_within
    if within is not None and abs(within) >= LENGTH_STRONG:
        yield f"Reward and length go together within prompts: {within:.2f}.", LENGTH_ADVICE


def _size_signs(diagnosis: Diagnosis, *, blind: bool) -> Iterator[Sign]:
    s, labels = diagnosis.spread, diagnosis.labels
    if (s.saturated_share or 0.0) >= SATURATION:
        yield (
            f"{percent(s.saturated_share or 0)} of the comparisons get a probability above "
            "0.99: the model is as sure as it can be, and such pairs give hardly any gradient.",
            "Train for fewer epochs or at a lower learning rate; in the policy's training "
            "divide rewards by their spread.",
        )
    if not blind and (s.equal_share or 0.0) >= EQUAL_REWARDS:
        yield (
            f"{percent(s.equal_share or 0)} of the comparisons of different responses get "
            "exactly the same reward.",
            "Rewards may have been rounded: load the model in float32.",
        )
    if labels is not None and not blind and (s.coin_share or 0.0) >= COIN_DIM:
        yield (
            f"Differences are small: {percent(s.coin_share or 0)} of the comparisons get a "
            "probability between 0.49 and 0.51.",
            "Divide rewards by their spread before training a policy on them.",
        )
    if labels is not None and not blind and labels.calibration_error >= CALIBRATION:
        yield (
            f"Its stated probabilities are off by {labels.calibration_error:.2f} on average.",
            "The order is what policies are trained on; where the probabilities matter, divide "
            "rewards by a temperature fitted on labelled pairs.",
        )


def _shift_signs(diagnosis: Diagnosis) -> Iterator[Sign]:
    shift = diagnosis.shift
    if shift is None:
        return
    ratio = shift.variance_ratio
    fallen = ratio is not None and ratio.value <= RATIO_DIM
    if fallen and diagnosis.labels is not None and shift.reference_kind == "pairs":
        yield f"The variance of reward differences is {ratio} of that on {shift.reference}.", ""
    repeats = shift.duplicates_change >= DUPLICATES
    if (shift.reward_shift or 0.0) >= REWARD_UP and (fallen or repeats):
        what = "responses came to repeat" if repeats else "rewards drew together"
        yield (
            f"The mean reward is {shift.reward_shift:.1f} standard deviations above "
            f"{shift.reference} while {what}: a sign that the policy exploits the model.",
            "Read the responses with the highest rewards before training the policy on.",
        )


def _sight_signs(diagnosis: Diagnosis) -> Iterator[Sign]:
    for test in diagnosis.sight:
        if is_low(test) and NEGATIVES.get(test.kind).warns:
            yield (
                f"Sight test: the response beats {test.label} in {test.share} of {test.pairs} "
                f"pairs (a coin: 0.5). {test.meaning}",
                _ADAPT,
            )


def is_low(test: SightTest) -> bool:
    """Whether a sight test shows, on enough prompts, that the model does not look."""
    share = test.share
    if share is None or share.high is None or test.prompts < FEW_PROMPTS:
        return False
    return share.high < SIGHT_LOW


BLIND, FOLLOWS_LENGTH, DIM = "blind", "follows length", "dim"
UNCLEAR, TELLS_APART, SEES = "unclear", "tells apart", "sees"
WORST_FIRST = (BLIND, FOLLOWS_LENGTH, DIM, UNCLEAR, TELLS_APART, SEES)

NOT_SIGHT = (
    "Spread is not sight: there are no labels here, so nothing says that the higher reward goes to "
    f"the better response. Labels for about {ENOUGH_LABELS} pairs would tell."
)
_OTHER_KIND = ", whose labelled pairs may lie further apart than samples do"
SMALL_MAY_BE_RIGHT = "The order of small differences may still be right; only labels would tell."
_ADAPT = (
    "Adapt the model to these responses (shiftrm adapt --method contrast_all --model DIR --pairs "
    "PAIRS --groups FILE --output NEW contrast_share=0.75), then diagnose both (--model DIR "
    f"--model NEW) with about {ENOUGH_LABELS} labelled pairs of this policy: wider differences "
    "alone prove nothing."
)
_RELABEL = (
    "Collect labels on this policy's responses, a few hundred at least, and train on them "
    "(shiftrm train). Do not widen the differences without labels: what points the wrong way would "
    "only point there more strongly. What can be taught without labels is to look at the prompt "
    "(shiftrm adapt --method contrast)."
)


@dataclass(frozen=True)
class DiagnosisVerdict:
    """A verdict: a word, the reason with the number that decided, warnings, and next steps."""

    word: str
    sentence: str
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overall:
    """The verdict on all files of a model: the worst word, and one sentence."""

    model: str
    word: str
    sentence: str


def verdicts(diagnoses: Sequence[Diagnosis]) -> list[DiagnosisVerdict]:
    """Return one verdict per file, in the same order.

    Labelled files are judged first: if they show that a model sees despite small differences, small
    differences on its other files do not count as blindness.
    """
    found = {i: _verdict(d) for i, d in enumerate(diagnoses) if d.labels is not None}
    small = {
        diagnoses[i].model
        for i, v in found.items()
        if v.word == SEES and (diagnoses[i].spread.coin_share or 0.0) >= COIN_DIM
    }
    return [
        found[i] if i in found else _verdict(d, small_but_sees=d.model in small)
        for i, d in enumerate(diagnoses)
    ]


def _verdict(diagnosis: Diagnosis, *, small_but_sees: bool = False) -> DiagnosisVerdict:
    word, sentence, advice = _decide(diagnosis, small_but_sees=small_but_sees)
    signs = warning_signs(diagnosis, follows_length=word == FOLLOWS_LENGTH, blind=word == BLIND)
    warnings = tuple(text for text, _ in signs)
    more = tuple(advice_ for _, advice_ in signs if advice_)
    if diagnosis.labels is None:
        sentence += _limits_of_spread(word, diagnosis.spread)
    return DiagnosisVerdict(word, sentence, warnings, tuple(dict.fromkeys(advice + more)))


def _limits_of_spread(word: str, s: Spread) -> str:
    """Say what an unlabelled file cannot show; nothing for equal rewards."""
    if word == UNCLEAR or (s.noise_share or 0.0) >= EQUAL_SHARE:
        return ""
    return f" {SMALL_MAY_BE_RIGHT if word == BLIND else NOT_SIGHT}"


def overall(found: Sequence[tuple[Diagnosis, DiagnosisVerdict]]) -> list[Overall]:
    """Return one verdict per model, from its worst file, where training would go wrong."""
    models = dict.fromkeys(diagnosis.model for diagnosis, _ in found)
    return [_overall(model, [(d, v) for d, v in found if d.model == model]) for model in models]


def _overall(model: str, found: Sequence[tuple[Diagnosis, DiagnosisVerdict]]) -> Overall:
    by_word = {
        word: [d.name for d, v in found if v.word == word]
        for word in WORST_FIRST
        if any(v.word == word for _, v in found)
    }
    parts = [f"{_PHRASES[word]} {_listing(names)}" for word, names in by_word.items()]
    sentence = f"The reward model {'; it '.join(parts)}."
    unlabelled = [d.name for d, _ in found if d.labels is None]
    if unlabelled and len(unlabelled) < len(found):
        sentence += (
            f" No labels say whether it orders the responses of {_listing(unlabelled)} well."
        )
    elif unlabelled:
        sentence += " There are no labels, so nothing here shows that it orders responses well."
    return Overall(model, next(iter(by_word)), sentence)


_PHRASES = {
    BLIND: "is blind on",
    FOLLOWS_LENGTH: "follows length on",
    DIM: "is dim on",
    UNCLEAR: "cannot be judged on",
    TELLS_APART: "tells responses apart on",
    SEES: "sees on",
}


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_Decision = tuple[str, str, tuple[str, ...]]


def _decide(diagnosis: Diagnosis, *, small_but_sees: bool) -> _Decision:
    s = diagnosis.spread
    if not s.comparisons:
        text = "All responses to a prompt are the same text, so there is nothing to tell apart."
        resample = "Sample again: another policy, a higher temperature, or fewer repeated prompts."
        return UNCLEAR, text, (resample,)
    if s.noise_share is not None and s.noise_share >= EQUAL_SHARE:
        text = (
            f"{percent(s.noise_share)} of the {s.comparisons} comparisons get the same reward up "
            "to rounding (1e-6)."
        )
        again = "The score head may be untrained or its weights lost: train the model again."
        return BLIND, text, (again,)
    if diagnosis.labels is not None:
        return _by_labels(diagnosis.labels)
    return _by_spread(diagnosis, small_but_sees=small_but_sees)


def _by_labels(found: Labels) -> _Decision:
    accuracy = found.accuracy
    text = f"It orders {accuracy} of {found.pairs} labelled pairs as the labels do (a coin: 0.5)"
    if found.prompts < FEW_PROMPTS or accuracy.low is None or accuracy.high is None:
        text += (
            f", but they come from {found.prompts} prompt(s), and fewer than {FEW_PROMPTS} show "
        )
        return UNCLEAR, f"{text}nothing.", (f"Label more pairs: about {ENOUGH_LABELS}.",)
    if _right_by_length_alone(found):
        text += (
            f", but {found.accuracy_shorter} where the chosen response is the shorter one and "
            f"{found.accuracy_longer} where it is the longer one."
        )
        return FOLLOWS_LENGTH, text, (LENGTH_ADVICE,)
    word, reason = accuracy_verdict(accuracy)
    sentence = f"{text}: {reason}." if reason else f"{text}."
    if word == UNCLEAR:
        more = max(ENOUGH_LABELS, 2 * found.pairs)
        return word, sentence, (f"Label more pairs: about {more}.",)
    return word, sentence, () if word == SEES else (_RELABEL,)


def accuracy_verdict(accuracy: Measured) -> tuple[str, str]:
    """Return the word for an accuracy with its interval, and the reason ("" if it just sees)."""
    assert accuracy.low is not None
    assert accuracy.high is not None
    if accuracy.high < 0.5:
        return BLIND, "it prefers the worse response"
    if accuracy.low > 0.5:
        if accuracy.value >= SEES_ACCURACY:
            return SEES, ""
        return DIM, f"better than a coin, but below {SEES_ACCURACY:.2f}"
    if accuracy.high < SEES_ACCURACY:
        return BLIND, "no better than a coin"
    return UNCLEAR, f"the interval holds both a coin and a model that sees ({SEES_ACCURACY:.2f})"


def _right_by_length_alone(found: Labels) -> bool:
    """Return whether accuracy is clearly below 1/2 for one length order, above for the other."""
    one, other = found.accuracy_shorter, found.accuracy_longer
    if min(found.pairs_shorter, found.pairs_longer) < FEW_PROMPTS or one is None or other is None:
        return False
    return _below_and_above(one, other) or _below_and_above(other, one)


def _below_and_above(one: Measured, other: Measured) -> bool:
    return one.high is not None and other.low is not None and one.high < 0.5 < other.low


def _by_spread(diagnosis: Diagnosis, *, small_but_sees: bool) -> _Decision:
    s, shift = diagnosis.spread, diagnosis.shift
    if s.prompts < FEW_PROMPTS:
        text = f"There are {s.prompts} prompt(s); fewer than {FEW_PROMPTS} show nothing."
        return UNCLEAR, text, (f"Sample responses to more prompts: {ENOUGH_LABELS} or so.",)
    coin = 0.0 if small_but_sees else s.coin_share or 0.0
    if coin >= COIN_BLIND:
        return BLIND, _coin_text(s, coin), (_ADAPT,)
    ratio = shift.variance_ratio if shift is not None else None
    if shift is not None and ratio is not None and ratio.value <= RATIO_DIM:
        other_kind = _OTHER_KIND if shift.reference_kind != diagnosis.kind else ""
        text = (
            f"The variance of its reward differences is {ratio} of that on {shift.reference}"
            f"{other_kind}."
        )
        return BLIND if ratio.value <= RATIO_BLIND else DIM, text, (_ADAPT,)
    within = diagnosis.lengths.correlation_within
    if within is not None and abs(within) >= LENGTH_ALONE:
        text = (
            f"Within prompts the reward mostly measures length: correlation {within:.2f}, the "
            f"{'longer' if within > 0 else 'shorter'} the better."
        )
        return FOLLOWS_LENGTH, text, (LENGTH_ADVICE,)
    if coin >= COIN_DIM:
        return DIM, _coin_text(s, coin), (_ADAPT,)
    if s.within_share is not None and s.within_share.value < WITHIN_DIM:
        text = (
            f"{percent(s.within_share.value, 1)} of the variance of its rewards lies between "
            "responses to one prompt; the rest depends on the prompt alone."
        )
        return DIM, text, (_ADAPT,)
    assert s.difference_mean is not None
    text = (
        f"Rewards of two responses to one prompt differ by {s.difference_mean.value:.3g} on average"
    )
    if ratio is not None and shift is not None:
        text += f", and their variance is {ratio} of that on {shift.reference}"
    more = f"Label about {ENOUGH_LABELS} of these pairs and diagnose them too."
    return TELLS_APART, f"{text}.", (more,)


def _coin_text(s: Spread, coin: float) -> str:
    return (
        f"Its own probabilities are coin tosses: {percent(coin)} of the {s.comparisons} "
        "comparisons get a probability between 0.49 and 0.51."
    )
