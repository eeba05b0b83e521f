"""The arms of the study, with the settings that were chosen on seeds of their own.

Every arm starts from the same policy of the same first round, with the same pairs, the same draws
of the head and the same prompts for PPO. `TRIED` lists every setting that was tried to choose them.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.pipeline.experiment import Arm


class Kind(enum.Enum):
    """What an arm is in the tables."""

    REFERENCE = "reference"
    LABEL_FREE = "no labels"
    COMBINATION = "no labels, combined"
    LABELS = "labels"
    CONTROL = "control"


@dataclass(frozen=True)
class StudyArm:
    """An arm, its name in the tables, and what it costs in labels a round."""

    arm: Arm
    label: str
    kind: Kind
    labels: int = 0


LOG_SIGMOID: dict[str, Any] = {"reward_shaping": "log_sigmoid"}
CONTRAST_STEPS = 250
"""Steps that keep two epochs of the original pairs beside a contrast share of 25 %."""

ARMS: dict[str, StudyArm] = {
    "fixed": StudyArm(Arm("fixed"), "fixed", Kind.REFERENCE),
    "retrained": StudyArm(Arm("retrained"), "retrained", Kind.REFERENCE),
    "gold": StudyArm(Arm("gold"), "gold as reward", Kind.REFERENCE),
    "contrast": StudyArm(
        Arm("contrast", settings={"max_steps": CONTRAST_STEPS}), "contrast", Kind.LABEL_FREE
    ),
    "contrast_log_sigmoid": StudyArm(
        Arm("contrast", settings={"max_steps": CONTRAST_STEPS}, policy_settings=LOG_SIGMOID),
        "contrast + log-sigmoid",
        Kind.COMBINATION,
    ),
    "log_sigmoid": StudyArm(Arm("log_sigmoid"), "log-sigmoid shaping", Kind.LABEL_FREE),
    "fresh_labels": StudyArm(Arm("fresh_labels"), "300 random labels", Kind.LABELS, 300),
    "metarm_paper": StudyArm(Arm("metarm_paper"), "MetaRM, as in the paper", Kind.LABEL_FREE),
    "metarm_scale_free": StudyArm(
        Arm("metarm_scale_free"), "MetaRM, step of length 0.5", Kind.LABEL_FREE
    ),
    "retrained_longer": StudyArm(
        Arm("retrained", settings={"max_steps": CONTRAST_STEPS}),
        "retrained, contrast's steps",
        Kind.CONTROL,
    ),
    "par": StudyArm(Arm("par"), "preference as reward (PAR)", Kind.LABEL_FREE),
}



def _tried(name: str, settings: dict[str, Any], **policy: Any) -> StudyArm:
    """Return an arm with other settings of its reward model, and of PPO."""
    base = ARMS[name]
    arm = replace(
        base.arm,
        settings={**base.arm.settings, **settings},
        policy_settings={**base.arm.policy_settings, **policy},
    )
    changed = ", ".join(f"{key} {value}" for key, value in {**settings, **policy}.items())
    return replace(base, arm=arm, label=f"{base.label}: {changed}")


CANDIDATES: dict[str, StudyArm] = {
    "contrast.share10": _tried("contrast", {"contrast_share": 0.1, "max_steps": 208}),
    "contrast.share40": _tried("contrast", {"contrast_share": 0.4, "max_steps": 312}),
    "contrast.share60": _tried("contrast", {"contrast_share": 0.6, "max_steps": 468}),
    "contrast.187": _tried("contrast", {"max_steps": 187}),
    "contrast.length": _tried("contrast", {"contrast_matching": "length"}),
}
"""Settings tried beside those of `ARMS`, on the choosing seeds alone."""


def arms_of(names: Sequence[str]) -> dict[str, Arm]:
    """Return arms by name; "all" stands for all of them.

    Raises:
        UserError: an unknown name.
    """
    wanted = list(ARMS) if list(names) == ["all"] else list(dict.fromkeys(names))
    known = {**ARMS, **CANDIDATES}
    for name in wanted:
        if name not in known:
            raise UserError(f"--arms {name}{suggest(name, list(known))}")
    return {name: known[name].arm for name in wanted}
