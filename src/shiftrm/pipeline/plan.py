"""The stages of an experiment. Each training is a job that a command can also do alone."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from shiftrm.data.negatives import NEGATIVES, with_own
from shiftrm.pipeline.domain_plan import domain_stages
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import DPO, Arm, Experiment
from shiftrm.pipeline.external import COMMAND, External
from shiftrm.pipeline.jobs import (
    Input,
    Job,
    Made,
    MetaTrain,
    Optimise,
    Sft,
    TrainReward,
    inputs_of,
    plain,
    plain_input,
)
from shiftrm.pipeline.launch import accumulation
from shiftrm.pipeline.plan_data import (
    RESPONSES,
    Sources,
    data_stages,
    record_as,
    sources,
)
from shiftrm.pipeline.plan_rewards import (
    Before,
    adapted_model,
    reward_model,
    sample_job,
    settings_of,
)

RUN_JOB = "shiftrm.pipeline.launch:run_job"
EVALUATING = "shiftrm.pipeline.evaluating"


def plan(recipe: Experiment) -> list[Stage]:
    """Return the stages of a run, each after those it needs."""
    planner = Planner(recipe, sources(recipe))
    return planner.stages() if recipe.domains is None else domain_stages(planner)


@dataclass(frozen=True)
class Planner:
    """Makes the stages of an experiment."""

    recipe: Experiment
    inputs: Sources

    def stages(self) -> list[Stage]:
        found = self.beginning() + self.first_models()
        for name, arm in self.recipe.methods.items():
            before = self.at_start
            for number in range(1, self.recipe.rounds_of(name) + 1):
                stages, before = self.round(name, arm, number, before)
                found += stages
        if self.recipe.judge.kind != "none":
            found.append(self._comparison())
        return found

    # -- before the rounds ---------------------------------------------------------------------

    def beginning(self) -> list[Stage]:
        """Return the stages up to the labelled pairs."""
        recipe = self.recipe
        data, pairs = data_stages(recipe, self.start_samples)
        if recipe.sft is None:
            return [data, *pairs]
        settings = self.settings(recipe.sft.settings, "sft")
        if recipe.chat_template:
            settings["chat_template_path"] = recipe.chat_template
        job = Sft(self.inputs.base, self.inputs.demonstrations, settings=settings)
        return [data, self.training("sft", job, record_as("sft", "sft", 0), "sft"), *pairs]

    def first_models(self) -> list[Stage]:
        """The first reward model, and the SFT policy measured under it."""
        first = TrainReward(self.of_policy(None), self.inputs.pairs)
        found = [
            reward_model(self, "reward_model", "sft", 0, None, first),
            self.responses("responses", "sft", 0, None),
            self.evaluation("evaluation", "sft", 0, None, Made("reward_model"), "responses"),
        ]
        if self.recipe.evaluation.best_of_n is not None:
            found += self._best_of_n(self.recipe.evaluation.best_of_n)
        return found

    def start_samples(self, here: str, role: str, prompts: Made, responses: int) -> Stage:
        """Return the stage that samples from the SFT policy."""
        record = record_as("responses", "sft", 0)
        return self.sampling(here, role, None, prompts, responses, record)

    def _best_of_n(self, n: int) -> list[Stage]:
        name = "best_of_n/responses"
        samples = self.start_samples(name, "best_of_n", Made("data", "best_of_n_prompts.jsonl"), n)
        scores = Stage(
            "best_of_n/scores",
            f"{EVALUATING}:measure_best_of_n",
            {"gold": self.recipe.watched},
            (name, "reward_model"),
            record_as("best_of_n", "sft", 0),
            self._execution({}),
        )
        return [samples, scores]

    # -- one round -----------------------------------------------------------------------------

    @property
    def at_start(self) -> Before:
        """What the first round starts from."""
        return Before(None, "responses", Made("reward_model"), self.inputs.pairs)

    def round(self, name: str, arm: Arm, number: int, before: Before) -> tuple[list[Stage], Before]:
        """Return the stages of an arm's round, and what its next round starts from.

        Args:
            before: what this round starts from; it may come from another arm's round.
        """
        here = f"methods/{name}/round-{number}"
        stages: list[Stage] = []
        reward: Input = Made("reward_model")
        if not arm.is_dpo and "gold" in arm.method.needs:
            reward = self.recipe.gold
        elif not arm.is_dpo and arm.method.trains:
            adapted, before = adapted_model(self, name, arm, number, before)
            stages += adapted
            reward = before.reward
        stages.append(self._policy(f"{here}/policy", name, number, before.policy, reward))
        stages.append(self.responses(f"{here}/responses", name, number, f"{here}/policy"))
        stages.append(
            self.evaluation(
                f"{here}/evaluation", name, number, f"{here}/policy", reward, before.responses
            )
        )
        if self.recipe.judge.kind != "none":
            stages.append(
                Stage(
                    f"{here}/judgement",
                    f"{EVALUATING}:judge_against_sft",
                    {"judge": self._judge(), "judged": self.recipe.evaluation.judged}
                    | {"ours": f"{here}/responses"},
                    ("responses", f"{here}/responses"),
                    record_as("evaluate", name, number),
                    self._judging(),
                )
            )
        after = replace(before, policy=f"{here}/policy", responses=f"{here}/responses")
        return stages, after

    def responses(self, here: str, name: str, number: int, policy: str | None) -> Stage:
        """Return the stage that answers the evaluation prompts with a policy."""
        prompts, responses = "eval_prompts.jsonl", self.recipe.evaluation.responses
        record = record_as("responses", name, number)
        return self.sampling(here, "evaluation", policy, Made("data", prompts), responses, record)

    def sampling(
        self,
        here: str,
        role: str,
        policy: str | None,
        prompts: Made,
        responses: int,
        record: dict[str, Any],
    ) -> Stage:
        """Return the stage that samples responses from the policy of a stage.

        Args:
            role: decides the random seed.
        """
        job = sample_job(self, role, policy, prompts, responses)
        return self.stage(
            here, job, record, {"batch_size": self.recipe.execution.sampling_batch_size}
        )

    def _policy(
        self, here: str, name: str, number: int, policy: str | None, reward: Input
    ) -> Stage:
        recipe = self.recipe
        method, arm = recipe.optimiser_of(name), recipe.methods[name]
        record = record_as("ppo", name, number)
        start = self.of_policy(policy)
        reference = start if arm.resets_reference else self.of_policy(None)
        if method == DPO:
            settings = self.settings({**recipe.dpo.settings, **arm.policy_settings}, DPO)
            job = Optimise(method, start, reference, pairs=self.inputs.pairs, settings=settings)
            return self.training(here, job, record, "dpo")
        if method == COMMAND:
            return self._external(here, number, record, (start, reference, reward))
        settings = dict(recipe.policy.settings) if method == recipe.policy.method else {}
        settings |= {
            **(arm.method.policy_settings if method == "ppo" else {}),
            **arm.policy_settings,
        }
        if method == "ppo":
            settings |= asdict(recipe.sampling)
        else:
            settings |= {
                "temperature": recipe.sampling.temperature,
                "top_p": recipe.sampling.top_p,
                "repetition_penalty": recipe.sampling.repetition_penalty,
                "max_completion_length": recipe.sampling.max_new_tokens,
            }
        job = Optimise(
            method,
            start,
            reference,
            reward=reward,
            prompts=self.inputs.policy_prompts(number),
            scale=self.inputs.scale if method == "ppo" else None,
            watch=recipe.watched,
            settings=self.settings(settings, f"ppo/{number}"),
        )
        section = None if method == "ppo" else "policy"
        return self.training(here, job, record, section)

    def _external(
        self, here: str, number: int, record: dict[str, Any], models: tuple[Input, Input, Input]
    ) -> Stage:
        """Return the stage of `policy.command`, from the policy, the reference and the reward."""
        recipe, execution = self.recipe, self.recipe.execution
        inputs = dict(zip(("policy", "reference", "reward"), models, strict=True))
        inputs |= {"prompts": self.inputs.policy_prompts(number), "pairs": self.inputs.pairs}
        seed = random_seed(recipe.seed, f"ppo/{number}")
        more = {"round": number, "seed": seed, "sampling": recipe.sampling}
        job = External.of(recipe.policy.command, inputs, **more)
        names = ("processes", "reward_host", "reward_devices")
        return self.stage(here, job, record, {name: getattr(execution, name) for name in names})

    def evaluation(
        self, here: str, name: str, number: int, policy: str | None, reward: Input, before: str
    ) -> Stage:
        """Return the stage `evaluating.evaluate` of a policy and a reward model.

        Args:
            before: stage of the responses of the policy that the reward model was adapted for.
        """
        recipe = self.recipe
        responses = here.replace("evaluation", "responses")
        read: dict[str, Input | None] = {
            "policy": self.of_policy(policy),
            "reference": self.of_policy(None),
            "reward": reward,
            "heldout": self.inputs.heldout,
            "scale": self.inputs.scale,
            "sft": Made("responses", RESPONSES),
            "before": Made(before, RESPONSES),
            "after": Made(responses, RESPONSES),
        }
        settings = {
            **asdict(recipe.evaluation),
            "gold": recipe.watched,
            "inputs": {name: plain_input(value) for name, value in read.items() if value},
            "policy_stage": policy,
        }
        arm = recipe.methods.get(name)
        given = None if arm is None else settings_of(recipe, arm).get("contrast_negatives")
        if (kinds := with_own(given)) != NEGATIVES.names():  # others began without this
            settings["sight_kinds"] = kinds
        needs = [value.stage for value in read.values() if isinstance(value, Made)]
        return Stage(
            here,
            f"{EVALUATING}:evaluate",
            settings,
            tuple(dict.fromkeys(needs)),
            record_as("evaluate", name, number),
            self._execution({}),
        )

    def _comparison(self) -> Stage:
        recipe = self.recipe
        arms = {
            name: [f"methods/{name}/round-{k}" for k in range(1, recipe.rounds_of(name) + 1)]
            for name in recipe.methods
        }
        rounds = [here for names in arms.values() for here in names]
        return Stage(
            "comparison",
            f"{EVALUATING}:compare",
            {"judge": self._judge(), "judged": recipe.evaluation.judged, "arms": arms},
            (
                "responses",
                *(f"{here}/responses" for here in rounds),
                *(f"{here}/judgement" for here in rounds),
            ),
            record_as("compare", "all", 0),
            self._judging(),
        )

    # -- what they share -----------------------------------------------------------------------

    def of_policy(self, policy: str | None) -> Input:
        """Return the policy that a stage makes; by default the fine-tuned one."""
        if policy is not None:
            return Made(policy)
        return Made("sft") if self.recipe.sft is not None else self.inputs.base

    def _judge(self) -> dict[str, Any]:
        settings = {**asdict(self.recipe.judge), "kind": self.recipe.judge_kind}
        return {k: v for k, v in settings.items() if k not in JUDGING}

    def _judging(self) -> dict[str, Any]:
        return {k: getattr(self.recipe.judge, k) for k in JUDGING}

    def _execution(self, way: dict[str, Any]) -> dict[str, Any]:
        return {**asdict(self.recipe.execution), "way": way}

    def settings(self, chosen: dict[str, Any], role: str) -> dict[str, Any]:
        """Return the settings of a training with its seed, and LoRA's if the recipe has them."""
        recipe = self.recipe
        found = {**chosen, "seed": random_seed(recipe.seed, role)}
        return found if recipe.lora is None else {**found, "use_peft": True, **recipe.lora}

    def training(
        self,
        here: str,
        job: Job,
        record: dict[str, Any],
        section: str | None,
    ) -> Stage:
        """Return the stage of a job that trains, with the way this machine runs it."""
        recipe, execution = self.recipe, self.recipe.execution
        way: dict[str, Any] = {"report_to": execution.report_to, "bf16": execution.bf16}
        way["gradient_checkpointing"] = execution.gradient_checkpointing
        if isinstance(job, MetaTrain):  # its batches are tasks
            way["micro_batch_size"] = execution.micro_batch_size
        elif section is not None:
            batch_size = getattr(recipe, section).batch_size
            micro, steps = accumulation(batch_size, execution, section=section)
            way |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
            if section != "policy":
                way["per_device_eval_batch_size"] = 2 * execution.micro_batch_size
        else:  # ppo
            way["micro_batch_size"] = execution.micro_batch_size
            if "forward_batch_size" not in job.settings:  # type: ignore[attr-defined]
                way["forward_batch_size"] = execution.sampling_batch_size
        return self.stage(here, job, record, way)

    def stage(self, here: str, job: Job, record: dict[str, Any], way: dict[str, Any]) -> Stage:
        """Return the stage of a job; `way` is what `Job.on_machine` takes."""
        settings = {"job": plain(job)}
        return Stage(here, RUN_JOB, settings, inputs_of(job), record, self._execution(way))


JUDGING = ("concurrency", "price_in", "price_out", "max_requests", "key_variable")
"""Settings of how the judge is asked, which do not change its verdicts."""
