"""The stages of the study: a first round that all arms share, then the rounds of each arm.

Everything is the recipe gold_demo's but what `StudyConfig` says. Per KL target there is one first
round of PPO against the first reward model. Every arm goes on from that policy, so that arms differ
only in what they do once the policy has moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import score_rows
from shiftrm.pipeline.engine import Stage, StageContext
from shiftrm.pipeline.experiment import Arm, Experiment
from shiftrm.pipeline.jobs import from_plain
from shiftrm.pipeline.plan import Planner
from shiftrm.pipeline.plan_data import sources
from shiftrm.pipeline.run import read_recipe
from shiftrm.policies.text_rewards import open_watch

from .arms import Groups, StudyArm

START = "start"
"""The arm of the shared first round."""

KL_COEFFICIENTS = {6.0: 0.03, 12.0: 0.015}
"""Where the KL coefficient of a later round starts: about where that of the first round ended. From
the recipe's 0.05 the policy would first be pulled back, and most of the round be spent on that."""

KL_RATE = 0.4
"""Twice PPO's default, because arms differ in the scale of their rewards (shaping)."""

GROUPS = "groups.jsonl"


@dataclass(frozen=True)
class StudyConfig:
    """One seed of the study at one KL target.

    Attributes:
        arms: by name; see `arms.ARMS`.
        rounds: in all, with the shared first one.
        first_steps, steps: PPO steps of the first round and of the others.
        responses: to each evaluation prompt.
        world: kind of gold world; "" is the recipe's.
        settings: further `key=value` words over the recipe.
    """

    seed: int
    kl: float
    arms: Mapping[str, StudyArm]
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
            f"policy.settings.kl_target={self.kl}",
            f"evaluation.responses={self.responses}",
            "judge.kind=none",
            "methods=[fixed]",
            *([f"world.kind={self.world}"] if self.world else []),
        ]
        # Prompts of three rounds are drawn even if fewer are run, so that more can follow.
        rounds = max(3, self.rounds)
        recipe = read_recipe("gold_demo", [*words, f"rounds={rounds}", *self.settings])
        first = {"steps": self.first_steps, "kl_coefficient": 0.05, "kl_rate": 0.2}
        later = {
            "steps": self.steps,
            "kl_coefficient": KL_COEFFICIENTS.get(self.kl, 0.05),
            "kl_rate": KL_RATE,
        }
        arms = {
            name: replace(about.arm, policy_settings={**later, **about.arm.policy_settings})
            for name, about in self.arms.items()
        }
        return replace(recipe, methods={START: Arm("fixed", policy_settings=first), **arms})


def plan_study(config: StudyConfig) -> list[Stage]:
    """Return the stages of one seed, each after the stages it needs."""
    experiment = config.experiment
    planner = Planner(experiment, sources(experiment))
    first, moved = planner.round(START, experiment.methods[START], 1, planner.at_start)
    stages = [*planner.beginning(), *planner.first_models(), *first]
    for name, about in config.arms.items():
        before = moved
        for number in range(2, config.rounds + 1):
            more, before = planner.round(name, experiment.methods[name], number, before)
            stages += [changed for stage in more for changed in _groups_of(planner, about, stage)]
    return stages


def _groups_of(planner: Planner, about: StudyArm, stage: Stage) -> list[Stage]:
    """Return the stage, or what takes its place where it samples an arm's groups."""
    if not stage.name.endswith("/groups") or about.groups is Groups.POLICY:
        return [stage]
    if about.groups is Groups.SFT:
        job = replace(from_plain(stage.settings["job"]), policy=planner.of_policy(None))
        return [planner.stage(stage.name, job, stage.record_as, stage.execution["way"])]
    unsorted = replace(stage, name=stage.name.replace("/groups", "/unsorted_groups"))
    settings = {"groups": unsorted.name, "gold": planner.recipe.gold}
    function = f"{__name__}:sort_by_gold"
    return [
        unsorted,
        Stage(stage.name, function, settings, (unsorted.name,), stage.record_as),
    ]


def sort_by_gold(context: StageContext) -> None:
    """Write the groups with the best response by gold first; for a control only."""
    rows = read_jsonl(context.folder(context.stage.settings["groups"]) / GROUPS)
    golds = score_rows(open_watch(context.stage.settings["gold"]), rows)
    ordered = []
    for row, values in zip(rows, golds, strict=True):
        places = sorted(range(len(values)), key=lambda k: -values[k])
        columns = [name for name in ("responses", "finished") if name in row]
        ordered.append({**row, **{name: [row[name][k] for k in places] for name in columns}})
    write_jsonl(context.out / GROUPS, ordered)
