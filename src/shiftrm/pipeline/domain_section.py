"""The section `domains` of an experiment: the gold world's domains, and OODPL in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.oodpl.fine_tuning import FineTuningConfig
from shiftrm.world.build_domains import DomainWorldConfig
from shiftrm.world.domain_gold import HELD_OUT, SOURCES

__all__ = ["DOMAIN_ARMS", "DomainSection", "domain_arms"]

REWARD_MODELS = ("oodpl", "pooled", "oracle")
"""The reward models: OODPL's, Bradley-Terry on the pooled pairs of the sources, and Bradley-Terry
on the target's own pairs, which no other method may see."""

GUIDES = ("weighted", "ppo", "rloo")
"""The ways in which a reward model makes a policy for a target."""

DOMAIN_ARMS: dict[str, dict[str, str]] = {
    "reference": {"reward": "none", "policy": "none"},
    "finetuned": {"reward": "none", "policy": "plain"},
    **{
        f"{model}_{way}": {"reward": model, "policy": way}
        for way in GUIDES
        for model in REWARD_MODELS
    },
    "dpo": {"reward": "none", "policy": "dpo"},
}
"""The methods that a recipe can name: the reward model, and the way from it to a policy."""

SEARCH_TARGETS = 3


@dataclass(frozen=True)
class DomainSection:
    """The gold world's domains, in place of data sets: labelled sources and unlabelled targets.

    A reward model is trained on the sources, and every method makes a policy for each target.

    Attributes:
        world: the sizes of the world's files. The run's seed is also the world's.
        search: the last three sources stand in for the targets, and the held-out domains are not
            read: this is where settings are chosen.
        beta: temperature of OODPL's weights exp(r/beta), in meta-training and in the targets.
        betas: meta-train and test one reward model for each, by weights, for the effect of beta.
        guide_beta: temperature of the weights made of a Bradley-Terry model's rewards.
        meta: settings of `shiftrm meta-train`.
        weighted: reward-weighted and plain fine-tuning in a target.
    """

    world: DomainWorldConfig = field(default_factory=DomainWorldConfig)
    search: bool = False
    beta: float = 1.0
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    guide_beta: float = 0.5
    meta: dict[str, Any] = field(default_factory=dict)
    weighted: FineTuningConfig = field(default_factory=FineTuningConfig)

    def __post_init__(self) -> None:
        if not all(beta > 0 for beta in (self.beta, self.guide_beta, *self.betas)):
            raise UserError(
                f"domains: beta, guide_beta and betas are {self.beta}, {self.guide_beta} and "
                f"{list(self.betas)}; they must be > 0"
            )
        if len(set(self.betas)) < len(self.betas):
            raise UserError(f"domains.betas is {list(self.betas)}; name none twice")
        for name in ("world", "weighted"):
            if getattr(self, name).seed:
                raise UserError(f"domains.{name}.seed follows the run's seed; set seed instead")
        if self.weighted.beta != FineTuningConfig().beta:
            raise UserError("domains.weighted.beta: set domains.beta or domains.guide_beta")
        if "beta" in self.meta:
            raise UserError("domains.meta.beta: set domains.beta or domains.betas")

    @property
    def targets(self) -> tuple[str, ...]:
        """The domains that policies are made for."""
        return SOURCES[-SEARCH_TARGETS:] if self.search else HELD_OUT

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains whose pairs are learnt from."""
        return SOURCES[:-SEARCH_TARGETS] if self.search else SOURCES

    @property
    def trained_betas(self) -> tuple[float, ...]:
        """All betas that a reward model is meta-trained for."""
        return tuple(sorted({self.beta, *self.betas}))

    def check_arm(self, name: str, arm: Any) -> None:
        """Refuse an arm whose reward model and way are not a combination in `DOMAIN_ARMS`.

        Raises:
            UserError: names the arm.
        """
        if {"reward": arm.reward, "policy": arm.policy} not in DOMAIN_ARMS.values():
            known = [f"{a['reward']} and {a['policy']}" for a in DOMAIN_ARMS.values()]
            raise UserError(
                f"methods.{name}: reward and policy are {arm.reward} and {arm.policy}; in a run "
                f"over domains give one of: {', '.join(known)}"
            )
        for option in ("rounds", "settings", "policy_settings"):
            if getattr(arm, option):
                raise UserError(
                    f"methods.{name}.{option}: not used in a run over domains; leave it out"
                )


def domain_arms(names: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return arms, as plain data, for `methods` given as a list of names.

    Raises:
        UserError: an unknown name, or one that is given twice.
    """
    arms = {**DOMAIN_ARMS, **known}
    for name in names:
        if name not in arms:
            raise UserError(f"unknown method {name!r}{suggest(name, list(arms))}")
    if len(set(names)) < len(names):
        raise UserError(f"methods is [{', '.join(names)}]; name none twice")
    return {name: arms[name] for name in names}
