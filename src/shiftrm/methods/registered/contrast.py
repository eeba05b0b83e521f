"""Contrast with responses that are presumably worse: added to the pairs, or as a meta objective.

Costs: a share of 0.25 makes a step's pairs a third more, so an epoch takes a third more steps.
`contrast_hard` scores 16 responses a contrast pair with the last round's reward model. A step of
`contrast_meta` costs what a step of MetaRM with groups of two does, and `contrast_mean` trains four
times. `contrast_all_log_sigmoid` has the share that was best in the gold world (docs/methods.md),
and PPO gets the log-sigmoid of the reward (arXiv 2402.00742).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shiftrm.methods.method import METHODS, Method, Need
from shiftrm.trainers.kinds import Data, Training


def by_contrast_source(training: Training, settings: Mapping[str, Any]) -> Training:
    """Return the training without the groups if only pairs are contrasted, else with them.

    Groups may then still be given: `shiftrm adapt` and recipes measure on them.
    """
    groups: frozenset[Data] = frozenset({"groups"})
    if settings.get("contrast_source") == "pairs":
        return replace(training, takes=training.takes - groups, spared=groups & training.takes)
    return replace(training, takes=training.takes | groups)


def _pairs(*takes: Data) -> Training:
    from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer

    return Training(
        ContrastConfig, ContrastTrainer, frozenset(takes), by_settings=by_contrast_source
    )


def on_pairs() -> Training:
    return _pairs()


def on_groups() -> Training:
    return _pairs("groups")


def on_all_groups() -> Training:
    return _pairs("groups")


def with_reward() -> Training:
    return _pairs("groups", "reward")


def meta() -> Training:
    from shiftrm.trainers.contrast import ContrastMetaConfig, ContrastMetaTrainer

    return Training(
        ContrastMetaConfig,
        ContrastMetaTrainer,
        frozenset({"groups"}),
        by_settings=by_contrast_source,
    )


GROUPS: frozenset[Need] = frozenset({"pairs", "groups"})
NEEDS: dict[Callable[[], Training], frozenset[Need]] = {
    on_pairs: frozenset({"pairs"}),
    on_groups: GROUPS,
    on_all_groups: GROUPS | {"earlier_groups"},
    with_reward: GROUPS | {"reward"},
    meta: GROUPS,
}

FOUR = ["other_prompt", "repeated", "cut", "shuffled"]

for name, label, short, colour, training, settings in (
    (
        "contrast",
        "Prompt contrast on the policy's responses",
        "Contrast",
        "#F0E442",
        on_groups,
        {},
    ),
    (
        "contrast_pairs",
        "Prompt contrast on the pairs' responses (arXiv 2409.13156)",
        "Contrast, pairs",
        "#999933",
        on_pairs,
        {"contrast_source": "pairs"},
    ),
    (
        "contrast_both",
        "Prompt contrast on the responses of policy and pairs",
        "Contrast, both",
        "#DDCC77",
        on_groups,
        {"contrast_source": "both"},
    ),
    (
        "contrast_hard",
        "Prompt contrast with the responses that the reward model likes best",
        "Contrast, hard",
        "#CC6677",
        with_reward,
        {"contrast_matching": "hard"},
    ),
    (
        "contrast_rounds",
        "Prompt contrast on the responses of all policies so far",
        "Contrast, rounds",
        "#117733",
        on_all_groups,
        {},
    ),
    (
        "contrast_all",
        "Contrast with other prompts' responses and with faults",
        "Contrast, all",
        "#88CCEE",
        on_groups,
        {"contrast_negatives": FOUR},
    ),
    (
        "contrast_meta",
        "MetaRM with prompt contrast as its objective",
        "Contrast, meta",
        "#AA4499",
        meta,
        {"meta_step": "effect", "deploy": "base"},
    ),
):
    METHODS.register(name)(
        Method(
            label,
            short,
            colour,
            "*",
            needs=NEEDS[training],
            training=training,
            settings=settings,
        )
    )

METHODS.register("contrast_all_log_sigmoid")(
    Method(
        "Contrast of four kinds, share 75 %, and log-sigmoid reward",
        "Contrast + log-sigmoid",
        "#D55E00",
        "*",
        needs=NEEDS[on_groups],
        training=on_groups,
        settings={"contrast_negatives": FOUR, "contrast_share": 0.75},
        policy_settings={"reward_shaping": "log_sigmoid"},
    )
)

METHODS.register("contrast_mean")(
    Method(
        "Prompt contrast, mean of 4 reward models (trains 4 times)",
        "Contrast, mean of 4",
        "#EE8866",
        "*",
        needs=NEEDS[on_groups],
        training=on_groups,
        members=4,
        combine="mean",
    )
)
