"""An experiment of iterative RLHF: what a recipe file holds, one field per option."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.methods.method import METHODS, Method
from shiftrm.models.sampling import SamplingConfig
from shiftrm.pipeline.domain_section import DomainSection
from shiftrm.pipeline.external import COMMAND, check_commands
from shiftrm.pipeline.launch import Execution
from shiftrm.pipeline.sections import (
    DataSettings,
    DPOSection,
    EvaluationSettings,
    GroupSection,
    JudgeSettings,
    PolicySection,
    RewardSection,
    SFTSection,
    WorldSection,
)
from shiftrm.trainers.reward_configs import PRESETS
from shiftrm.world.world import GOLD

__all__ = ["Arm", "Experiment", "arms_by_name"]

DPO = "dpo"
REWARDED = ("ppo", "rloo", "grpo", COMMAND)
OPTIMISERS = (*REWARDED, DPO)
OWNED = {
    "seed": "the run sets it from its own `seed`",
    "output_dir": "the run sets it",
    "use_peft": "the run sets it where `lora` is given",
    "bf16": "set execution.bf16",
    "fp16": "set execution.bf16",
    "report_to": "set execution.report_to",
    "gradient_checkpointing": "set execution.gradient_checkpointing",
    "gradient_accumulation_steps": "it follows from batch_size and execution.micro_batch_size",
    "per_device_train_batch_size": "set batch_size and execution.micro_batch_size",
    "micro_batch_size": "set execution.micro_batch_size",
}
"""Settings that a recipe cannot give to a training command, and what to do instead."""

USED_IN_DOMAINS = (
    *("domains", "name", "seed", "methods", "sft", "reward", "policy", "dpo", "sampling"),
    "execution",
)
"""What can be set for a run over domains; of `evaluation` also `responses`."""


@dataclass(frozen=True)
class Arm:
    """One way through the rounds.

    Attributes:
        reward: a name in `methods.method.METHODS` or `package.module:attribute`: "fixed" keeps the
            first reward model (vanilla PPO), "retrained" trains a new one on the same pairs each
            round, "metarm" also uses groups of the round's policy. All arms of a round start from
            the same head and see the pairs in the same order; in round 1 so does the first reward
            model.
        policy: optimiser of this arm; by default the recipe's. "dpo" needs no reward model,
            "command" is the program of `policy.command`.
        rounds: number of rounds; by default the recipe's, and 1 for DPO.
        settings: override those of the section `reward`.
        policy_settings: settings of the optimiser; override those of the method, and those of the
            section `policy` if that has the same optimiser.
        reference_reset: whether the KL of a round is to the policy that the round starts from; by
            default as the method says. What is measured is always the KL to the SFT policy.
        labels: pairs to label in a round, for methods that need labels; by default `world.labels`.
    """

    reward: str = "metarm"
    policy: str | None = None
    rounds: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    policy_settings: dict[str, Any] = field(default_factory=dict)
    reference_reset: bool | None = None
    labels: int | None = None

    @property
    def method(self) -> Method:
        """The method that makes the round's reward model."""
        return METHODS.get(self.reward)

    @property
    def is_dpo(self) -> bool:
        return self.policy == DPO

    @property
    def resets_reference(self) -> bool:
        """Whether the KL of a round is to the policy that the round starts from."""
        given = self.reference_reset
        return self.method.reference_reset if given is None else given


