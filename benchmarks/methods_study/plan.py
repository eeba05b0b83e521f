"""The stages of the study: a first round that all arms share, then the rounds of each arm.

Everything is the recipe gold_demo's but what `StudyConfig` says. Per KL target there is one first
round of PPO against the first reward model. Every arm goes on from that policy, so that arms differ
only in what they do once the policy has moved.
"""

from dataclasses import dataclass, replace

from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.experiment import Arm, Experiment
from shiftrm.pipeline.plan import Planner
from shiftrm.pipeline.plan_data import sources
from shiftrm.pipeline.run import read_recipe

START = "start"
"""The arm of the shared first round."""

KL_COEFFICIENTS = {6.0: 0.03, 12.0: 0.015}
"""Where the KL coefficient of a later round starts: about where that of the first round ended. From
the recipe's 0.05 the policy would first be pulled back, and most of the round be spent on that."""

KL_RATE = 0.4
"""Twice the recipe's, because arms differ in the scale of their rewards (shaping)."""


@dataclass(frozen=True)
class StudyConfig:
    """One seed of the study at one KL target.

    Attributes:
        arms: by name; see `arms.ARMS`.
        rounds: in all, with the shared first one.
        first_steps, steps: PPO steps of the first round and of the others.
        world: kind of gold world; "" is the recipe's.
        settings: further `key=value` words over the recipe.
    """

    seed: int
    kl: float
    arms: dict[str, Arm]
    rounds: int = 3
    first_steps: int = 40
    steps: int = 30
    responses: int = 4
    world: str = ""
    settings: tuple[str, ...] = ()

    @property
    def experiment(self) -> Experiment:
        words = [
            f"seed={self.seed}",
            f"rounds={self.rounds}",
            f"policy.settings.kl_target={self.kl}",
            f"evaluation.responses={self.responses}",
            "judge.kind=none",
            "methods=[fixed]",
            *([f"world.kind={self.world}"] if self.world else []),
        ]
        recipe = read_recipe("gold_demo", [*words, *self.settings])
        start = Arm(reward="fixed", policy_settings={"steps": self.first_steps})
        later = {
            "steps": self.steps,
            "kl_coefficient": KL_COEFFICIENTS[self.kl],
            "kl_rate": KL_RATE,
        }
        arms = {
            name: replace(arm, policy_settings={**later, **arm.policy_settings})
            for name, arm in self.arms.items()
        }
        return replace(recipe, methods={START: start, **arms})


def plan_study(config: StudyConfig) -> list[Stage]:
    """Return the stages of one seed, each after the stages it needs."""
    experiment = config.experiment
    planner = Planner(experiment, sources(experiment))
    first, moved = planner.round(START, experiment.methods[START], 1, planner.at_start)
    stages = [*planner.beginning(), *planner.first_models(), *first]
    for name in config.arms:
        before = moved
        for number in range(2, config.rounds + 1):
            more, before = planner.round(name, experiment.methods[name], number, before)
            stages += more
    return stages
