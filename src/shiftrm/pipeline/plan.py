"""Which stages a recipe has. Each training is a job that a command can also do alone."""

from dataclasses import asdict, dataclass
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.demo_plan import record_as
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import Arm, Recipe
from shiftrm.pipeline.jobs import (
    Input,
    Job,
    Made,
    Optimise,
    Sample,
    Sft,
    TrainReward,
    inputs_of,
    plain,
    plain_input,
)
from shiftrm.pipeline.launch import accumulation
from shiftrm.trainers.kinds import pairs_only, with_groups

RUN_JOB = "shiftrm.pipeline.launch:run_job"
STAGES = "shiftrm.pipeline.stages"
GROUPS = "groups.jsonl"

REWARD_LOG = {
    "loss": "loss",
    "eval_accuracy": "eval_accuracy",
    "meta_objective_before": "meta_objective_before",
    "meta_objective": "meta_objective_before",
    "meta_objective_after": "meta_objective_after",
    "meta_gradient_norm": "meta_gradient_norm",
    "meta_influence": "meta_influence",
    "meta_skipped": "meta_skipped",
}
POLICY_LOG = {
    "gold_mean": "gold_mean",
    "standardised_mean": "proxy_mean",
    "reward": "score_mean",
    "sequence_kl": "kl",
    "difference_variance": "difference_variance",
    "kl_coefficient": "kl_coefficient",
    "entropy": "entropy",
    "length_mean": "length_mean",
    "truncated_share": "truncated_share",
    "loss": "loss",
    "rewards/accuracies": "accuracy",
}


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a run, each after those it needs."""
    return _Planner(recipe).stages()


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe

    def stages(self) -> list[Stage]:
        found = self._beginning()
        for name, arm in self.recipe.methods.items():
            for number in range(1, self.recipe.rounds_of(name) + 1):
                found += self._round(name, arm, number)
        if self.recipe.judge.kind != "none":
            found.append(self._comparison())
        return found

    # -- before the rounds ---------------------------------------------------------------------

    def _beginning(self) -> list[Stage]:
        recipe = self.recipe
        rounds = max(recipe.rounds_of(name) for name in recipe.methods)
        data = Stage(
            "data",
            f"{STAGES}:prepare_data",
            {
                **to_mapping(recipe.data),
                "heldout_share": recipe.data.share,
                "group_prompts": recipe.groups.prompts,
                "eval_prompts_count": recipe.evaluation.prompts,
                "best_of_n_prompts": recipe.evaluation.best_of_n
                and recipe.evaluation.best_of_n_prompts,
                "rounds": rounds,
                "demonstrations_needed": recipe.sft is not None,
            },
            record_as=record_as("data", "sft", 0),
        )
        found = [data]
        if recipe.sft is not None:
            job = Sft(
                recipe.model,
                Made("data", "demonstrations.jsonl"),
                settings=self._settings(recipe.sft.settings, "sft")
                | ({"chat_template_path": recipe.chat_template} if recipe.chat_template else {}),
            )
            found.append(self._training("sft", job, record_as("sft", "sft", 0), "sft"))
        found.append(self._reward("reward_model", "sft", 0, None, ()))
        found.append(self._responses("responses", "sft", 0, None))
        found.append(self._evaluation("evaluation", "sft", 0, None, "reward_model", "responses"))
        if recipe.evaluation.best_of_n is not None:
            found += self._best_of_n(recipe.evaluation.best_of_n)
        return found

    def _best_of_n(self, n: int) -> list[Stage]:
        measured = self.recipe.evaluation
        name = "best_of_n/responses"
        prompts = Made("data", "best_of_n_prompts.jsonl")
        samples = self._sampling(
            name, "best_of_n", None, prompts, n, record_as("responses", "sft", 0)
        )
        return [
            samples,
            Stage(
                "best_of_n/scores",
                f"{STAGES}:measure_best_of_n",
                {"gold": measured.gold},
                (name, "reward_model"),
                record_as("best_of_n", "sft", 0),
                self._execution({}),
            ),
        ]

    # -- one round -----------------------------------------------------------------------------

    def _round(self, name: str, arm: Arm, number: int) -> list[Stage]:
        here = f"methods/{name}/round-{number}"
        before = f"methods/{name}/round-{number - 1}"
        policy = f"{before}/policy" if number > 1 else None
        stages: list[Stage] = []
        reward = "reward_model"
        if not arm.is_dpo and arm.method.trains:
            groups: tuple[str, ...] = ()
            if "groups" in arm.method.needs:
                stages.append(self._groups(f"{here}/groups", name, number, policy))
                groups = (f"{here}/groups",)
            reward = f"{here}/reward_model"
            stages.append(self._reward(reward, name, number, arm, groups))
        stages.append(self._policy(f"{here}/policy", name, number, policy, reward))
        stages.append(self._responses(f"{here}/responses", name, number, f"{here}/policy"))
        earlier = f"{before}/responses" if number > 1 else "responses"
        stages.append(
            self._evaluation(f"{here}/evaluation", name, number, f"{here}/policy", reward, earlier)
        )
        if self.recipe.judge.kind != "none":
            stages.append(
                Stage(
                    f"{here}/judgement",
                    f"{STAGES}:judge_against_sft",
                    {"judge": self._judge(), "judged": self.recipe.evaluation.judged}
                    | {"ours": f"{here}/responses"},
                    ("responses", f"{here}/responses"),
                    record_as("evaluate", name, number),
                    self._judging(),
                )
            )
        return stages

    def _groups(self, here: str, name: str, number: int, policy: str | None) -> Stage:
        prompts, responses = f"group_prompts-{number}.jsonl", self.recipe.groups.responses
        record = record_as("groups", name, number)
        return self._sampling(
            here, f"groups/{number}", policy, Made("data", prompts), responses, record, GROUPS
        )

    def _responses(self, here: str, name: str, number: int, policy: str | None) -> Stage:
        prompts, responses = "eval_prompts.jsonl", self.recipe.evaluation.responses
        record = record_as("responses", name, number)
        return self._sampling(here, "evaluation", policy, Made("data", prompts), responses, record)

    def _sampling(
        self,
        here: str,
        role: str,
        policy: str | None,
        prompts: Made,
        responses: int,
        record: dict[str, Any],
        makes: str = "responses.jsonl",
    ) -> Stage:
        recipe = self.recipe
        job = Sample(
            self._of_policy(policy),
            prompts,
            makes,
            responses=responses,
            sampling=recipe.sampling,
            seed=random_seed(recipe.seed, role),
            server=None if recipe.sampler in ("transformers", "vllm") else recipe.sampler,
            vllm=recipe.sampler == "vllm",
        )
        return self._stage(here, job, record, {"batch_size": recipe.execution.sampling_batch_size})

    def _reward(
        self, here: str, name: str, number: int, arm: Arm | None, groups: tuple[str, ...]
    ) -> Stage:
        """From the fine-tuned policy's backbone and a new head, as every round's reward model.

        All arms of a round share the head's draws and the order of the pairs, so that what differs
        between two reward models of a round is what was trained, and not the luck of a start. The
        first one, which an arm may keep, shares those of round 1.
        """
        section = self.recipe.reward
        settings: dict[str, Any] = dict(section.settings)
        own = None
        if arm is not None:
            if arm.method.training is with_groups:
                settings |= {"preset": self.recipe.preset, **section.meta}
            elif arm.method.training is not pairs_only:
                own = arm.reward
            settings |= {**arm.method.settings, **arm.settings}
        job = TrainReward(
            self._of_policy(None),
            Made("data", "pairs.jsonl"),
            {"": Made("data", "heldout.jsonl")},
            Made(groups[0], GROUPS) if groups else None,
            own,
            settings=self._settings(settings, f"reward/{max(number, 1)}"),
        )
        record = record_as("reward_model", name, number)
        return self._training(here, job, record, "reward", REWARD_LOG)

    def _policy(self, here: str, name: str, number: int, policy: str | None, reward: str) -> Stage:
        recipe = self.recipe
        method, arm = recipe.optimiser_of(name), recipe.methods[name]
        record = record_as("ppo", name, number)
        start, reference = self._of_policy(policy), self._of_policy(None)
        if method == "dpo":
            settings = self._settings({**recipe.dpo.settings, **arm.policy_settings}, "dpo")
            pairs = Made("data", "pairs.jsonl")
            job = Optimise(method, start, reference, pairs=pairs, settings=settings)
            return self._training(here, job, record, "dpo", POLICY_LOG)
        settings = dict(recipe.policy.settings) if method == recipe.policy.method else {}
        settings |= arm.policy_settings
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
            reward=Made(reward),
            prompts=Made("data", "prompts.jsonl"),
            watch=recipe.evaluation.gold,
            settings=self._settings(settings, f"policy/{number}"),
        )
        section = None if method == "ppo" else "policy"
        return self._training(here, job, record, section, POLICY_LOG)

    def _evaluation(
        self, here: str, name: str, number: int, policy: str | None, reward: str, before: str
    ) -> Stage:
        recipe = self.recipe
        responses = here.replace("evaluation", "responses")
        settings = {
            **asdict(recipe.evaluation),
            "policy": plain_input(self._of_policy(policy)),
            "reference": plain_input(self._of_policy(None)),
            "reward": reward,
            "responses_stage": responses,
            "before": before,
            "start": policy is None,
            "policy_stage": policy,
        }
        needs = ["data", "responses", responses, before, reward, *self._needs_policy(None)]
        needs += self._needs_policy(policy)
        return Stage(
            here,
            f"{STAGES}:evaluate",
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
            f"{STAGES}:compare",
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

    def _of_policy(self, policy: str | None) -> Input:
        """The policy that a stage makes; by default the fine-tuned one."""
        if policy is not None:
            return Made(policy)
        return Made("sft") if self.recipe.sft is not None else self.recipe.model

    def _needs_policy(self, policy: str | None) -> tuple[str, ...]:
        if policy is not None:
            return (policy,)
        return ("sft",) if self.recipe.sft is not None else ()

    def _judge(self) -> dict[str, Any]:
        settings = asdict(self.recipe.judge)
        return {k: v for k, v in settings.items() if k not in JUDGING}

    def _judging(self) -> dict[str, Any]:
        return {k: getattr(self.recipe.judge, k) for k in JUDGING}

    def _execution(self, way: dict[str, Any]) -> dict[str, Any]:
        return {**asdict(self.recipe.execution), "way": way}

    def _settings(self, chosen: dict[str, Any], role: str) -> dict[str, Any]:
        """A training's settings with its seed, and LoRA's where the recipe has it."""
        recipe = self.recipe
        found = {**chosen, "seed": random_seed(recipe.seed, role)}
        return found if recipe.lora is None else {**found, "use_peft": True, **recipe.lora}

    def _training(
        self,
        here: str,
        job: Job,
        record: dict[str, Any],
        section: str | None,
        logged: dict[str, str] | None = None,
    ) -> Stage:
        """A job that trains, and how this machine runs it."""
        recipe, execution = self.recipe, self.recipe.execution
        way: dict[str, Any] = {"report_to": execution.report_to, "bf16": execution.bf16}
        way["gradient_checkpointing"] = execution.gradient_checkpointing
        if section is not None:
            batch_size = getattr(recipe, section).batch_size
            micro, steps = accumulation(batch_size, execution, section=section)
            way |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
            if section != "policy":
                way["per_device_eval_batch_size"] = 2 * execution.micro_batch_size
        else:  # ppo
            way["micro_batch_size"] = execution.micro_batch_size
            if "forward_batch_size" not in job.settings:  # type: ignore[attr-defined]
                way["forward_batch_size"] = execution.sampling_batch_size
        return self._stage(here, job, record, way, logged or {"loss": "loss"})

    def _stage(
        self,
        here: str,
        job: Job,
        record: dict[str, Any],
        way: dict[str, Any],
        logged: dict[str, str] | None = None,
    ) -> Stage:
        settings = {"job": plain(job), "logged": logged or {}}
        return Stage(here, RUN_JOB, settings, inputs_of(job), record, self._execution(way))


JUDGING = ("concurrency", "price_in", "price_out", "max_requests", "key_variable")
"""How the judge is asked, not what it says."""
