"""The stages of a run over domains: reward models, and policies for the targets.

Whatever learns from preference pairs (meta-training, Bradley-Terry on pooled pairs or on a target's
own, DPO) takes the same number of updates on the same number of pairs each. Whatever makes a policy
from the reference (fine-tuning, weighted or not, and PPO) takes the same number of updates on the
same number of sequences each. DPO takes none of these: it cannot use a domain without pairs. The
recipe sets both budgets.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.domain_section import DomainSection
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.experiment import Arm, Experiment
from shiftrm.pipeline.jobs import (
    Input,
    Made,
    MetaTest,
    MetaTrain,
    Optimise,
    TrainReward,
    plain_input,
)
from shiftrm.pipeline.plan_data import PREPARE, record_as

if TYPE_CHECKING:
    from shiftrm.pipeline.plan import Planner

__all__ = ["beta_name", "domain_stages", "unequal_budgets"]

START, SFT, DPO = Made("start"), Made("sft"), Made("dpo")
DOMAINS, GOLD = Made("data", "world/domains"), Made("data", "world/weights.json")


def beta_name(beta: float) -> str:
    """Return the name in records of the reward model that was meta-trained for a beta."""
    return f"beta_{beta:g}"


def domain_stages(planner: "Planner") -> list[Stage]:
    """Return the stages of a run, each after those it needs."""
    return _DomainPlanner(planner).stages()


def unequal_budgets(recipe: Experiment) -> list[str]:
    """Return a note for each training on pairs that gets another budget than meta-training."""
    from shiftrm.oodpl.meta_config import OODPLConfig

    assert recipe.domains is not None

    def meta(name: str) -> int:
        return int(recipe.domains.meta.get(name, getattr(OODPLConfig, name)))  # type: ignore[union-attr]

    steps, pairs = meta("max_steps"), meta("domains_per_step") * meta("query_batch_size")
    found = []
    for name in ("reward", "dpo"):
        section = getattr(recipe, name)
        given = section.settings.get("max_steps"), section.batch_size
        if given != (steps, pairs):
            found.append(
                f"note: {name} trains for max_steps={given[0]} on batches of {given[1]} pairs, but "
                f"meta-training for {steps} on {pairs}: their methods are not compared fairly"
            )
    return found


def _file(domain: str, name: str) -> Made:
    return Made("data", f"world/domains/{domain}/{name}.jsonl")


@dataclass(frozen=True)
class _DomainPlanner:
    planner: "Planner"

    @property
    def section(self) -> DomainSection:
        found = self.planner.recipe.domains
        assert found is not None
        return found

    def stages(self) -> list[Stage]:
        arms, section = self.planner.recipe.methods, self.section
        kinds = {arm.reward for arm in arms.values()}
        found = [*self.planner.beginning(), self._start()]
        found += [self._meta(beta) for beta in section.trained_betas]
        if "pooled" in kinds:
            pairs = self.planner.inputs.pairs
            found.append(self._on_pairs("pooled", "pooled", pairs, section.targets))
        if "oracle" in kinds:
            found += [
                self._on_pairs(f"oracle/{name}", name, _file(name, "pairs"), (name,))
                for name in section.targets
            ]
        if any(arm.is_dpo for arm in arms.values()):
            found.append(self._dpo())
        for name, arm in arms.items():
            found += self._policies(name, arm, section.beta)
        by_weights = Arm(reward="oodpl", policy="weighted")
        for beta in section.betas:
            found += self._policies(f"oodpl_{beta_name(beta)}", by_weights, beta)
        return found

    def _start(self) -> Stage:
        """The reward model that all start from: the reference policy under a new head."""
        settings = {"policy": plain_input(SFT), "role": "reward"}
        record = record_as("start", "sft", 0)
        return Stage("start", f"{PREPARE}:new_reward_model", settings, ("sft",), record)

    def _meta(self, beta: float) -> Stage:
        """Meta-training on the sources. A_PL on the targets is logged, and decides nothing."""
        name, targets = beta_name(beta), list(self.section.targets)
        settings = self.planner.settings({**self.section.meta, "beta": beta}, "meta")
        job = MetaTrain(START, DOMAINS, SFT, targets, targets, settings=settings)
        return self.planner.training(f"meta/{name}", job, record_as("meta", name, 0), None)

    def _on_pairs(self, here: str, method: str, pairs: Made, evaluated: tuple[str, ...]) -> Stage:
        """Bradley-Terry: on the sources' pairs pooled, or on a target's own (the oracle)."""
        settings = self.planner.settings(self.planner.recipe.reward.settings, "pairs")
        heldout: dict[str, Input] = {name: _file(name, "eval_pairs") for name in evaluated}
        job = TrainReward(START, pairs, heldout, settings=settings)
        record = record_as(here.partition("/")[0], method, 0)
        return self.planner.training(here, job, record, "reward")

    def _dpo(self) -> Stage:
        """DPO on the sources' pairs, in the order of the pooled reward model."""
        settings = self.planner.settings(self.planner.recipe.dpo.settings, "pairs")
        job = Optimise("dpo", SFT, SFT, pairs=self.planner.inputs.pairs, settings=settings)
        return self.planner.training("dpo", job, record_as("dpo", "dpo", 0), "dpo")

    def _policies(self, method: str, arm: Arm, beta: float) -> list[Stage]:
        """A policy for every target by one method, and its measurements."""
        return [
            self.planner.stage(
                f"policies/{method}/{target}",
                self._test(arm, target, beta),
                record_as(f"evaluate/{target}", method, 0),
                {},
            )
            for target in self.section.targets
        ]

    def _test(self, arm: Arm, target: str, beta: float) -> MetaTest:
        recipe, way = self.planner.recipe, str(arm.policy)
        policy, sampling = recipe.policy, asdict(recipe.sampling)
        settings: dict[str, Any] = {
            "seed": recipe.seed,
            "evaluation": {
                "responses_per_prompt": recipe.evaluation.responses,
                "sampling": sampling,
            },
        }
        if way in ("plain", "weighted"):
            guide = beta if arm.reward == "oodpl" else self.section.guide_beta
            settings["weighted"] = {**to_mapping(self.section.weighted), "beta": guide}
        elif way in ("ppo", "rloo"):
            own = policy.settings if policy.method == way else {}
            settings[way] = {**own, "sampling": sampling}
        return MetaTest(
            DPO if arm.is_dpo else SFT,
            DOMAINS,
            target,
            "none" if arm.is_dpo else way,
            SFT if arm.is_dpo else None,
            self._reward(arm, target, beta),
            GOLD,
            settings,
        )

    def _reward(self, arm: Arm, target: str, beta: float) -> Made | None:
        made = {
            "oodpl": f"meta/{beta_name(beta)}",
            "pooled": "pooled",
            "oracle": f"oracle/{target}",
        }.get(arm.reward)
        return None if made is None else Made(made)