def arms_by_name(names: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return arms, as plain data, for `methods` given as a list of names.

    Args:
        known: the recipe's arms. Another name is that of a registered method, or "dpo".
    """
    default = {DPO: {"reward": "fixed", "policy": DPO}}
    if len(set(names)) < len(names):
        raise UserError(f"methods is [{', '.join(names)}]; name no arm twice")
    return {name: known.get(name) or default.get(name) or {"reward": name} for name in names}


MOST_ROUNDS = 1000
"""Every round is planned, so that many more would take hours before anything runs."""


def _check_rounds(name: str, rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"{name} is {rounds}; it must be at least 1")
    if rounds > MOST_ROUNDS:
        raise UserError(f"{name} is {rounds}; it must be at most {MOST_ROUNDS}")


@dataclass(frozen=True)
class Experiment:
    """A whole run of iterative RLHF on data sets or in the gold world, or a run over domains.

    Attributes:
        model: base model (folder or hub name), or the fine-tuned policy if `sft` is null.
        data: the data sets; null in the gold world.
        world: the gold world in place of `model` and `data`.
        domains: the gold world's domains in place of these, and OODPL in them: no rounds, but a
            policy for every target by every method (`domain_section.DOMAIN_ARMS`). Sections that
            such a run does not use cannot be set.
        chat_template: a jinja file for models without one; "human_assistant" is in the package.
        preset: MetaRM's preset, for the arms with a meta step.
        sampling: how all responses are sampled, also in policy optimisation.
        sampler: what samples the responses of groups and evaluation: "transformers", "vllm" (a
            server is started for every policy), or the URL of a running server.
        lora: `lora_r`, `lora_alpha`, ... for every model; null trains all weights.
    """

    model: str | None = None
    data: DataSettings | None = None
    world: WorldSection | None = None
    domains: DomainSection | None = None
    name: str = "run"
    seed: int = 0
    rounds: int = 4
    preset: str = "paper"
    methods: dict[str, Arm] = field(
        default_factory=lambda: {
            "fixed": Arm(reward="fixed"),
            "metarm": Arm(reward="metarm"),
            "dpo": Arm(reward="fixed", policy=DPO),
        }
    )
    chat_template: str | None = None
    sft: SFTSection | None = field(default_factory=SFTSection)
    reward: RewardSection = field(default_factory=RewardSection)
    groups: GroupSection = field(default_factory=GroupSection)
    policy: PolicySection = field(default_factory=PolicySection)
    dpo: DPOSection = field(default_factory=DPOSection)
    lora: dict[str, Any] | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: str = "transformers"
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        self._check_source()
        _check_rounds("rounds", self.rounds)
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}{suggest(self.preset, list(PRESETS))}")
        if self.sampler not in ("transformers", "vllm") and "://" not in self.sampler:
            raise UserError(
                f"sampler is {self.sampler!r}; expected transformers, vllm, or the URL of a "
                "server, as http://localhost:8000/v1"
            )
        if not self.methods:
            raise UserError("methods is empty; name at least one arm")
        if self.policy.method not in REWARDED:
            raise UserError(
                f"policy.method is {self.policy.method!r}"
                f"{suggest(self.policy.method, list(REWARDED))}"
            )
        for name, arm in self.methods.items():
            self._check_arm(name, arm)
        check_commands(self)
        self._check_sections()

    def _check_source(self) -> None:
        """Check that there is one of: domains, a world, or data and a model."""
        if self.domains is not None:
            self._check_unused()
        elif self.world is not None:
            for name in ("model", "data", "chat_template"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}: the gold world has its own; leave it out")
            if self.sft is None:
                raise UserError("sft is null; the gold world's base model needs it")
            if self.evaluation.prompts > self.world.eval_prompts:
                raise UserError(
                    f"evaluation.prompts is {self.evaluation.prompts}; it must be at most the "
                    f"world's {self.world.eval_prompts}: raise world.eval_prompts"
                )
        elif self.data is None:
            raise UserError("the recipe has neither data nor world nor domains; name its data sets")
        elif self.model is None:
            raise UserError("model is missing; give model=FOLDER or a hub name")
        elif self.sft is not None and self.data.demonstrations is None:
            raise UserError(
                "data.demonstrations is missing; name them, or set sft=null if the model is a "
                "fine-tuned policy"
            )

    def _check_unused(self) -> None:
        """Check that no section is set that a run over domains does not use."""
        for option in fields(self):
            if option.name in USED_IN_DOMAINS:
                continue
            made, default = option.default_factory, option.default
            plain: Any = default if made is MISSING else made()
            if option.name == "evaluation":
                plain = EvaluationSettings(responses=self.evaluation.responses)
            if getattr(self, option.name) != plain:
                raise UserError(f"{option.name}: not used in a run over domains; leave it out")
        if self.sft is None:
            raise UserError("sft is null; the gold world's base model needs it")

    def _check_arm(self, name: str, arm: Arm) -> None:
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name == "sft":
            raise UserError(f"methods.{name}: use letters, digits, _, - and ., and not 'sft'")
        if self.domains is not None:
            self.domains.check_arm(name, arm)
            return
        known = METHODS.names()
        if ":" not in arm.reward and arm.reward not in known:
            raise UserError(f"methods.{name}.reward is {arm.reward!r}{suggest(arm.reward, known)}")
        only_there = sorted(arm.method.needs & {"labels", "gold"})
        if self.world is None and only_there:
            raise UserError(
                f"methods.{name}.reward is {arm.reward!r}, which needs {only_there[0]}; only the "
                "gold world has them"
            )
        if arm.policy is not None and arm.policy not in OPTIMISERS:
            raise UserError(
                f"methods.{name}.policy is {arm.policy!r}{suggest(arm.policy, list(OPTIMISERS))}"
            )
        if arm.rounds is not None:
            _check_rounds(f"methods.{name}.rounds", arm.rounds)
        if arm.labels is not None and "labels" not in arm.method.needs:
            raise UserError(f"methods.{name}.labels: {arm.reward!r} buys no labels; leave it out")
        if arm.labels is not None and arm.labels < 1:
            raise UserError(f"methods.{name}.labels is {arm.labels}; it must be at least 1")

    def _check_sections(self) -> None:
        """Check that counts are at least one, and that no section sets what the run sets."""
        for section in ("sft", "reward", "groups", "policy", "dpo", "evaluation"):
            value = getattr(self, section)
            for option in fields(value) if value is not None else ():
                number = getattr(value, option.name)
                least = 0 if option.name == "sight_pairs" else 1  # 0 switches the tests off
                if isinstance(number, int) and not isinstance(number, bool) and number < least:
                    raise UserError(
                        f"{section}.{option.name} is {number}; it must be at least {least}"
                    )
            self._check_owned(f"{section}.settings", getattr(value, "settings", {}))
        self._check_owned("reward.meta", self.reward.meta)
        self._check_owned("domains.meta", {} if self.domains is None else self.domains.meta)
        self._check_owned("lora", self.lora or {})
        for name, arm in self.methods.items():
            self._check_owned(f"methods.{name}.settings", arm.settings)
            self._check_owned(f"methods.{name}.policy_settings", arm.policy_settings)
        if self.groups.responses < 2:
            raise UserError("groups.responses is 1; a group needs at least two")
        if self.evaluation.responses < 2 and self.domains is None:
            raise UserError("evaluation.responses is 1; a difference needs two")
        if self.evaluation.best_of_n is not None:
            if self.evaluation.best_of_n < 2:
                raise UserError(
                    f"evaluation.best_of_n is {self.evaluation.best_of_n}; it must be at least 2"
                )
            if self.evaluation.gold is None:
                raise UserError(
                    "evaluation.best_of_n needs evaluation.gold, to measure what n picks"
                )

    def _check_owned(self, section: str, settings: dict[str, Any]) -> None:
        for key in settings:
            if key in OWNED:
                raise UserError(f"{section}.{key}: {OWNED[key]}; leave it out here")

    @property
    def gold(self) -> str:
        """Return the name of the gold reward of the run's world."""
        return GOLD if self.world is None else self.world.gold

    @property
    def watched(self) -> str | None:
        """Return `evaluation.gold`, where "gold" is the reward of the run's world."""
        given = self.evaluation.gold
        return self.gold if given == GOLD else given

    @property
    def judge_kind(self) -> str:
        """Return `judge.kind`, where "gold" is the reward of the run's world."""
        return self.gold if self.judge.kind == GOLD else self.judge.kind

    def rounds_of(self, name: str) -> int:
        """Return the number of rounds of an arm."""
        arm = self.methods[name]
        return arm.rounds or (1 if arm.is_dpo else self.rounds)

    def labels_of(self, name: str) -> tuple[int, int]:
        """Return how many pairs an arm labels in a round, and how many it chooses them from."""
        assert self.world is not None
        arm = self.methods[name]
        count = arm.labels or self.world.labels
        return count, count * (self.world.label_pool if arm.method.label_choice == "active" else 1)

    def optimiser_of(self, name: str) -> str:
        """Return the policy optimiser of an arm."""
        return self.methods[name].policy or self.policy.method
