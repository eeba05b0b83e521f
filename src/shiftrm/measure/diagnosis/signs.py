"""Warning signs in the numbers of a file: repetition, length, saturation, exploitation."""

from shiftrm.measure.diagnosis.diagnosis import Diagnosis
from shiftrm.measure.diagnosis.thresholds import (
    CALIBRATION,
    COIN_DIM,
    DUPLICATES,
    EQUAL_REWARDS,
    LENGTH_STRONG,
    RATIO_DIM,
    REWARD_UP,
    SATURATION,
    TRUNCATED,
)

LENGTH_ADVICE = (
    "Add pairs in which the better response has the length the model dislikes, or take length out "
    "of the reward in the policy's training; then look at the accuracy where the chosen response "
    "is shorter and where it is longer."
)

Signs = list[tuple[str, str]]
"""(what was seen, what to do about it or "")."""


def warning_signs(diagnosis: Diagnosis, *, blind: bool, follows_length: bool) -> Signs:
    """Return all warning signs in the numbers of a file.

    Args:
        blind, follows_length: what the verdict already says, which is not repeated.
    """
    return [
        *_policy_signs(diagnosis),
        *([] if follows_length else _length_signs(diagnosis)),
        *_size_signs(diagnosis, blind=blind),
        *_shift_signs(diagnosis),
    ]


def percent(share: float, digits: int = 0) -> str:
    """Format a share as `31 %`."""
    return f"{100 * share:.{digits}f} %"


def _policy_signs(diagnosis: Diagnosis) -> Signs:
    s, texts = diagnosis.spread, diagnosis.lengths
    found: Signs = []
    if diagnosis.left_out:
        found.append((f"{diagnosis.left_out} row(s) longer than the model's context left out.", ""))
    if s.duplicate_share >= DUPLICATES:
        found.append(
            (
                f"{percent(s.duplicate_share)} of the responses repeat another one to the same "
                f"prompt ({percent(s.collapsed_share)} of the prompts have one response only). "
                "They are left out of the comparisons.",
                "The policy repeats itself: sample at a higher temperature, or go back to an "
                "earlier policy and a stronger KL penalty.",
            )
        )
    if texts.truncated_share >= TRUNCATED:
        gap = texts.truncated_gap
        text = f"{percent(texts.truncated_share)} of the responses were cut off by the limit"
        if gap is not None:
            text += f"; their reward is {gap:+.3g} against finished ones to the same prompt"
        found.append((f"{text}.", "Sample with a higher limit (--max-new-tokens)."))
    return found


def _length_signs(diagnosis: Diagnosis) -> Signs:
    within = diagnosis.lengths.correlation_within
    if within is None or abs(within) < LENGTH_STRONG:
        return []
    return [(f"Reward and length go together within prompts: {within:.2f}.", LENGTH_ADVICE)]


def _size_signs(diagnosis: Diagnosis, *, blind: bool) -> Signs:
    s, labels = diagnosis.spread, diagnosis.labels
    found: Signs = []
    if (s.saturated_share or 0.0) >= SATURATION:
        found.append(
            (
                f"{percent(s.saturated_share or 0)} of the comparisons get a probability above "
                "0.99: the model is as sure as it can be, and such pairs give hardly any gradient.",
                "Train for fewer epochs or at a lower learning rate; in the policy's training "
                "divide rewards by their spread.",
            )
        )
    if not blind and (s.equal_share or 0.0) >= EQUAL_REWARDS:
        found.append(
            (
                f"{percent(s.equal_share or 0)} of the comparisons of different responses get "
                "exactly the same reward.",
                "Rewards may have been rounded: load the model in float32.",
            )
        )
    if labels is not None and not blind and (s.coin_share or 0.0) >= COIN_DIM:
        found.append(
            (
                f"Differences are small: {percent(s.coin_share or 0)} of the comparisons get a "
                "probability between 0.49 and 0.51.",
                "Divide rewards by their spread before training a policy on them.",
            )
        )
    if labels is not None and not blind and labels.calibration_error >= CALIBRATION:
        found.append(
            (
                f"Its stated probabilities are off by {labels.calibration_error:.2f} on average.",
                "The order is what policies are trained on; where the probabilities matter, divide "
                "rewards by a temperature fitted on labelled pairs.",
            )
        )
    return found


def _shift_signs(diagnosis: Diagnosis) -> Signs:
    shift = diagnosis.shift
    if shift is None:
        return []
    found: Signs = []
    ratio = shift.variance_ratio
    fallen = ratio is not None and ratio.value <= RATIO_DIM
    if fallen and diagnosis.labels is not None and shift.reference_kind == "pairs":
        found.append(
            (f"The variance of reward differences is {ratio} of that on {shift.reference}.", "")
        )
    repeats = shift.duplicates_change >= DUPLICATES
    if (shift.reward_shift or 0.0) >= REWARD_UP and (fallen or repeats):
        what = "responses came to repeat" if repeats else "rewards drew together"
        found.append(
            (
                f"The mean reward is {shift.reward_shift:.1f} standard deviations above "
                f"{shift.reference} while {what}: a sign that the policy exploits the model.",
                "Read the responses with the highest rewards before training the policy on.",
            )
        )
    return found
