"""A recipe: the settings of iterative RLHF on real data, one field per option, defaults said here.

What the training commands take (learning rates, schedules, LoRA, ...) stands in the `settings` of a
section under the commands' own names and is judged by their own classes, so that it is declared in
one place only.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shiftrm.errors import UserError, suggest
from shiftrm.methods.method import METHODS, Method
from shiftrm.models.sampling import SamplingConfig
from shiftrm.pipeline.launch import Execution
from shiftrm.trainers.reward_configs import PRESETS

__all__ = ["Arm", "DataSettings", "JudgeSettings", "Recipe", "Source"]

OPTIMISERS = ("ppo", "rloo", "grpo", "dpo")
JUDGES = ("none", "endpoint", "reward-model", "gold")
OWNED = {
    "seed": "the run says it, by `seed`",
    "output_dir": "the run says it",
    "use_peft": "the run says it, by `lora`",
    "bf16": "say execution.bf16",
    "fp16": "say execution.bf16",
    "report_to": "say execution.report_to",
    "gradient_checkpointing": "say execution.gradient_checkpointing",
    "gradient_accumulation_steps": "it follows from batch_size and execution.micro_batch_size",
    "per_device_train_batch_size": "say batch_size and execution.micro_batch_size",
    "micro_batch_size": "say execution.micro_batch_size",
}
"""Settings that the loop says itself, and by which of its own."""


@dataclass(frozen=True)
class Source:
    """One data set (`shiftrm convert --help` lists formats and their options).

    Attributes:
        format: how its rows are read, such as "hh_rlhf"; "preference" is TRL's own.
        source: hub name, file or folder; by default where the format's publisher keeps it.
        split: by default the format's own.
        options: of the format.
    """

    format: str
    source: str | None = None
    split: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how much of it.

    Attributes:
        demonstrations: for supervised fine-tuning; not needed where the model is fine-tuned.
        pairs: preference pairs, in the distribution that was labelled.
        heldout: pairs to measure accuracy on; by default `heldout_share` of the prompts of `pairs`.
        prompts: that the policy answers, without labels: for groups and for policy optimisation.
        eval_prompts: to measure on; by default `heldout_share` of `prompts`.
        heldout_share: 0.05 by default, of whichever of the two sets is not named.
        max_pairs, max_demonstrations, max_prompts: how many at most, drawn by the run's seed.
    """

    pairs: Source
    prompts: Source
    demonstrations: Source | None = None
    heldout: Source | None = None
    eval_prompts: Source | None = None
    heldout_share: float | None = None
    max_pairs: int | None = None
    max_demonstrations: int | None = None
    max_prompts: int | None = None
    max_heldout: int | None = 2000

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"data.heldout_share is {self.heldout_share}; it must lie in (0, 1)")
        if self.heldout_share is not None and self.heldout and self.eval_prompts:
            raise UserError(
                "data.heldout_share takes a share of what is not named, but data.heldout and "
                "data.eval_prompts are; leave it out, or say heldout=null or eval_prompts=null"
            )
        for name in ("max_pairs", "max_demonstrations", "max_prompts", "max_heldout"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"data.{name} is {value}; it must be at least 2, or null")

    @property
    def share(self) -> float:
        """`heldout_share`, or its default."""
        return 0.05 if self.heldout_share is None else self.heldout_share


@dataclass(frozen=True)
class SFTSection:
    """Supervised fine-tuning (`shiftrm sft`); `batch_size` examples an optimizer step."""

    batch_size: int = 32
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardSection:
    """Reward-model training (`shiftrm train`); `batch_size` pairs an optimizer step.

    Attributes:
        meta: further settings of the arms that adapt, as `meta_batch_size`.
    """

    batch_size: int = 16
    settings: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupSection:
    """Unlabelled responses of the round's policy (`shiftrm sample`).

    Attributes:
        prompts: how many of the training prompts are answered, drawn anew each round; "all" for
            every one of them, as in the paper.
    """

    prompts: int | Literal["all"] = 1000
    responses: int = 5


@dataclass(frozen=True)
class PolicySection:
    """Policy optimisation (`shiftrm optimise`).

    Attributes:
        method: ppo (ours), rloo or grpo (TRL's).
        batch_size: responses an optimizer step of rloo and grpo, over all processes; ppo has its
            own setting `minibatch_size`.
        settings: of that method.
    """

    method: str = "ppo"
    batch_size: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DPOSection:
    """The DPO baseline on the same pairs; `batch_size` pairs an optimizer step."""

    batch_size: int = 32
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way through the rounds.

    Attributes:
        reward: a name in `methods.method.METHODS` or `package.module:attribute`: "fixed" keeps the
            first reward model (vanilla PPO), "retrained" trains a new one on the same pairs each
            round, "metarm" does so with groups of the round's policy. All arms
            of a round start from the same head and see the pairs in the same order, in round 1
            those of the first reward model.
        policy: optimiser of this arm; the recipe's by default; "dpo" needs no reward model.
        rounds: of this arm; the recipe's by default, 1 for DPO.
        settings: over those of the section `reward`.
        policy_settings: of its optimiser; over those of the section `policy` if that is its
            method, too.
    """

    reward: str = "metarm"
    policy: str | None = None
    rounds: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    policy_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """How the round's reward model is made."""
        return METHODS.get(self.reward)

    @property
    def is_dpo(self) -> bool:
        return self.policy == "dpo"


