"""The arms of the study, with the settings that were chosen on seeds of their own.

Every arm starts from the same policy of the same first round, with the same pairs, the same draws
of the head and the same prompts for PPO. `CANDIDATES` are the settings that were tried beside them.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.methods.registered.contrast import FOUR
from shiftrm.pipeline.experiment import Arm


class Kind(enum.Enum):
    """What an arm is in the tables."""

    REFERENCE = "reference"
    LABEL_FREE = "no labels"
    COMBINATION = "no labels, combined"
    LABELS = "labels"
    CONTROL = "control"


class Groups(enum.Enum):
    """Whose responses an arm's groups hold."""

    POLICY = "today's policy"
    SFT = "the SFT policy"
    SORTED = "today's policy, the best by gold first"


@dataclass(frozen=True)
class StudyArm:
    """An arm, its name in the tables, and what it costs in labels a round."""

    arm: Arm
    label: str
    kind: Kind
    labels: int = 0
    groups: Groups = Groups.POLICY


LOG_SIGMOID: dict[str, Any] = {"reward_shaping": "log_sigmoid"}
PAIR_STEPS, SAME_STEPS = 187.5, 187
"""Steps of two epochs of the pairs alone, and those of `retrained`."""

RESET_KL = 3.0
"""KL target of a round to the policy that it starts from, where the reference is reset."""


def _share(share: float) -> dict[str, Any]:
    """Return a share of contrast and the steps that keep two epochs of the original pairs."""
    return {"contrast_share": share, "max_steps": round(PAIR_STEPS / (1 - share))}


CONTRAST_STEPS: int = _share(0.25)["max_steps"]


def _contrast(
    method: str, policy: dict[str, Any] | None = None, steps: int = CONTRAST_STEPS, **settings: Any
) -> Arm:
    return Arm(method, settings={"max_steps": steps, **settings}, policy_settings=policy or {})


