"""The gold world's controls: runs whose outcome is known beforehand if the world is sound.

Reward models on 500, 3,000 and 20,000 pairs, one on shuffled labels, and the gold reward itself
are each optimised against; `checks` says what the results must be. All runs of a seed share the
world, the SFT policy, the held-out pairs, PPO's prompts and its random numbers.
"""

import random
from dataclasses import dataclass
from typing import Any

from shiftrm.data.pairs import read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.pipeline.engine import Stage, StageContext
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.jobs import Input, Made, Optimise, TrainReward, place, plain_input
from shiftrm.pipeline.plan import Planner
from shiftrm.pipeline.plan_data import record_as, sources
from shiftrm.pipeline.run import read_recipe

SHUFFLED = "shuffled_1"


@dataclass(frozen=True)
class ControlsConfig:
    """Every setting of the controls; whatever is not here is as in the recipe gold_demo.

    Attributes:
        pair_counts: preference pairs to train on; each smaller set is the beginning of the larger.
        proxy_pairs: the count whose reward model is the proxy of (a), (e) and the shuffled control.
        reward_steps: optimizer steps of every reward model, so that only its data differs. Many,
            since a few steps on shuffled labels leave one random direction, whose accuracy may be
            anything; after ten epochs it has memorised coin tosses, and its errors average out.
        shuffles: reward models on shuffled labels, each with its own tosses, head and order.
        free_steps: PPO steps without KL penalty, and of the run that shows what a penalty does.
        penalty: the KL coefficient of that run.
        matched_steps: PPO steps of the runs that steer to a KL.
        settings: further `key=value` words over the recipe, such as `world.kind=adverts`.
    """

    seed: int = 0
    pair_counts: tuple[int, ...] = (500, 3_000, 20_000)
    proxy_pairs: int = 3_000
    heldout_pairs: int = 2_000
    reward_steps: int = 1_000
    reward_learning_rate: float = 5e-4
    shuffles: int = 3
    kl_targets: tuple[float, ...] = (3.0, 6.0, 12.0)
    shuffled_kl: float = 6.0
    free_steps: int = 100
    penalty: float = 0.05
    matched_steps: int = 60
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.proxy_pairs not in self.pair_counts:
            raise UserError(
                f"proxy_pairs is {self.proxy_pairs}; it must be one of pair_counts "
                f"({', '.join(map(str, self.pair_counts))})"
            )

    @property
    def experiment(self) -> Experiment:
        """Return the recipe that all runs share."""
        every = max(1, self.reward_steps // 8)
        words = [
            f"seed={self.seed}",
            f"world.pairs={max(self.pair_counts)}",
            f"world.heldout_pairs={self.heldout_pairs}",
            f"reward.settings.max_steps={self.reward_steps}",
            f"reward.settings.learning_rate={self.reward_learning_rate}",
            f"reward.settings.eval_steps={every}",
            f"reward.settings.logging_steps={every}",
            "policy.settings.kl_coefficient=0.05",
            "policy.settings.kl_rate=0.2",
            "rounds=1",
            "methods=[fixed]",
        ]
        return read_recipe("gold_demo", [*words, *self.settings])


QUICK: dict[str, Any] = {
    "pair_counts": (500, 3_000),
    "heldout_pairs": 1_000,
    "reward_steps": 187,
    "reward_learning_rate": 1e-3,
    "shuffles": 3,
    "kl_targets": (6.0, 12.0),
    "free_steps": 60,
    "matched_steps": 40,
}
"""Settings of a quick look at a world; reward models are trained for as long as in the demo."""


def plan_controls(config: ControlsConfig) -> list[Stage]:
    """Return the stages of one seed, each after the stages it needs."""
    experiment = config.experiment
    planner = Planner(experiment, sources(experiment))
    proxy, shuffled = _model(f"pairs_{config.proxy_pairs}"), _model(SHUFFLED)
    stages = planner.beginning()
    for count in config.pair_counts:
        stages += _reward_model(planner, f"pairs_{count}", count, 0)
    for shuffle in range(1, config.shuffles + 1):
        stages += _reward_model(planner, f"shuffled_{shuffle}", config.proxy_pairs, shuffle)
    stages.append(planner.responses("responses", "sft", 0, None))
    stages.append(planner.evaluation("evaluation", "sft", 0, None, proxy, "responses"))
    free = {"steps": config.free_steps, "kl_target": None}
    no_penalty = {**free, "kl_coefficient": 0.0}
    # Runs that can contradict the world quickly come first.
    runs: list[tuple[str, Input, dict[str, Any]]] = [
        ("proxy_no_kl", proxy, no_penalty),
        ("gold_no_kl", experiment.gold, no_penalty),
        ("proxy_kl", proxy, {**free, "kl_coefficient": config.penalty}),
        ("shuffled_no_kl", shuffled, no_penalty),
        (at_kl("shuffled", config.shuffled_kl), shuffled, _matched(config, config.shuffled_kl)),
    ]
    for target in config.kl_targets:
        for count in config.pair_counts:
            name = at_kl(f"pairs_{count}", target)
            runs.append((name, _model(f"pairs_{count}"), _matched(config, target)))
        runs.append((at_kl("gold", target), experiment.gold, _matched(config, target)))
    for name, reward, changes in runs:
        stages += _run(planner, name, reward, changes)
    return stages


def at_kl(name: str, target: float) -> str:
    """Return the method name of a run with a KL target, such as "pairs_500@kl6"."""
    return f"{name}@kl{target:g}"


def _model(name: str) -> Made:
    return Made(f"reward_models/{name}")


def _matched(config: ControlsConfig, target: float) -> dict[str, Any]:
    return {"steps": config.matched_steps, "kl_target": target}


def _reward_model(planner: Planner, name: str, count: int, shuffle: int) -> list[Stage]:
    """A reward model on the first `count` pairs; `shuffle` > 0 numbers the coin tosses."""
    record = record_as("reward_model", name, 0)
    chosen = Stage(
        f"chosen_pairs/{name}",
        f"{__name__}:choose_pairs",
        {"pairs": plain_input(planner.inputs.pairs), "count": count, "shuffle": shuffle},
        (planner.inputs.pairs.stage,),
        record,
    )
    job = TrainReward(
        Made("sft"),
        Made(chosen.name, "pairs.jsonl"),
        {"": planner.inputs.heldout},
        # The shuffle decides head and order, as a round does in a recipe.
        settings=planner.settings(planner.recipe.reward.settings, f"reward/{shuffle}"),
    )
    return [chosen, planner.training(_model(name).stage, job, record, "reward")]


def _run(planner: Planner, name: str, reward: Input, changes: dict[str, Any]) -> list[Stage]:
    """PPO from the SFT policy against one reward, and the evaluation of the result."""
    here, recipe = f"runs/{name}", planner.recipe
    settings = {**recipe.policy.settings, **vars(recipe.sampling), **changes}
    job = Optimise(
        "ppo",
        Made("sft"),
        Made("sft"),
        reward=reward,
        prompts=planner.inputs.policy_prompts(1),
        scale=planner.inputs.scale,
        watch=recipe.watched,
        settings=planner.settings(settings, "ppo/1"),
    )
    policy = f"{here}/policy"
    return [
        planner.training(policy, job, record_as("ppo", name, 1), None),
        planner.responses(f"{here}/responses", name, 1, policy),
        planner.evaluation(f"{here}/evaluation", name, 1, policy, reward, "responses"),
    ]


def choose_pairs(context: StageContext) -> None:
    """Write the first `count` pairs, with their labels or with coin tosses."""
    settings = context.stage.settings
    pairs = read_pairs(place(settings["pairs"], context.root))[: settings["count"]]
    if settings["shuffle"]:
        rng = random.Random(context.random_seed(f"shuffle/{settings['shuffle']}"))
        for row in pairs:
            if rng.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_jsonl(context.out / "pairs.jsonl", pairs)
    context.recorder.add("pairs", float(len(pairs)))
