"""What the labels say so far: the e-value, a bound on accuracy, and the sentence of the alarm."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.core.betting import accuracy_bound, e_values
from shiftrm.monitor.audits import Audit
from shiftrm.monitor.settings import MonitorConfig

__all__ = ["Alarm", "Evidence", "evidence_of"]


@dataclass(frozen=True)
class Evidence:
    """The test at one look.

    Attributes:
        value: the e-value against "accuracy was at least the threshold in every audit".
        needed: the alarm's: 1 / alpha.
        bound: accuracy was below this in some audit, up to a probability of alpha; 1: unknown.
        accuracy: share of right pairs in the last answered audit, of those that the model orders,
            averaged over prompts and weighted for how pairs were drawn.
        answers: labels behind it, each of another pair.
    """

    value: float = 1.0
    needed: float = 20.0
    bound: float = 1.0
    accuracy: float | None = None
    answers: int = 0

    @property
    def alarm(self) -> bool:
        return self.value >= self.needed


def evidence_of(audits: Sequence[Audit], config: MonitorConfig, episode: int = 1) -> Evidence:
    """Evaluate the test on the answers that are there.

    The value counts as of now only: answers may arrive out of order, and the process is a
    supermartingale in the order of arrival, as long as it does not depend on the answer itself
    which pairs get one.

    Args:
        audits: in order; those of other episodes are ignored.
        episode: 1, and one more after each change of the reward model. Labels about one model say
            nothing of the next, so the test begins anew, and alpha holds for each.
    """
    ours = [audit for audit in audits if audit.episode == episode]
    answered = [(number, one) for number, audit in enumerate(ours, 1) for one in audit.answered]
    alpha = config.alpha
    if not answered:
        return Evidence(needed=1 / alpha)
    correct = [float(one.correct or 0.0) for _, one in answered]
    settings: dict[str, Any] = {
        "largest_N": [one.largest for _, one in answered],
        "planned": config.audits,
    }
    draws = (correct, [one.weight for _, one in answered], [number for number, _ in answered])
    value = float(e_values(*draws, threshold=config.threshold, **settings)[-1])
    last = next(audit.accuracy for audit in reversed(ours) if audit.answered)
    bound = accuracy_bound(*draws, alpha=alpha, **settings)
    return Evidence(value, 1 / alpha, bound, last, len(answered))


@dataclass(frozen=True)
class Alarm:
    """An alarm, as actions get it.

    Attributes:
        step: number of the step, as the monitor counts.
        sentence: what was found and what to do, in words.
        groups: file of the last steps' unlabelled responses, which `shiftrm adapt` reads.
        output: the monitor's folder.
    """

    step: int
    evidence: Evidence
    threshold: float
    alpha: float
    sentence: str
    groups: Path
    output: Path


def sentence_of(evidence: Evidence, config: MonitorConfig, step: int, groups: Path) -> str:
    """Return what an alarm says and what to do."""
    shown = "" if evidence.accuracy is None else f" (last audit: {evidence.accuracy:.2f})"
    return (
        f"step {step}: averaged over prompts, the reward model orders fewer than "
        f"{config.threshold:.0%} of today's pairs of different reward as the labels do{shown}; "
        f"{evidence.answers} labels, e-value {evidence.value:.3g}. A "
        f"false alarm has a probability of at most {config.alpha:.0%} over the whole run. Stop, go "
        "back to a checkpoint from before, or adapt the reward model to the policy's responses: "
        f"shiftrm adapt --groups {groups}"
    )