@dataclass(frozen=True)
class EvaluationSettings:
    """What every round is measured on.

    Attributes:
        prompts: test prompts that are answered (the paper judges 100 of them).
        judged: of these, how many a judge sees.
        responses: to each prompt; the first is judged, two are needed for differences.
        kept_values: how many reward differences are kept for pictures of their distribution.
        embedder: sentence-transformers name or local folder, for the embedding half of diversity.
        gold: a second reward model that trains nothing ("gold": the gold world's reward): scores
            every step's roll-outs and the responses at the end of a round, proxy against gold.
        best_of_n: so many samples of the SFT policy a prompt, to see what the first reward model
            picks out of n; needs `gold`.
        best_of_n_prompts: how many of the test prompts that is done on.
    """

    prompts: int = 1000
    judged: int = 100
    responses: int = 2
    kept_values: int = 1000
    diversity_prompts: int = 100
    embedder: str | None = None
    gold: str | None = None
    best_of_n: int | None = None
    best_of_n_prompts: int = 100


@dataclass(frozen=True)
class JudgeSettings:
    """Who compares two responses.

    Attributes:
        kind: "none", "endpoint" (an OpenAI-compatible server), "reward-model" (`model` is its
            folder) or "gold" (prompts of the gold world only).
        model: name at the endpoint, or folder.
        base_url: of the endpoint; the key comes from the environment variable `key_variable`.
        template: name or file of the judge's prompt.
        parameters: of the requests, over temperature 0; null takes one away.
        tie_margin: of judges that give numbers.
        price_in, price_out: of a million tokens, for the estimate of the cost.
        max_requests: more are refused before the first is sent.
    """

    kind: str = "none"
    model: str | None = None
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    template: str = "helpful"
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    tie_margin: float = 0.0
    price_in: float | None = None
    price_out: float | None = None
    max_requests: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in JUDGES:
            raise UserError(f"judge.kind is {self.kind!r}{suggest(self.kind, list(JUDGES))}")
        if self.kind in ("endpoint", "reward-model") and self.model is None:
            raise UserError(f"judge.kind is {self.kind}; say judge.model, too")


@dataclass(frozen=True)
class Recipe:
    """A whole run of iterative RLHF.

    Attributes:
        model: base model (folder or hub name), or the fine-tuned policy where `sft` is null.
        chat_template: a jinja file for models without one; "human_assistant" is in the package.
        preset: MetaRM's, for the arms that adapt.
        sampling: of all responses, also in policy optimisation.
        sampler: who draws responses for groups and evaluation: "transformers", "vllm" (a server is
            started for every policy), or the URL of a running one.
        lora: `lora_r`, `lora_alpha`, ... for every model; null trains all weights.
    """

    model: str
    data: DataSettings
    name: str = "run"
    seed: int = 0
    rounds: int = 4
    preset: str = "paper"
    methods: dict[str, Arm] = field(
        default_factory=lambda: {
            "fixed": Arm(reward="fixed"),
            "metarm": Arm(reward="metarm"),
            "dpo": Arm(reward="fixed", policy="dpo"),
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
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}; it must be at least 1")
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}{suggest(self.preset, list(PRESETS))}")
        if self.sampler not in ("transformers", "vllm") and "://" not in self.sampler:
            raise UserError(
                f"sampler is {self.sampler!r}; expected transformers, vllm, or the URL of a "
                "server, as http://localhost:8000/v1"
            )
        if not self.methods:
            raise UserError("methods is empty; name at least one arm")
        if self.policy.method not in OPTIMISERS[:3]:
            raise UserError(
                f"policy.method is {self.policy.method!r}"
                f"{suggest(self.policy.method, list(OPTIMISERS[:3]))}"
            )
        for name, arm in self.methods.items():
            self._check_arm(name, arm)
        if self.sft is not None and self.data.demonstrations is None:
            raise UserError(
                "data.demonstrations is missing; name them, or say sft=null if the model is a "
                "fine-tuned policy"
            )
        self._check_sections()

    def _check_arm(self, name: str, arm: Arm) -> None:
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name == "sft":
            raise UserError(f"methods.{name}: use letters, digits, _, - and ., and not 'sft'")
        known = METHODS.names()
        if ":" not in arm.reward and arm.reward not in known:
            raise UserError(f"methods.{name}.reward is {arm.reward!r}{suggest(arm.reward, known)}")
        if "labels" in arm.method.needs:
            raise UserError(
                f"methods.{name}.reward is {arm.reward!r}, which needs new labels of the policy's "
                "responses; a recipe has none"
            )
        if arm.policy is not None and arm.policy not in OPTIMISERS:
            raise UserError(
                f"methods.{name}.policy is {arm.policy!r}{suggest(arm.policy, list(OPTIMISERS))}"
            )
        if arm.rounds is not None and arm.rounds < 1:
            raise UserError(f"methods.{name}.rounds is {arm.rounds}; it must be at least 1")

    def _check_sections(self) -> None:
        """Counts are at least one; what the loop says itself is not said twice."""
        for section in ("sft", "reward", "groups", "policy", "dpo", "evaluation"):
            value = getattr(self, section)
            for option in fields(value) if value is not None else ():
                number = getattr(value, option.name)
                if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                    raise UserError(f"{section}.{option.name} is {number}; it must be at least 1")
            self._check_owned(f"{section}.settings", getattr(value, "settings", {}))
        self._check_owned("reward.meta", self.reward.meta)
        self._check_owned("lora", self.lora or {})
        for name, arm in self.methods.items():
            self._check_owned(f"methods.{name}.settings", arm.settings)
            self._check_owned(f"methods.{name}.policy_settings", arm.policy_settings)
        if self.groups.responses < 2:
            raise UserError("groups.responses is 1; a group needs at least two")
        if self.evaluation.responses < 2:
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

    def rounds_of(self, name: str) -> int:
        """How many rounds an arm runs."""
        arm = self.methods[name]
        return arm.rounds or (1 if arm.is_dpo else self.rounds)

    def optimiser_of(self, name: str) -> str:
        """How an arm's policy is trained."""
        return self.methods[name].policy or self.policy.method
