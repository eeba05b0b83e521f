"""The settings of a gold-world run: one field per option, every default said here."""

from dataclasses import dataclass, field, fields
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.methods.method import METHODS
from shiftrm.models.sampling import SamplingConfig
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.world.build import WorldConfig
from shiftrm.world.language import MAX_RESPONSE_TOKENS


@dataclass(frozen=True)
class Arm:
    """One way to get the round's reward model; the rest of a round is the same for all arms.

    Attributes:
        trains: whether a reward model is trained each round (otherwise the first one is kept).
        preset: MetaRM preset, for the arms that use unlabelled groups.
        fresh_labels: whether new gold labels are bought each round (the ceiling).
    """

    trains: bool
    preset: str | None = None
    fresh_labels: bool = False


def _arm(name: str) -> Arm:
    method = METHODS.get(name)
    return Arm(method.trains, method.settings.get("preset"), "labels" in method.needs)


ARMS: dict[str, Arm] = {
    name: _arm(name)
    for name in (
        "fixed", "retrained", "metarm_paper", "metarm_scale_free", "metarm_adaptive",
        "fresh_labels",
    )
}  # fmt: skip


@dataclass(frozen=True)
class SFTSettings:
    """Supervised fine-tuning (TRL's SFTTrainer) of the random base model."""

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 20


@dataclass(frozen=True)
class DataSettings:
    """Preference pairs drawn from the SFT policy and labelled with noise by the gold reward."""

    pairs: int = 3000
    heldout_pairs: int = 500
    groups: int = 512
    responses_per_group: int = 5
    fresh_labels: int = 300


@dataclass(frozen=True)
class RewardSettings:
    """Reward-model training; the same budget of optimizer steps for every arm and round."""

    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    meta_batch_size: int = 16
    scale_free_step: float = 0.5
    evaluations: int = 8


@dataclass(frozen=True)
class DPOSettings:
    """The DPO baseline (TRL's DPOTrainer) on the same pairs."""

    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 2e-4
    beta: float = 0.1


@dataclass(frozen=True)
class EvaluationSettings:
    """What every round is measured on."""

    prompts: int = 400
    tie_margin: float = 0.25
    kept_values: int = 300
    kept_samples: int = 4


def demo_ppo() -> PPOConfig:
    """PPO settings of the gold world, where models are tiny and learn fast.

    Sampling is the policy's own distribution, so that the KL is that of what is optimised.
    """
    return PPOConfig(
        steps=40,
        prompts_per_step=16,
        rollouts_per_prompt=16,
        minibatch_size=64,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        kl_coefficient=0.05,
        kl_target=6.0,
        value_clip=None,
        reward_clip=None,
        truncation_penalty=1.0,  # one standard deviation, as TRL's missing_eos_penalty
        sampling=SamplingConfig(max_new_tokens=MAX_RESPONSE_TOKENS),
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole run: rounds of adapting the reward model and optimising the policy, per arm.

    With `matched_kl` every arm steers to `ppo.kl_target`. Without, every arm uses the fixed
    `ppo.kl_coefficient`, where a reward model with larger differences moves the policy further.
    """

    seed: int = 0
    rounds: int = 3
    methods: tuple[str, ...] = (
        "fixed",
        "retrained",
        "metarm_paper",
        "metarm_scale_free",
        "fresh_labels",
    )
    dpo_baseline: bool = True
    matched_kl: bool = True
    world: WorldConfig = field(default_factory=WorldConfig)
    sft: SFTSettings = field(default_factory=SFTSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    ppo: PPOConfig = field(default_factory=demo_ppo)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in ARMS:
                raise UserError(f"unknown method {method!r}{suggest(method, list(ARMS))}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError(
                f"methods is [{', '.join(self.methods)}]; name at least one arm, and none twice"
            )
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}; it must be at least 1")
        for section in ("sft", "data", "reward", "dpo", "evaluation"):
            _check_numbers(section, getattr(self, section))
        if self.data.responses_per_group < 2:
            raise UserError("data.responses_per_group is 1; it must be at least 2")
        if not 2 <= self.evaluation.prompts <= self.world.eval_prompts:
            raise UserError(
                f"evaluation.prompts is {self.evaluation.prompts}; it must be at least 2 and at "
                f"most the world's {self.world.eval_prompts}: raise world.eval_prompts"
            )
        if self.matched_kl and self.ppo.kl_target is None:
            raise UserError("matched_kl needs ppo.kl_target; set it, or matched_kl=false")
        self._refuse_what_the_run_sets()

    def _refuse_what_the_run_sets(self) -> None:
        """A value that would be recorded but not used must not be given."""
        default = PPOConfig()
        for name in ("seed", "reward_mean", "reward_std"):
            if getattr(self.ppo, name) != getattr(default, name):
                raise UserError(f"ppo.{name} is set by the run itself; leave it out")
        if self.world.seed != WorldConfig().seed:
            raise UserError("world.seed follows the run's seed; set seed instead")


_MAY_BE_ZERO = ("warmup_steps", "tie_margin", "scale_free_step", "kept_values", "kept_samples")


def _check_numbers(section: str, settings: Any) -> None:
    for option in fields(settings):
        value = getattr(settings, option.name)
        if value < 0 or (value == 0 and option.name not in _MAY_BE_ZERO):
            least = "at least 0" if option.name in _MAY_BE_ZERO else "above 0"
            raise UserError(f"{section}.{option.name} is {value}; it must be {least}")
