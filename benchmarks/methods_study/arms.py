"""The arms of the study, with the settings that were chosen on seeds of their own.

Every arm starts from the same policy of the same first round, with the same pairs, the same draws
of the head and the same prompts for PPO. `TRIED` lists every setting that was tried to choose them.
"""

import enum
from dataclasses import dataclass
from typing import Any

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
