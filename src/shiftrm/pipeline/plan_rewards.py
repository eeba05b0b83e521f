"""The stages that make reward models: what the method of an arm needs, and the training."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import Arm, Experiment
from shiftrm.pipeline.jobs import Input, Made, Sample, TrainReward, plain_input
from shiftrm.pipeline.plan_data import PREPARE, RESPONSES, label_prompts, label_stage, record_as
from shiftrm.trainers.kinds import pairs_only, with_groups

if TYPE_CHECKING:
    from shiftrm.pipeline.plan import Planner

__all__ = ["Before", "adapted_model", "reward_model", "sample_job", "settings_of"]

GROUPS = "groups.jsonl"


@dataclass(frozen=True)
class Before:
    """What a round starts from.

    Attributes:
        policy: stage of today's policy; None: the fine-tuned one.
        responses: stage of its responses to the evaluation prompts.
        reward: the last round's reward model.
        pairs: the labelled pairs so far.
        groups: the groups so far, for methods that keep them.
    """

    policy: str | None
    responses: str
    reward: Input
    pairs: Made
    groups: Made | None = None


def adapted_model(
    planner: "Planner", name: str, arm: Arm, number: int, before: Before
) -> tuple[list[Stage], Before]:
    """Return the stages of a round's reward model, and `before` with that model and its data."""
    here, policy = f"methods/{name}/round-{number}", before.policy
    needs, pairs = arm.method.needs, planner.inputs.pairs
    stages: list[Stage] = []
    given: dict[str, Any] = {}
    if "groups" in needs:
        stages.append(_groups(planner, f"{here}/groups", name, number, policy))
        given["groups"] = Made(f"{here}/groups", GROUPS)
    if "earlier_groups" in needs and before.groups is not None:
        stages.append(_joined(f"{here}/all_groups", name, number, before.groups, given["groups"]))
        given["groups"] = Made(f"{here}/all_groups", GROUPS)
    if "policy" in needs:
        given |= {"policy": planner.of_policy(policy), "reference": planner.of_policy(None)}
    if "reward" in needs:
        given["reward"] = before.reward
    if "labels" in needs:
        prompts, role = label_prompts(planner.recipe, name, number), f"labels/{number}"
        record = record_as("responses", name, number)
        samples = planner.sampling(f"{here}/samples", role, policy, prompts, 2, record)
        count, pool = planner.recipe.labels_of(name)
        labels = label_stage(
            f"{here}/labels",
            samples.name,
            before.pairs,
            number,
            name,
            gold=planner.recipe.gold,
            active=(count, before.reward) if pool > count else None,
        )
        stages += [samples, labels]
        pairs = Made(labels.name, "pairs.jsonl")
    start = {
        "sft": planner.of_policy(None),
        "policy": planner.of_policy(policy),
        "reward": before.reward,
    }[arm.method.start]
    job = TrainReward(start, pairs, **given)
    stages.append(reward_model(planner, f"{here}/reward_model", name, number, arm, job))
    groups = given["groups"] if "earlier_groups" in needs else None
    reward = Made(stages[-1].name)
    return stages, replace(before, reward=reward, pairs=pairs, groups=groups)


def _groups(planner: "Planner", here: str, name: str, number: int, policy: str | None) -> Stage:
    settings = planner.recipe.groups
    prompts, record = f"group_prompts-{number}.jsonl", record_as("groups", name, number)
    role, made = f"groups/{number}", Made("data", prompts)
    job = replace(sample_job(planner, role, policy, made, settings.responses), makes=GROUPS)
    size = settings.batch_size or planner.recipe.execution.sampling_batch_size
    return planner.stage(here, job, record, {"batch_size": size})


def _joined(here: str, name: str, number: int, *files: Made) -> Stage:
    """The stage that writes several files of groups as one."""
    settings = {"files": [plain_input(file) for file in files]}
    needs = tuple(file.stage for file in files)
    return Stage(here, f"{PREPARE}:join_groups", settings, needs, record_as("groups", name, number))


def sample_job(
    planner: "Planner", role: str, policy: str | None, prompts: Made, responses: int
) -> Sample:
    """Return the job that samples from the policy of a stage (None: the fine-tuned one)."""
    recipe = planner.recipe
    return Sample(
        planner.of_policy(policy),
        prompts,
        RESPONSES,
        responses=responses,
        sampling=recipe.sampling,
        seed=random_seed(recipe.seed, role),
        server=None if recipe.sampler in ("transformers", "vllm") else recipe.sampler,
        vllm=recipe.sampler == "vllm",
    )


def reward_model(
    planner: "Planner", here: str, name: str, number: int, arm: Arm | None, job: TrainReward
) -> Stage:
    """Return the stage of a reward model, from a job that says what it is trained from.

    All arms of a round share the draws of a new head and the order of the pairs, so that two reward
    models of a round differ only in what they were trained on. The first reward model, which an arm
    may keep, shares those of round 1.
    """
    settings = settings_of(planner.recipe, arm)
    own = None
    if arm is not None and arm.method.training not in (with_groups, pairs_only):
        own = arm.reward
    job = replace(
        job,
        eval_pairs={"": planner.inputs.heldout},
        adaptation=own,
        settings=planner.settings(settings, f"reward/{max(number, 1)}"),
    )
    record = record_as("reward_model", name, number)
    return planner.training(here, job, record, "reward")


def settings_of(recipe: Experiment, arm: Arm | None) -> dict[str, Any]:
    """Return the settings of an arm's reward models, or of the first one."""
    section = recipe.reward
    settings: dict[str, Any] = dict(section.settings)
    if arm is not None:
        if arm.method.training is with_groups:
            settings |= {"preset": recipe.preset, **section.meta}
        settings |= {**arm.method.settings, **arm.settings}
    return settings