ARMS: dict[str, StudyArm] = {
    "fixed": StudyArm(Arm("fixed"), "fixed", Kind.REFERENCE),
    "retrained": StudyArm(Arm("retrained"), "retrained", Kind.REFERENCE),
    "gold": StudyArm(Arm("gold"), "gold as reward", Kind.REFERENCE),
    "contrast": StudyArm(_contrast("contrast"), "contrast", Kind.LABEL_FREE),
    "contrast_log_sigmoid": StudyArm(
        _contrast("contrast", policy=LOG_SIGMOID), "contrast + log-sigmoid", Kind.COMBINATION
    ),
    "contrast_all_25_log_sigmoid": StudyArm(
        _contrast("contrast_all", policy=LOG_SIGMOID),
        "contrast 25 %, four kinds + log-sigmoid",
        Kind.COMBINATION,
    ),
    "contrast_75_log_sigmoid": StudyArm(
        _contrast("contrast_all", LOG_SIGMOID, **_share(0.75)),
        "contrast 75 %, four kinds + log-sigmoid",
        Kind.COMBINATION,
    ),
    "contrast_75_same_steps": StudyArm(
        _contrast("contrast_all", LOG_SIGMOID, SAME_STEPS, contrast_share=0.75),
        "contrast 75 % in retraining's steps + log-sigmoid",
        Kind.COMBINATION,
    ),
    "contrast_both_75_log_sigmoid": StudyArm(
        _contrast("contrast_all", LOG_SIGMOID, contrast_source="both", **_share(0.75)),
        "contrast 75 %, policy and pairs + log-sigmoid",
        Kind.COMBINATION,
    ),
    "contrast_75_reset": StudyArm(
        Arm(
            "contrast_all",
            settings=_share(0.75),
            policy_settings={**LOG_SIGMOID, "kl_target": RESET_KL},
            reference_reset=True,
        ),
        "contrast 75 %, four kinds + log-sigmoid, KL to the round's first policy",
        Kind.COMBINATION,
    ),
    "log_sigmoid": StudyArm(Arm("log_sigmoid"), "log-sigmoid shaping", Kind.LABEL_FREE),
    "fresh_labels": StudyArm(Arm("fresh_labels"), "300 random labels", Kind.LABELS, 300),
    "active_labels": StudyArm(Arm("active_labels"), "300 active labels", Kind.LABELS, 300),
    "labels_100": StudyArm(Arm("fresh_labels", labels=100), "100 random labels", Kind.LABELS, 100),
    "active_100": StudyArm(Arm("active_labels", labels=100), "100 active labels", Kind.LABELS, 100),
    "metarm_paper": StudyArm(Arm("metarm_paper"), "MetaRM, as in the paper", Kind.LABEL_FREE),
    "metarm_by_effect": StudyArm(Arm("metarm_by_effect"), "MetaRM by effect", Kind.LABEL_FREE),
    "contrast_pairs": StudyArm(
        _contrast("contrast_pairs"), "contrast from the pairs", Kind.LABEL_FREE
    ),
    "contrast_both": StudyArm(_contrast("contrast_both"), "contrast from both", Kind.LABEL_FREE),
    "contrast_hard": StudyArm(_contrast("contrast_hard"), "contrast, hard", Kind.LABEL_FREE),
    "contrast_all": StudyArm(
        _contrast("contrast_all"), "contrast, four kinds of negatives", Kind.LABEL_FREE
    ),
    "contrast_mean": StudyArm(_contrast("contrast_mean"), "contrast, mean of 4", Kind.LABEL_FREE),
    "contrast_rounds": StudyArm(
        _contrast("contrast_rounds"), "contrast over all rounds' samples", Kind.LABEL_FREE
    ),
    "contrast_meta": StudyArm(Arm("contrast_meta"), "contrast as meta objective", Kind.LABEL_FREE),
    "retrained_longer": StudyArm(
        Arm("retrained", settings={"max_steps": CONTRAST_STEPS}),
        "retrained, contrast's steps",
        Kind.CONTROL,
    ),
    "retrained_750_log_sigmoid": StudyArm(
        Arm(
            "retrained",
            settings={"max_steps": _share(0.75)["max_steps"]},
            policy_settings=LOG_SIGMOID,
        ),
        "retrained, 750 steps + log-sigmoid",
        Kind.CONTROL,
    ),
    "metarm_scale_free": StudyArm(
        Arm("metarm_scale_free"), "MetaRM, step of length 0.5", Kind.LABEL_FREE
    ),
    "metarm_adaptive": StudyArm(Arm("metarm_adaptive"), "MetaRM, step by Adam", Kind.LABEL_FREE),
    "metarm_exact": StudyArm(Arm("metarm_exact"), "MetaRM, exact gradient", Kind.LABEL_FREE),
    "metarm_random": StudyArm(
        Arm("metarm_random"), "MetaRM, step in a random direction", Kind.CONTROL
    ),
    "metarm_sft": StudyArm(
        Arm("metarm_by_effect"), "MetaRM by effect on SFT samples", Kind.CONTROL, groups=Groups.SFT
    ),
    "metarm_gold_signs": StudyArm(
        Arm("metarm_by_effect", settings={"meta_objective": "ordered_difference"}),
        "MetaRM by effect with gold's signs",
        Kind.CONTROL,
        groups=Groups.SORTED,
    ),
    "par": StudyArm(Arm("par"), "preference as reward (PAR)", Kind.LABEL_FREE),
    "clip": StudyArm(Arm("clip"), "clipped reward", Kind.LABEL_FREE),
    "reference_reset": StudyArm(
        Arm("reference_reset", policy_settings={"kl_target": RESET_KL}),
        "KL to the round's first policy",
        Kind.LABEL_FREE,
    ),
    "policy_init": StudyArm(Arm("policy_init"), "policy's backbone", Kind.LABEL_FREE),
    "ocrm": StudyArm(Arm("ocrm", reference_reset=False), "OCRM's weights", Kind.LABEL_FREE),
    "bsr": StudyArm(Arm("bsr"), "BSR", Kind.LABEL_FREE),
    "grm": StudyArm(Arm("grm"), "GRM", Kind.LABEL_FREE),
    "self_labelled": StudyArm(Arm("self_labelled"), "own labels", Kind.LABEL_FREE),
    "warm": StudyArm(Arm("warm"), "WARM of 4", Kind.LABEL_FREE),
    "laplace": StudyArm(Arm("laplace"), "Laplace, r - 3 s", Kind.LABEL_FREE),
    "ensemble_mean": StudyArm(Arm("ensemble_mean"), "ensemble of 4, mean", Kind.LABEL_FREE),
    "ensemble_min": StudyArm(Arm("ensemble_min"), "ensemble of 4, least", Kind.LABEL_FREE),
    "ensemble_variance": StudyArm(
        Arm("ensemble_variance"), "ensemble of 4, mean - variance", Kind.LABEL_FREE
    ),
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
    "contrast.share40": _tried("contrast", _share(0.4)),
    "contrast.187": _tried("contrast", {"max_steps": 187}),
    "contrast.187ls": _tried("contrast_log_sigmoid", {"max_steps": 187}),
    "contrast.length187": _tried("contrast", {"contrast_matching": "length", "max_steps": 187}),
    "contrast_hard.ls": _tried("contrast_hard", {}, **LOG_SIGMOID),
    "contrast_all.40ls": _tried("contrast_all", _share(0.4), **LOG_SIGMOID),
    "contrast_repeated.ls": _tried(
        "contrast", {"contrast_negatives": ["other_prompt", "repeated"]}, **LOG_SIGMOID
    ),
    "contrast_repeated40.ls": _tried(
        "contrast",
        {
            "contrast_negatives": ["other_prompt", "repeated"],
            "contrast_share": 0.4,
            "max_steps": 312,
        },
        **LOG_SIGMOID,
    ),
    "contrast.40ls": _tried("contrast_log_sigmoid", _share(0.4)),
    "contrast.60ls": _tried("contrast_log_sigmoid", {"contrast_share": 0.6, "max_steps": 468}),
    "contrast_hard.40ls": _tried("contrast_hard", _share(0.4), **LOG_SIGMOID),
    "contrast_all.60ls": _tried("contrast_all", _share(0.6), **LOG_SIGMOID),
    "contrast_all.75ls375": _tried(
        "contrast_all", {"contrast_share": 0.75, "max_steps": 375}, **LOG_SIGMOID
    ),
    "contrast_all.90ls375": _tried(
        "contrast_all", {"contrast_share": 0.9, "max_steps": 375}, **LOG_SIGMOID
    ),
    "contrast_all.40par": _tried("contrast_all", _share(0.4), reward_shaping="par"),
    "contrast_all.60par": _tried("contrast_all", _share(0.6), reward_shaping="par"),
    "contrast_repeated60.ls": _tried(
        "contrast",
        {"contrast_negatives": ["other_prompt", "repeated"], **_share(0.6)},
        **LOG_SIGMOID,
    ),
    "contrast_three.60ls": _tried(
        "contrast",
        {"contrast_negatives": ["other_prompt", "repeated", "shuffled"], **_share(0.6)},
        **LOG_SIGMOID,
    ),
    "contrast_all_hard.60ls": _tried(
        "contrast_hard",
        {"contrast_negatives": FOUR, **_share(0.6)},
        **LOG_SIGMOID,
    ),
    "contrast_all_mean.40ls": _tried(
        "contrast_mean",
        {"contrast_negatives": FOUR, **_share(0.4)},
        **LOG_SIGMOID,
    ),
    "contrast_both.ls": _tried("contrast_both", {}, **LOG_SIGMOID),
    "contrast_mean.ls": _tried("contrast_mean", {}, **LOG_SIGMOID),
    "contrast.par": _tried("contrast", {}, reward_shaping="par"),
    "metarm_by_effect.1.2": _tried("metarm_by_effect", {"meta_effect": 1.2}),
    "metarm_by_effect.3": _tried("metarm_by_effect", {"meta_effect": 3.0}),
    "metarm_by_effect.layers": _tried("metarm_by_effect", {"meta_per_layer": True}),
    "metarm_by_effect.ls": _tried("metarm_by_effect", {}, **LOG_SIGMOID),
    "metarm_scale_free.0.1": _tried("metarm_scale_free", {"meta_learning_rate": 0.1}),
    "metarm_scale_free.1": _tried("metarm_scale_free", {"meta_learning_rate": 1.0}),
    "contrast_meta.3": _tried("contrast_meta", {"meta_effect": 3.0}),
    "ocrm.0.1": _tried("ocrm", {"ocrm_scale": 0.1}),
    "ocrm.1": _tried("ocrm", {"ocrm_scale": 1.0}),
    "bsr.0.01": _tried("bsr", {"bsr_coefficient": 0.01}),
    "bsr.0.1": _tried("bsr", {"bsr_coefficient": 0.1}),
    "grm.0.1": _tried("grm", {"grm_alpha": 0.1}),
    "grm.0.5": _tried("grm", {"grm_alpha": 0.5}),
    "laplace.1": _tried("laplace", {"laplace_penalty": 1.0}),
    "laplace.10": _tried("laplace", {"laplace_penalty": 10.0}),
    "laplace.ls": _tried("laplace", {}, **LOG_SIGMOID),
    "fresh_labels.ls": _tried("fresh_labels", {}, **LOG_SIGMOID),
}
"""Settings tried on the choosing seeds beside those of `ARMS`."""

