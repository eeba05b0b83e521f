"""The gold world's controls: runs whose outcome is known beforehand if the world is sound.

Reward models on 500, 3,000 and 20,000 pairs, one on shuffled labels, and the gold reward itself
are each optimised against; `checks` says what the results must be. All runs of a seed share the
world, the SFT policy, the held-out pairs, PPO's prompts and its random numbers.
"""

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.errors import UserError
from shiftrm.pipeline.demo_config import EvaluationSettings, SFTSettings, demo_ppo
from shiftrm.pipeline.demo_plan import GOLD, MEASURE, STAGES, record_as
from shiftrm.pipeline.engine import Stage, StageContext
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.world.build import WorldConfig

PROXY = "reward_model"
SHUFFLED = "reward_models/shuffled_1"


@dataclass(frozen=True)
class ControlsConfig:
    """Every setting of the controls.

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
    """

    seed: int = 0
    pair_counts: tuple[int, ...] = (500, 3_000, 20_000)
    proxy_pairs: int = 3_000
    heldout_pairs: int = 2_000
    reward_steps: int = 1_000
    reward_batch_size: int = 32
    reward_learning_rate: float = 5e-4
    shuffles: int = 3
    kl_targets: tuple[float, ...] = (3.0, 6.0, 12.0)
    shuffled_kl: float = 6.0
    free_steps: int = 100
    penalty: float = 0.05
    matched_steps: int = 60
    world: WorldConfig = field(default_factory=WorldConfig)
    sft: SFTSettings = field(default_factory=SFTSettings)
    ppo: PPOConfig = field(default_factory=demo_ppo)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        if self.proxy_pairs not in self.pair_counts:
            raise UserError(
                f"proxy_pairs is {self.proxy_pairs}; it must be one of pair_counts "
                f"({', '.join(map(str, self.pair_counts))})"
            )


def plan_controls(config: ControlsConfig) -> list[Stage]:
    """Return the stages of one seed, each after the stages it needs."""
    stages = _beginning(config)
    proxy = _proxy_name(config, config.proxy_pairs)
    free = {"steps": config.free_steps, "kl_target": None}
    no_penalty = {**free, "kl_coefficient": 0.0}
    # Runs that can contradict the world quickly come first.
    runs: list[tuple[str, str, dict[str, Any]]] = [
        ("proxy_no_kl", proxy, no_penalty),
        ("gold_no_kl", GOLD, no_penalty),
        ("proxy_kl", proxy, {**free, "kl_coefficient": config.penalty}),
        ("shuffled_no_kl", SHUFFLED, no_penalty),
        (at_kl("shuffled", config.shuffled_kl), SHUFFLED, _matched(config, config.shuffled_kl)),
    ]
    for target in config.kl_targets:
        for count in config.pair_counts:
            name = at_kl(f"pairs_{count}", target)
            runs.append((name, _proxy_name(config, count), _matched(config, target)))
        runs.append((at_kl("gold", target), GOLD, _matched(config, target)))
    for name, reward, changes in runs:
        stages += _run(config, name, reward, changes)
    return stages


def at_kl(name: str, target: float) -> str:
    """Return the method name of a run with a KL target, such as "pairs_500@kl6"."""
    return f"{name}@kl{target:g}"


def _proxy_name(config: ControlsConfig, count: int) -> str:
    return PROXY if count == config.proxy_pairs else f"reward_models/pairs_{count}"


def _matched(config: ControlsConfig, target: float) -> dict[str, Any]:
    return {"steps": config.matched_steps, "kl_target": target}


def _beginning(config: ControlsConfig) -> list[Stage]:
    """World, SFT policy, pairs, all reward models, and the SFT policy's evaluation."""
    sampling = asdict(config.ppo.sampling)
    world = asdict(replace(config.world, seed=config.seed))
    pairs = {"pairs": max(config.pair_counts), "heldout_pairs": config.heldout_pairs}
    stages = [
        Stage("world", f"{STAGES}:make_world", world, (), record_as("world", "sft", 0)),
        Stage(
            "sft", f"{STAGES}:train_sft", asdict(config.sft), ("world",), record_as("sft", "sft", 0)
        ),
        Stage(
            "pairs",
            f"{STAGES}:make_pairs",
            {**pairs, "sampling": sampling},
            ("world", "sft"),
            record_as("pairs", "sft", 0),
        ),
    ]
    models = [
        (_proxy_name(config, count), f"pairs_{count}", count, 0) for count in config.pair_counts
    ]
    for shuffle in range(1, config.shuffles + 1):
        name = f"shuffled_{shuffle}"
        models.append((f"reward_models/{name}", name, config.proxy_pairs, shuffle))
    for stage, method, count, shuffle in models:
        settings = {
            "batch_size": config.reward_batch_size,
            "learning_rate": config.reward_learning_rate,
            "evaluations": 8,
            "preset": None,
            "round": shuffle,  # decides head and order, as a round does in a run
            "steps": config.reward_steps,
            "pairs": count,
            "shuffle": shuffle,
        }
        stages.append(
            Stage(
                stage,
                f"{__name__}:train_control_reward",
                settings,
                ("sft", "pairs"),
                record_as("reward_model", method, 0),
            )
        )
    stages.append(
        Stage(
            "evaluation",
            f"{MEASURE}:evaluate_start",
            {**asdict(config.evaluation), "sampling": sampling},
            ("world", "sft", "pairs", PROXY),
            record_as("evaluate", "sft", 0),
        )
    )
    return stages


def _run(config: ControlsConfig, name: str, reward: str, changes: dict[str, Any]) -> list[Stage]:
    """PPO from the SFT policy against one reward, and the evaluation of the result."""
    here = f"runs/{name}"
    model = () if reward == GOLD else (reward,)
    ppo = to_mapping(replace(config.ppo, **changes))
    evaluation = {
        **asdict(config.evaluation),
        "sampling": asdict(config.ppo.sampling),
        "policy": f"{here}/policy",
        "reward": reward,
        "before": "evaluation",
    }
    return [
        Stage(
            f"{here}/policy",
            f"{STAGES}:optimise_policy",
            {"ppo": ppo, "policy": "sft", "reward": reward, "round": 1},
            ("world", "sft", "pairs", *model),
            record_as("ppo", name, 1),
        ),
        Stage(
            f"{here}/evaluation",
            f"{MEASURE}:evaluate_round",
            evaluation,
            ("world", "sft", "pairs", "evaluation", *model, f"{here}/policy"),
            record_as("evaluate", name, 1),
        ),
    ]


def train_control_reward(context: StageContext) -> None:
    """Train a reward model on the first `pairs` pairs, with their labels or with coin tosses."""
    from shiftrm.data.pairs import read_pairs
    from shiftrm.pipeline.demo_stages import fit_reward

    settings = context.stage.settings
    pairs = read_pairs(context.folder("pairs") / "train.jsonl")[: settings["pairs"]]
    if settings["shuffle"]:
        rng = random.Random(context.random_seed(f"shuffle/{settings['shuffle']}"))
        for row in pairs:
            if rng.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    context.recorder.add("pairs", float(len(pairs)))
    fit_reward(context, pairs, steps=settings["steps"])
