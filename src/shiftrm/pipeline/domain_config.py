"""The settings of a run over the gold world's domains: one field per option, defaults said here."""

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from shiftrm.core.losses import TokenReduction
from shiftrm.errors import UserError, suggest
from shiftrm.models.sampling import SamplingConfig
from shiftrm.oodpl.fine_tuning import FineTuningConfig
from shiftrm.oodpl.meta_test import EvaluationConfig
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.world.build_domains import DomainWorldConfig
from shiftrm.world.language import MAX_RESPONSE_TOKENS

__all__ = ["METHODS", "DomainRunConfig", "MetaSettings", "PairSettings"]

REWARD_MODELS = ("oodpl", "pooled", "oracle")
"""Who learnt from preferences: the bilevel method and Bradley-Terry on the sources' pairs pooled,
and Bradley-Terry on the target's own pairs, which no other method may see."""

METHODS: tuple[str, ...] = (
    "reference",
    "finetuned",
    *(f"{model}_weighted" for model in REWARD_MODELS),
    *(f"{model}_ppo" for model in REWARD_MODELS),
    "dpo",
)
"""How a policy for a target domain is made; see `transfer.stages`."""


@dataclass(frozen=True)
class SFTSettings:
    """Supervised fine-tuning (TRL's SFTTrainer) of the random base model."""

    epochs: float = 2.0
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20


@dataclass(frozen=True)
class MetaSettings:
    """Meta-training (`OODPLConfig` has the meaning of each)."""

    outer_steps: int = 150
    learning_rate: float = 1e-3
    domains_per_step: int = 2
    support_batch_size: int = 64
    query_batch_size: int = 64
    inner_learning_rate: float = 0.3
    inner_steps: int = 1
    normalize_weights: bool = True
    reduction: str = "mean"
    curvature: str = "exact"
    evaluations: int = 6


@dataclass(frozen=True)
class PairSettings:
    """What learns from pairs directly takes as many updates on as many pairs as meta-training."""

    learning_rate: float = 5e-4
    guide_beta: float = 0.5  # of the weights exp(r/beta) made of a Bradley-Terry model's rewards


@dataclass(frozen=True)
class DPOSettings:
    """DPO on the sources' pairs (TRL)."""

    learning_rate: float = 2e-4
    beta: float = 0.1


def gold_world_fine_tuning() -> FineTuningConfig:
    """Seven and a half epochs of a domain's 512 rows."""
    return FineTuningConfig(updates=60, batch_size=64, learning_rate=3e-4)


def gold_world_ppo() -> PPOConfig:
    """60 updates of 64 sequences, as fine-tuning takes."""
    return PPOConfig(
        steps=15,
        prompts_per_step=16,
        rollouts_per_prompt=16,
        minibatch_size=64,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        kl_coefficient=0.05,
        kl_target=6.0,
        value_clip=None,
        truncation_penalty=1.0,
        sampling=SamplingConfig(max_new_tokens=MAX_RESPONSE_TOKENS),
    )


def gold_world_evaluation() -> EvaluationConfig:
    return EvaluationConfig(sampling=SamplingConfig(max_new_tokens=MAX_RESPONSE_TOKENS))


@dataclass(frozen=True)
class DomainRunConfig:
    """A whole run: sources -> reward models -> policies for domains that nobody labelled.

    With `search`, the last three sources stand in for the held-out domains, and the held-out ones
    are not read: this is where settings are chosen.
    """

    seed: int = 0
    search: bool = False
    methods: tuple[str, ...] = METHODS
    beta: float = 1.0  # of the run's own meta-training and meta-test
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # for the effect of beta
    world: DomainWorldConfig = field(default_factory=DomainWorldConfig)
    sft: SFTSettings = field(default_factory=SFTSettings)
    meta: MetaSettings = field(default_factory=MetaSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    policy: FineTuningConfig = field(default_factory=gold_world_fine_tuning)
    ppo: PPOConfig = field(default_factory=gold_world_ppo)
    evaluation: EvaluationConfig = field(default_factory=gold_world_evaluation)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}{suggest(method, list(METHODS))}")
        if len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods is [{', '.join(self.methods)}]; name none twice")
        if not all(beta > 0 for beta in (self.beta, *self.betas)):
            raise UserError(f"beta and betas are {self.beta}, {list(self.betas)}; they must be > 0")
        if len(set(self.betas)) < len(self.betas):
            raise UserError(f"betas is {list(self.betas)}; name none twice")
        known = list(get_args(TokenReduction))
        if self.meta.reduction not in known:
            raise UserError(
                f"meta.reduction is {self.meta.reduction!r}{suggest(self.meta.reduction, known)}"
            )
        for section in ("sft", "meta", "pairs", "dpo"):
            _check_numbers(section, getattr(self, section))
        self._refuse_what_the_run_sets()

    def _refuse_what_the_run_sets(self) -> None:
        """A value that would be recorded but not used must not be given."""
        for section in ("world", "policy", "ppo", "evaluation"):
            if getattr(self, section).seed:
                raise UserError(f"{section}.seed follows the run's seed; set seed instead")
        if self.policy.beta != FineTuningConfig().beta:
            raise UserError("policy.beta is that of the reward model; set beta or pairs.guide_beta")
        for name in ("reward_mean", "reward_std"):
            if getattr(self.ppo, name) is not None:
                raise UserError(f"ppo.{name} is measured by the run itself; leave it out")

    @property
    def trained_betas(self) -> tuple[float, ...]:
        """All betas that a reward model is meta-trained for."""
        return tuple(sorted({self.beta, *self.betas}))


def _check_numbers(section: str, settings: Any) -> None:
    for option in fields(settings):
        value = getattr(settings, option.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            zero = option.name == "warmup_steps"
            if value < 0 or (value == 0 and not zero):
                raise UserError(f"{section}.{option.name} is {value}; it must be above 0")
