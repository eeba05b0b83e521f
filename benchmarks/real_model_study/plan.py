"""The stages of one seed: from the preference pairs to the rewards of every arm.

    data            the lexical gold, and prompts for every purpose, none used twice
    label_samples   the policy's responses, and `pairs`: the labelled pairs of the proxy
    proxy           the first reward model
    move_samples    16 responses a prompt; `demonstrations`: the ones that the proxy likes best
    moved           the policy fine-tuned on them: "the moved policy"
    groups          its unlabelled responses; `fresh_samples` and `fresh`: 300 labelled pairs
    base_samples, eval_samples   both policies' responses to the test prompts
    moving          how far the policy moved
    arms/NAME/reward_model, arms/NAME/scores, arms/NAME/sight
                    one way to adapt, its rewards, and its sight tests
    arms/NAME/ppo and arms/NAME/ppo_samples       on request: PPO from the first policy

All arms have the steps, the new head and the order of the pairs in common. The proxy has a head and
an order of its own, so `retrained` says what another draw of the same training gives.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.methods.method import METHODS, Method
from shiftrm.models.generation import SamplingConfig
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.jobs import (
    Input,
    Made,
    Optimise,
    Sample,
    Sft,
    TrainReward,
    inputs_of,
    plain,
    plain_input,
)
from shiftrm.pipeline.launch import Execution

RUN_JOB = "shiftrm.pipeline.launch:run_job"
STAGES = f"{__package__}.stages"
FIXED = "fixed"

LONGER = 600
"""Steps that keep two epochs of the pairs beside a contrast share of 75 %."""


@dataclass(frozen=True)
class StudyArm:
    """A method with settings of its own, for which it has another name."""

    method: str
    label: str
    settings: dict[str, Any]


OTHER_ARMS: dict[str, StudyArm] = {
    "contrast_all_75": StudyArm(
        "contrast_all",
        "Contrast, all, share 75 %, four times the steps",
        {"contrast_share": 0.75, "max_steps": LONGER},
    ),
    "retrained_longer": StudyArm(
        "retrained", "Retrained, four times the steps", {"max_steps": LONGER}
    ),
}
"""Arms beside the methods themselves, by name. `contrast_all_75` has the share that was chosen in
the gold world."""

PPO_UPDATES = 4
"""Optimizer steps on the responses of one PPO step."""


@dataclass(frozen=True)
class StudyConfig:
    """Every setting of the study; the defaults are the study.

    Attributes:
        system: system message of every prompt, without which most responses are cut off.
        max_prompt_tokens: longer prompts are left out.
        label_prompts, label_responses: where the proxy's `pairs` come from.
        label_temperature: of the Bradley-Terry labels, in the gold's units; 0: no noise.
        group_prompts, group_responses: unlabelled responses of the moved policy.
        fresh_prompts, fresh_pairs: the arm with new labels.
        eval_prompts, eval_responses: test prompts, and the moved policy's responses to each.
        base_responses: the first policy's responses to each test prompt.
        sight_pairs: pairs of each sight test.
        steps, batch_size, learning_rate: of every reward model.
        sft_epochs, sft_batch_size, sft_learning_rate: of the fine-tuning that moves the policy.
        micro_batch_size: pairs computed at once; it changes memory, not results.
        sampling_rows: responses sampled at once; another number gives other draws.
        bf16: autocast in every training; a GPU takes half the time.
        save_steps: optimizer steps between checkpoints that an interrupted training resumes from.
        ppo_steps, ppo_prompts, ppo_responses: of PPO: steps, prompts a step, responses to each.
        ppo_kl, ppo_kl_coefficient: the KL it is steered to, and where the coefficient starts.
        ppo_learning_rate: of the policy; the critic's is three times as high.
    """

    system: str = "Answer in one short sentence."
    max_prompt_tokens: int = 100
    max_new_tokens: int = 48
    temperature: float = 0.7
    label_prompts: int = 330
    label_responses: int = 4
    pairs: int = 600
    label_temperature: float = 0.0
    move_prompts: int = 256
    move_responses: int = 16
    group_prompts: int = 256
    group_responses: int = 4
    fresh_prompts: int = 170
    fresh_pairs: int = 300
    eval_prompts: int = 128
    eval_responses: int = 16
    base_responses: int = 4
    sight_pairs: int = 150
    steps: int = 150
    batch_size: int = 8
    learning_rate: float = 2e-5
    sft_epochs: float = 3
    sft_batch_size: int = 16
    sft_learning_rate: float = 2e-5
    micro_batch_size: int = 4
    sampling_rows: int = 32
    bf16: bool = False
    save_steps: int = 25
    ppo_steps: int = 40
    ppo_prompts: int = 16
    ppo_responses: int = 8
    ppo_kl: float = 6.0
    ppo_kl_coefficient: float = 0.05
    ppo_learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("label_responses", "group_responses", "eval_responses", "base_responses"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 2")
        for labels, prompts in (("pairs", "label_prompts"), ("fresh_pairs", "fresh_prompts")):
            most = getattr(self, prompts) * (self.label_responses // 2)
            if getattr(self, labels) > most:
                raise UserError(
                    f"{labels} is {getattr(self, labels)}; {getattr(self, prompts)} {prompts} of "
                    f"{self.label_responses} label_responses give at most {most}"
                )

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.max_new_tokens, temperature=self.temperature)

    @property
    def prompts(self) -> dict[str, int]:
        """Return how many prompts each purpose gets."""
        purposes = ("label", "move", "group", "fresh", "eval")
        return {purpose: getattr(self, f"{purpose}_prompts") for purpose in purposes}


@dataclass(frozen=True)
class Plan:
    """Makes the stages of one seed.

    Attributes:
        model: the folder of the policy that everything starts from.
        fingerprints: of the model and of the preference pairs, so that other ones stop the run.
        ppo: whether the arms also train a policy by PPO.
    """

    config: StudyConfig
    seed: int
    model: str
    hh_pairs: Path
    fingerprints: dict[str, str]
    ppo: bool = False

    def stages(self, arms: Sequence[str]) -> list[Stage]:
        """Return the stages of a seed with these arms, each after those it needs."""
        found = [*self._beginning(), *self._moving(), *self._evaluation()]
        last: list[Stage] = []
        for name in dict.fromkeys(arms):
            reward, stages = self._arm(name)
            found += stages
            last += self._ppo(name, reward) if self.ppo else []
        return found + last

    # -- before the policy moves -----------------------------------------------------------------

    def _beginning(self) -> list[Stage]:
        config = self.config
        named = ("system", "max_prompt_tokens")
        settings = {
            "model": self.model,
            "hh_pairs": str(self.hh_pairs),
            "prompts": config.prompts,
            **{name: getattr(config, name) for name in named},
            **self.fingerprints,
        }
        data = Stage("data", f"{STAGES}:prepare", settings, (), _record("data", "all"))
        samples = self._sample("label_samples", self.model, "label", config.label_responses)
        pairs = self._labelled("pairs", "label_samples", config.pairs, [])
        job = TrainReward(self.model, Made("pairs", "pairs.jsonl"), settings=self._reward(1))
        return [data, samples, pairs, self._training("proxy", job, _record("reward_model", FIXED))]

    def _moving(self) -> list[Stage]:
        config = self.config
        samples = self._sample("move_samples", self.model, "move", config.move_responses)
        chosen = Stage(
            "demonstrations",
            f"{STAGES}:choose_best",
            {},
            ("proxy", "move_samples", "data"),
            _record("responses", "best_of_n"),
            self._execution({}),
        )
        settings = {
            "num_train_epochs": config.sft_epochs,
            "learning_rate": config.sft_learning_rate,
            "seed": random_seed(self.seed, "sft"),
            **self._checkpoints(),
        }
        job = Sft(self.model, Made("demonstrations", "demonstrations.jsonl"), settings=settings)
        size = config.sft_batch_size
        return [
            samples,
            chosen,
            self._training("moved", job, _record("sft", "moved"), batch_size=size),
        ]

    def _evaluation(self) -> list[Stage]:
        config, moved = self.config, Made("moved")
        fresh = self._labelled("fresh", "fresh_samples", config.fresh_pairs, ["pairs"])
        moving = Stage(
            "moving",
            f"{STAGES}:measure_moving",
            {"model": self.model},
            ("data", "proxy", "moved", "demonstrations", "base_samples", "eval_samples"),
            _record("evaluate", "moved"),
            self._execution({}),
        )
        return [
            self._sample("groups", moved, "group", config.group_responses),
            self._sample("fresh_samples", moved, "fresh", config.label_responses),
            fresh,
            self._sample("base_samples", self.model, "eval", config.base_responses),
            self._sample("eval_samples", moved, "eval", config.eval_responses),
            moving,
        ]

    # -- arms ------------------------------------------------------------------------------------

    def _arm(self, name: str) -> tuple[Made, list[Stage]]:
        """Return the reward model of one way to adapt, and its stages.

        It follows `pipeline.plan_rewards.adapted_model`.
        """
        found: list[Stage] = []
        reward = Made("proxy")
        method = method_of(name)
        if method.training is not None:
            found.append(self._reward_model(name))
            reward = Made(found[-1].name)
            if method.label_choice != "random":
                raise UserError(f"arm {name}: the study labels responses drawn at random only")
        elif name != FIXED:
            raise UserError(f"arm {name}: trains nothing; the lexical gold is an arm of its own")
        scores = Stage(
            f"arms/{name}/scores",
            f"{STAGES}:score",
            {"reward": plain_input(reward)},
            (reward.stage, "data", "base_samples", "eval_samples"),
            _record("evaluate", name, 1),
            self._execution({}),
        )
        sight = Stage(
            f"arms/{name}/sight",
            f"{STAGES}:test_sight",
            {"reward": plain_input(reward), "pairs": self.config.sight_pairs},
            (reward.stage, "data", "eval_samples"),
            _record("evaluate", name, 1),
            self._execution({}),
        )
        return reward, [*found, scores, sight]

    def _reward_model(self, name: str) -> Stage:
        method = method_of(name)
        pairs = Made("fresh" if "labels" in method.needs else "pairs", "pairs.jsonl")
        given: dict[str, Any] = {}
        if "groups" in method.needs:
            given["groups"] = Made("groups", "groups.jsonl")
        if "policy" in method.needs:
            given |= {"policy": Made("moved"), "reference": self.model}
        if "reward" in method.needs:
            given["reward"] = Made("proxy")
        starts: dict[str, Input] = {
            "sft": self.model,
            "policy": Made("moved"),
            "reward": Made("proxy"),
        }
        arm = arm_of(name)
        settings = {**self._reward(2), **method.settings, **arm.settings}
        job = TrainReward(
            starts[method.start], pairs, adaptation=arm.method, settings=settings, **given
        )
        return self._training(f"arms/{name}/reward_model", job, _record("reward_model", name, 1))

    def _ppo(self, name: str, reward: Input) -> list[Stage]:
        """Return PPO from the first policy against an arm's reward; the arm may shape it."""
        config, here = self.config, f"arms/{name}/ppo"
        settings = {
            "steps": config.ppo_steps,
            "prompts_per_step": config.ppo_prompts,
            "rollouts_per_prompt": config.ppo_responses,
            "minibatch_size": config.ppo_prompts * config.ppo_responses // PPO_UPDATES,
            "learning_rate": config.ppo_learning_rate,
            "critic_learning_rate": 3 * config.ppo_learning_rate,
            "kl_target": config.ppo_kl,
            "kl_coefficient": config.ppo_kl_coefficient,
            **asdict(config.sampling),
            "seed": random_seed(self.seed, "ppo"),
            **method_of(name).policy_settings,
        }
        job = Optimise(
            "ppo",
            self.model,
            self.model,
            reward=reward,
            prompts=Made("data", "move_prompts.jsonl"),
            scale=Made("base_samples", "base_samples.jsonl"),
            settings=settings,
        )
        way = {
            "micro_batch_size": config.micro_batch_size,
            "forward_batch_size": config.sampling_rows,
            "bf16": config.bf16,
            "gradient_checkpointing": False,
            "report_to": "none",
        }
        execution = self._execution(way)
        record = _record("ppo", name, 1)
        return [
            Stage(here, RUN_JOB, {"job": plain(job)}, inputs_of(job), record, execution),
            self._sample(f"arms/{name}/ppo_samples", Made(here), "eval", config.base_responses),
        ]

    # -- what they share -------------------------------------------------------------------------

    def _sample(self, here: str, policy: Input, purpose: str, responses: int) -> Stage:
        """Return the stage that answers the prompts of a purpose; it resumes batch by batch."""
        job = Sample(
            policy,
            Made("data", f"{purpose}_prompts.jsonl"),
            f"{here.rpartition('/')[2]}.jsonl",
            responses=responses,
            sampling=self.config.sampling,
            batch_size=max(1, self.config.sampling_rows // responses),
            seed=random_seed(self.seed, f"samples/{purpose}/{responses}"),
        )
        needs = tuple(dict.fromkeys(("data", *inputs_of(job))))
        record = _record("responses", here)
        return Stage(here, RUN_JOB, {"job": plain(job)}, needs, record, self._execution({}))

    def _labelled(self, here: str, samples: str, count: int, after: list[str]) -> Stage:
        settings = {
            "samples": samples,
            "count": count,
            "temperature": self.config.label_temperature,
            "after": after,
        }
        needs = ("data", samples, *after)
        return Stage(here, f"{STAGES}:label", settings, needs, _record("labels", here))

    def _reward(self, draw: int) -> dict[str, Any]:
        """Return the settings of a reward model; `draw` decides its head and the pairs' order."""
        return {
            "max_steps": self.config.steps,
            "learning_rate": self.config.learning_rate,
            "seed": random_seed(self.seed, f"reward/{draw}"),
            **self._checkpoints(),
        }

    def _checkpoints(self) -> dict[str, Any]:
        return {"save_steps": self.config.save_steps, "save_total_limit": 1}

    def _training(
        self, here: str, job: Any, record: dict[str, Any], *, batch_size: int | None = None
    ) -> Stage:
        size = self.config.batch_size if batch_size is None else batch_size
        micro = next(
            k for k in range(min(size, self.config.micro_batch_size), 0, -1) if size % k == 0
        )
        way = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": size // micro,
            "gradient_checkpointing": False,
            "bf16": self.config.bf16,
            "report_to": "none",
        }
        settings = {"job": plain(job), **self.fingerprints}
        return Stage(here, RUN_JOB, settings, inputs_of(job), record, self._execution(way))

    def _execution(self, way: dict[str, Any]) -> dict[str, Any]:
        execution = Execution(
            micro_batch_size=self.config.micro_batch_size,
            sampling_batch_size=self.config.sampling_rows,
            bf16=self.config.bf16,
            gradient_checkpointing=False,
            in_process=True,
        )
        return {**asdict(execution), "way": way}


def arm_of(name: str) -> StudyArm:
    """Return an arm by its name, which is that of a method or one of `OTHER_ARMS`."""
    return OTHER_ARMS.get(name) or StudyArm(name, METHODS.get(name).label, {})


def method_of(name: str) -> Method:
    """Return the method of an arm."""
    return METHODS.get(arm_of(name).method)


def needed_for(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Return the stages with these names (or in these folders) and all that they need.

    Raises:
        UserError: no stage has the name.
    """
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    for name in names:
        found = [known for known in by_name if known == name or known.startswith(f"{name}/")]
        if not found:
            raise UserError(f"--until {name}: no such stage; there are {', '.join(by_name)}")
        wanted.update(found)
    open_ = list(wanted)
    while open_:
        for need in by_name[open_.pop()].needs:
            if need not in wanted:
                wanted.add(need)
                open_.append(need)
    return [stage for stage in stages if stage.name in wanted]


def _record(stage: str, method: str, number: int = 0) -> dict[str, Any]:
    return {"stage": stage, "method": method, "round": number}