CHOSEN: dict[str, tuple[str, str, Kind]] = {
    "laplace_10": ("laplace.10", "Laplace, r - 10 s", Kind.LABEL_FREE),
    "laplace_log_sigmoid": ("laplace.ls", "Laplace + log-sigmoid", Kind.COMBINATION),
    "fresh_labels_log_sigmoid": (
        "fresh_labels.ls",
        "300 random labels + log-sigmoid",
        Kind.LABELS,
    ),
    "metarm_log_sigmoid": (
        "metarm_by_effect.ls",
        "MetaRM by effect + log-sigmoid",
        Kind.COMBINATION,
    ),
    "metarm_length_1": ("metarm_scale_free.1", "MetaRM, step of length 1", Kind.LABEL_FREE),
    "metarm_effect_1.2": ("metarm_by_effect.1.2", "MetaRM by effect 1.2", Kind.LABEL_FREE),
    "grm_0.1": ("grm.0.1", "GRM, 0.1 of the text loss", Kind.LABEL_FREE),
}
"""Settings of other methods that had the most gold on the choosing seeds, where these are not the
defaults, and their combinations with shaping: the candidate, the label, and the kind."""

ARMS |= {
    name: replace(CANDIDATES[tried], label=label, kind=kind)
    for name, (tried, label, kind) in CHOSEN.items()
}


