"""Which stages a gold-world run has, what each depends on, and what decides its result."""

from dataclasses import asdict, replace
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.demo_config import ARMS, RunConfig
from shiftrm.pipeline.engine import Stage

STAGES = "shiftrm.pipeline.demo_stages"
MEASURE = "shiftrm.pipeline.demo_measure"
GOLD = "gold"
"""In place of a reward model's stage: the gold reward, for the controls that train on it."""


def plan(config: RunConfig) -> list[Stage]:
    """The stages of a run, each after those it needs."""
    stages = _beginning(config)
    for method in config.methods:
        for number in range(1, config.rounds + 1):
            stages += _round(config, method, number)
    stages.append(_comparison(config))
    return stages


def _beginning(config: RunConfig) -> list[Stage]:
    """World, SFT policy, preference pairs, the vanilla reward model, and the DPO baseline."""
    evaluation = asdict(config.evaluation)
    reward = asdict(config.reward)
    stages = [
        Stage(
            "world",
            f"{STAGES}:make_world",
            asdict(replace(config.world, seed=config.seed)),
            record_as=record_as("world", "sft", 0),
        ),
        Stage(
            "sft", f"{STAGES}:train_sft", asdict(config.sft), ("world",), record_as("sft", "sft", 0)
        ),
        Stage(
            "pairs",
            f"{STAGES}:make_pairs",
            {**asdict(config.data), "sampling": _sampling(config)},
            ("world", "sft"),
            record_as("pairs", "sft", 0),
        ),
        Stage(
            "reward_model",
            f"{STAGES}:train_reward",
            {**reward, "preset": None, "round": 1},  # head and order of the first round's arms
            ("sft", "pairs"),
            record_as("reward_model", "sft", 0),
        ),
        Stage(
            "evaluation",
            f"{MEASURE}:evaluate_start",
            {**evaluation, "sampling": _sampling(config)},
            ("world", "sft", "pairs", "reward_model"),
            record_as("evaluate", "sft", 0),
        ),
    ]
    if config.dpo_baseline:
        stages += [
            Stage(
                "methods/dpo/policy",
                f"{STAGES}:train_dpo",
                asdict(config.dpo),
                ("sft", "pairs"),
                record_as("dpo", "dpo", 1),
            ),
            Stage(
                "methods/dpo/evaluation",
                f"{MEASURE}:evaluate_round",
                {
                    **evaluation,
                    "sampling": _sampling(config),
                    "policy": "methods/dpo/policy",
                    "reward": "reward_model",
                    "before": "evaluation",
                },
                ("world", "sft", "pairs", "reward_model", "evaluation", "methods/dpo/policy"),
                record_as("evaluate", "dpo", 1),
            ),
        ]
    return stages


def _round(config: RunConfig, method: str, number: int) -> list[Stage]:
    """One round of one arm: sample or label if the arm does, adapt, optimise, evaluate."""
    arm = ARMS[method]
    here = f"methods/{method}/round-{number}"
    before = f"methods/{method}/round-{number - 1}"
    policy = f"{before}/policy" if number > 1 else "sft"
    evaluated = f"{before}/evaluation" if number > 1 else "evaluation"
    reward = f"{here}/reward_model" if arm.trains else "reward_model"
    stages = _adapt(config, method, number, policy) if arm.trains else []
    stages.append(
        Stage(
            f"{here}/policy",
            f"{STAGES}:optimise_policy",
            {"ppo": _ppo(config), "policy": policy, "reward": reward, "round": number},
            _unique("world", "sft", "pairs", policy, reward),
            record_as("ppo", method, number),
        )
    )
    stages.append(
        Stage(
            f"{here}/evaluation",
            f"{MEASURE}:evaluate_round",
            {
                **asdict(config.evaluation),
                "sampling": _sampling(config),
                "policy": f"{here}/policy",
                "reward": reward,
                "before": evaluated,
            },
            _unique("world", "sft", "pairs", "evaluation", evaluated, reward, f"{here}/policy"),
            record_as("evaluate", method, number),
        )
    )
    return stages


def _adapt(config: RunConfig, method: str, number: int, policy: str) -> list[Stage]:
    """This round's reward model, and what it is made from beside the original pairs."""
    arm = ARMS[method]
    here = f"methods/{method}/round-{number}"
    stages: list[Stage] = []
    extra: tuple[str, ...] = ()
    common = {"sampling": _sampling(config), "policy": policy, "round": number}
    if arm.preset:
        stages.append(
            Stage(
                f"{here}/groups",
                f"{STAGES}:sample_groups_of_policy",
                {
                    "groups": config.data.groups,
                    "responses_per_group": config.data.responses_per_group,
                    **common,
                },
                ("world", policy),
                record_as("groups", method, number),
            )
        )
        extra = (f"{here}/groups",)
    if arm.fresh_labels:
        stages.append(
            Stage(
                f"{here}/labels",
                f"{STAGES}:buy_labels",
                {"labels": config.data.fresh_labels, **common},
                ("world", policy),
                record_as("labels", method, number),
            )
        )
        extra = tuple(f"methods/{method}/round-{k}/labels" for k in range(1, number + 1))
    stages.append(
        Stage(
            f"{here}/reward_model",
            f"{STAGES}:train_reward",
            {**asdict(config.reward), "preset": arm.preset, "round": number},
            ("sft", "pairs", *extra),
            record_as("reward_model", method, number),
        )
    )
    return stages


def _comparison(config: RunConfig) -> Stage:
    evaluations = {
        method: [f"methods/{method}/round-{k}/evaluation" for k in range(1, config.rounds + 1)]
        for method in config.methods
    }
    if config.dpo_baseline:
        evaluations["dpo"] = ["methods/dpo/evaluation"]
    needs = tuple(name for names in evaluations.values() for name in names)
    settings = {"evaluations": evaluations, "tie_margin": config.evaluation.tie_margin}
    return Stage(
        "comparison",
        f"{MEASURE}:compare",
        settings,
        ("evaluation", *needs),
        record_as("compare", "all", 0),
    )


def _ppo(config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = to_mapping(config.ppo)
    if not config.matched_kl:
        settings["kl_target"] = None
    return settings


def _sampling(config: RunConfig) -> dict[str, Any]:
    return asdict(config.ppo.sampling)


def record_as(stage: str, method: str, number: int) -> dict[str, Any]:
    """The key that a stage's records share."""
    return {"stage": stage, "method": method, "round": number}


def _unique(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
