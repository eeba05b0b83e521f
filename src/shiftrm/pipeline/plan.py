"""Which stages a recipe has. Each training is a command that anyone could give by hand."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.demo_plan import record_as
from shiftrm.pipeline.engine import Stage, random_seed
from shiftrm.pipeline.experiment import Arm, Recipe
from shiftrm.pipeline.launch import TEMPLATES, accumulation

COMMAND = "shiftrm.pipeline.launch:run_command"
STAGES = "shiftrm.pipeline.stages"

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
            words = ["sft", "--model", recipe.model]
            words += ["--demonstrations", "{stage:data}/demonstrations.jsonl"]
            found.append(
                self._training(
                    "sft", words, ("data",), record_as("sft", "sft", 0), "sft", recipe.sft
                )
            )
        found.append(self._reward("reward_model", "sft", 0, None, ()))
        found.append(self._responses("responses", "sft", 0, None))
        found.append(self._evaluation("evaluation", "sft", 0, None, "reward_model", "responses"))
        if recipe.evaluation.best_of_n is not None:
            found += self._best_of_n()
        return found

    def _best_of_n(self) -> list[Stage]:
        measured = self.recipe.evaluation
        words = ["sample", *self._of_policy("--policy", None)]
        words += ["--prompts", "{stage:data}/best_of_n_prompts.jsonl"]
        words += ["--output", "{out}/responses.jsonl"]
        words += ["--responses", str(measured.best_of_n)]
        name = "best_of_n/responses"
        samples = self._sampling(name, words, "best_of_n", None, "sft", 0)
        return [
            samples,
            Stage(
                "best_of_n/scores",
                f"{STAGES}:measure_best_of_n",
                {"gold": measured.gold},
                (name, "reward_model"),
                record_as("best_of_n", "sft", 0),
                self._execution([]),
            ),
        ]

    # -- one round -----------------------------------------------------------------------------

    def _round(self, name: str, arm: Arm, number: int) -> list[Stage]:
        here = f"methods/{name}/round-{number}"
        before = f"methods/{name}/round-{number - 1}"
        policy = f"{before}/policy" if number > 1 else None
        stages: list[Stage] = []
        reward = "reward_model"
        if not arm.is_dpo and arm.reward != "fixed":
            groups: tuple[str, ...] = ()
            if arm.reward == "metarm":
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
        words = ["sample", *self._of_policy("--policy", policy)]
        words += ["--prompts", f"{{stage:data}}/group_prompts-{number}.jsonl"]
        words += ["--output", "{out}/groups.jsonl"]
        words += ["--responses", str(self.recipe.groups.responses)]
        return self._sampling(here, words, f"groups/{number}", policy, name, number)

    def _responses(self, here: str, name: str, number: int, policy: str | None) -> Stage:
        words = ["sample", *self._of_policy("--policy", policy)]
        words += ["--prompts", "{stage:data}/eval_prompts.jsonl"]
        words += ["--output", "{out}/responses.jsonl"]
        words += ["--responses", str(self.recipe.evaluation.responses)]
        return self._sampling(here, words, "evaluation", policy, name, number)

    def _sampling(
        self, here: str, words: list[str], role: str, policy: str | None, name: str, number: int
    ) -> Stage:
        recipe = self.recipe
        for key, value in asdict(recipe.sampling).items():
            words += [f"--{key.replace('_', '-')}", f"{value}"]
        words += ["--seed", str(random_seed(recipe.seed, role))]
        if recipe.sampler == "vllm":
            words += ["--vllm"]
        elif recipe.sampler != "transformers":
            words += ["--server", recipe.sampler]
        makes = words[words.index("--output") + 1]
        stage = "groups" if makes.endswith("groups.jsonl") else "responses"
        return Stage(
            here,
            COMMAND,
            {"words": words, "makes": makes},
            ("data", *self._needs_policy(policy)),
            record_as(stage, name, number),
            self._execution(["--batch-size", str(recipe.execution.sampling_batch_size)]),
        )

    def _reward(
        self, here: str, name: str, number: int, arm: Arm | None, groups: tuple[str, ...]
    ) -> Stage:
        """From the fine-tuned policy's backbone and a new head, as every round's reward model.

        All arms of a round share the head's draws and the order of the pairs, so that what differs
        between two reward models of a round is what was trained, and not the luck of a start. The
        first one, which an arm may keep, shares those of round 1.
        """
        section = self.recipe.reward
        words = ["train", *self._of_policy("--model", None)]
        words += ["--pairs", "{stage:data}/pairs.jsonl"]
        words += ["--eval-pairs", "{stage:data}/heldout.jsonl"]
        settings: dict[str, Any] = dict(section.settings)
        if groups:
            words += ["--groups", f"{{stage:{groups[0]}}}/groups.jsonl"]
            settings |= {"preset": self.recipe.preset, **section.meta}
        settings |= arm.settings if arm is not None else {}
        return self._training(
            here,
            words,
            ("data", *self._needs_policy(None), *groups),
            record_as("reward_model", name, number),
            f"reward/{max(number, 1)}",
            section,
            settings=settings,
            logged=REWARD_LOG,
        )

    def _policy(self, here: str, name: str, number: int, policy: str | None, reward: str) -> Stage:
        recipe = self.recipe
        method = recipe.optimiser_of(name)
        words = ["optimise", method, *self._of_policy("--policy", policy)]
        words += self._of_policy("--reference", None)
        needs = ["data", *self._needs_policy(None), *self._needs_policy(policy)]
        record = record_as("ppo", name, number)
        if method == "dpo":
            words += ["--pairs", "{stage:data}/pairs.jsonl"]
            return self._training(
                here, words, tuple(dict.fromkeys(needs)), record, "dpo", recipe.dpo,
                settings={**recipe.dpo.settings, **recipe.methods[name].policy_settings},
                logged=POLICY_LOG,
            )  # fmt: skip
        words += ["--reward", f"{{stage:{reward}}}/model"]
        words += ["--prompts", "{stage:data}/prompts.jsonl"]
        if recipe.evaluation.gold is not None:
            words += ["--watch", recipe.evaluation.gold]
        arm = recipe.methods[name]
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
        needs.append(reward)
        return self._training(
            here, words, tuple(dict.fromkeys(needs)), record, f"policy/{number}",
            None if method == "ppo" else recipe.policy,
            settings=settings, logged=POLICY_LOG, method=method,
        )  # fmt: skip

    def _evaluation(
        self, here: str, name: str, number: int, policy: str | None, reward: str, before: str
    ) -> Stage:
        recipe = self.recipe
        responses = here.replace("evaluation", "responses")
        settings = {
            **asdict(recipe.evaluation),
            "policy": f"{{stage:{policy}}}/model" if policy else self._sft,
            "reference": self._sft,
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
            self._execution([]),
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

    @property
    def _sft(self) -> str:
        return "{stage:sft}/model" if self.recipe.sft is not None else self.recipe.model

    def _of_policy(self, flag: str, policy: str | None) -> list[str]:
        return [flag, f"{{stage:{policy}}}/model" if policy else self._sft]

    def _needs_policy(self, policy: str | None) -> tuple[str, ...]:
        if policy is not None:
            return (policy,)
        return ("sft",) if self.recipe.sft is not None else ()

    def _judge(self) -> dict[str, Any]:
        settings = asdict(self.recipe.judge)
        return {k: v for k, v in settings.items() if k not in JUDGING}

    def _judging(self) -> dict[str, Any]:
        return {k: getattr(self.recipe.judge, k) for k in JUDGING}

    def _execution(self, words: list[str]) -> dict[str, Any]:
        return {**asdict(self.recipe.execution), "words": words}

    def _training(
        self,
        here: str,
        words: list[str],
        needs: tuple[str, ...],
        record: dict[str, Any],
        role: str,
        section: Any,
        *,
        settings: dict[str, Any] | None = None,
        logged: dict[str, str] | None = None,
        method: str = "",
    ) -> Stage:
        """A command that trains: its words, and how this machine runs them."""
        recipe, execution = self.recipe, self.recipe.execution
        chosen = dict(section.settings if settings is None else settings)
        chosen |= {"seed": random_seed(recipe.seed, role)}
        if recipe.lora is not None:
            chosen |= {"use_peft": True, **recipe.lora}
        if recipe.chat_template is not None and words[0] == "sft":
            chosen["chat_template_path"] = _template(recipe.chat_template)
        way: dict[str, Any] = {"report_to": execution.report_to, "bf16": execution.bf16}
        way["gradient_checkpointing"] = execution.gradient_checkpointing
        if section is not None:
            name = next(k for k, v in vars(recipe).items() if v is section)
            micro, steps = accumulation(section.batch_size, execution, section=name)
            way |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
            if section is not recipe.policy:
                way["per_device_eval_batch_size"] = 2 * execution.micro_batch_size
        elif method == "ppo":
            way["micro_batch_size"] = execution.micro_batch_size
            if "forward_batch_size" not in chosen:
                way["forward_batch_size"] = execution.sampling_batch_size
        return Stage(
            here,
            COMMAND,
            {
                "words": [*words, "--output", "{out}/model", *map(_setting, chosen.items())],
                "makes": "{out}/model",
                "logged": logged or {"loss": "loss"},
            },
            needs,
            record,
            self._execution([_setting(item) for item in way.items()]),
        )


def _template(name: str) -> str:
    """A file as it is; a template of this package by its name."""
    return f"{{template:{name}}}" if (TEMPLATES / f"{name}.jinja").is_file() else name


JUDGING = ("concurrency", "price_in", "price_out", "max_requests", "key_variable")
"""How the judge is asked, not what it says."""


def _setting(item: tuple[str, Any]) -> str:
    """`key=value` as a word, the value as YAML reads it back."""
    key, value = item
    if isinstance(value, bool):
        return f"{key}={'true' if value else 'false'}"
    if isinstance(value, list | tuple | dict):
        return f"{key}={json.dumps(value)}"
    return f"{key}={'null' if value is None else value}"