CLOSER = (
    ("contrast_75_log_sigmoid", "retrained_750_log_sigmoid"),
    ("contrast_75_same_steps", "log_sigmoid"),
    ("contrast_75_log_sigmoid", "log_sigmoid"),
    ("contrast_log_sigmoid", "log_sigmoid"),
    ("contrast_75_log_sigmoid", "contrast_all_25_log_sigmoid"),
    ("contrast_75_log_sigmoid", "contrast"),
    ("contrast_75_log_sigmoid", "fresh_labels"),
    ("contrast_75_log_sigmoid", "active_100"),
    ("fresh_labels_log_sigmoid", "log_sigmoid"),
    ("contrast_75_log_sigmoid", "fresh_labels_log_sigmoid"),
    ("contrast_75_log_sigmoid", "laplace_log_sigmoid"),
    ("contrast_rounds", "contrast"),
    ("contrast_both_75_log_sigmoid", "contrast_75_log_sigmoid"),
    ("contrast_both_75_log_sigmoid", "retrained_750_log_sigmoid"),
    ("contrast_both_75_log_sigmoid", "fresh_labels"),
)
"""Pairs of arms that differ from each other in less than from `retrained`."""


def arms_of(names: Sequence[str]) -> dict[str, StudyArm]:
    """Return arms by name; "all" stands for all of them.

    Raises:
        UserError: an unknown name.
    """
    wanted = list(ARMS) if list(names) == ["all"] else list(dict.fromkeys(names))
    known = {**ARMS, **CANDIDATES}
    for name in wanted:
        if name not in known:
            raise UserError(f"--arms {name}{suggest(name, list(known))}")
    return {name: known[name] for name in wanted}
