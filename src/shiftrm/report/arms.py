"""The arms of a page: what the configuration says of them, their names, colours and markers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shiftrm.errors import UserError
from shiftrm.methods.method import METHODS, Method
from shiftrm.pipeline.sections import WorldSection
from shiftrm.report.measurements import Measurements

SFT = "sft"
"""The name in records of the policy that all arms start from."""

# Okabe and Ito's palette suits the common colour-vision deficiencies; the markers differ too.
_START = Method("SFT", "SFT", "#56B4E9", "*")
_DPO = Method("DPO", "DPO", "#CC79A7", "X")
_SPARE = (
    ("#882255", "v"), ("#117733", "<"), ("#999933", ">"), ("#332288", "p"), ("#AA4499", "h"),
    ("#44AA99", "d"), ("#661100", "8"), ("#6699CC", "H"),
)  # fmt: skip


@dataclass(frozen=True)
class ShownArm:
    """An arm as the page shows it.

    Attributes:
        name: the name in tables and sentences.
        short: the name in legends and terminals.
        colour, marker: in plots: hex code, and Matplotlib's letter.
        words: what happens to the reward model.
        optimiser: of the policy, if the configuration says it.
        is_dpo: whether the policy is trained without a reward model.
        is_gold: whether it is trained on the gold reward itself.
        keeps: whether the first reward model is kept.
        trains: whether the arm trains reward models of its own.
        adapts: whether they take meta steps on the policy's responses.
        buys_labels: whether they are trained on new labels.
        retrains: whether they are trained on the original pairs alone, and nothing else changes.
    """

    name: str
    short: str
    colour: str
    marker: str
    words: str = "trained in every round"
    optimiser: str | None = None
    is_dpo: bool = False
    is_gold: bool = False
    keeps: bool = False
    trains: bool = False
    adapts: bool = False
    buys_labels: bool = False
    retrains: bool = False


def arms_of(m: Measurements, config: Mapping[str, Any]) -> dict[str, ShownArm]:
    """Return the arms that have records: SFT, then those of the configuration in its order.

    An arm that the configuration does not name is described by what it recorded: meta-step metrics
    of a reward model, another reward model of its own, or the accuracies that only DPO logs.
    """
    settings = arm_settings(config)
    found = m.methods()
    names = [name for name in dict.fromkeys([SFT, *settings, *found]) if name in found]
    return _distinct({name: _arm(m, name, settings.get(name), config) for name in names})


def arm_settings(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each arm. Earlier demos list the names of methods."""
    methods = config.get("methods")
    if isinstance(methods, Mapping):
        return {str(name): arm if isinstance(arm, Mapping) else {} for name, arm in methods.items()}
    found: dict[str, Mapping[str, Any]] = {}
    if isinstance(methods, list):
        found = {str(name): {"reward": name} for name in methods}
        found["dpo"] = {"policy": "dpo"}
    return found


def _arm(
    m: Measurements, name: str, settings: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> ShownArm:
    if name == SFT:
        return _styled(_START, name, words="where all arms start")
    if settings is None:
        return _recorded(m, name)
    if settings.get("policy") == "dpo":
        return _styled(_DPO, name, words="none", optimiser="dpo", is_dpo=True)
    method = _method(settings.get("reward"))
    if method is None:
        return _recorded(m, name)
    method = _with_count(method, settings, config)
    optimiser = settings.get("policy") or _policy(config)
    keeps = not method.trains and not method.needs
    is_gold = "gold" in method.needs
    logged = m.metrics("reward_model", name)
    arm = _styled(
        method,
        name if name != settings.get("reward") else "",
        words="kept fixed" if keeps else "none: the gold reward" if is_gold else method.label,
        optimiser=optimiser,
        is_gold=is_gold,
        keeps=keeps,
        trains=method.trains,
        adapts="groups" in method.needs and (not logged or _meta_steps(logged)),
        buys_labels="labels" in method.needs,
        retrains=settings.get("reward") == "retrained",
    )
    if not keeps:
        return arm
    label = method.label if name == settings.get("reward") else name
    return replace(arm, name=f"{label} (vanilla{f' {optimiser.upper()}' if optimiser else ''})")


def _with_count(method: Method, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Method:
    """Return the method with the number of labels that the arm buys in its names."""
    world = config.get("world")
    default = world.get("labels") if isinstance(world, Mapping) else None
    count = str(settings.get("labels") or default or WorldSection.labels)
    names = {name: getattr(method, name).replace("{labels}", count) for name in ("label", "short")}
    return replace(method, **names)


def _meta_steps(logged: Iterable[str]) -> bool:
    return any(metric.startswith("meta_") for metric in logged)


def _policy(config: Mapping[str, Any]) -> str | None:
    """Return the configuration's policy optimiser; earlier demos have a section of PPO only."""
    policy = config.get("policy")
    if isinstance(policy, Mapping):
        return policy.get("method")
    return "ppo" if "ppo" in config else None


def _method(reward: Any) -> Method | None:
    """Return the method of this name; None if it is unknown or cannot be imported here."""
    try:
        return METHODS.get(reward) if isinstance(reward, str) else None
    except UserError:
        return None


def _styled(method: Method, name: str, **facts: Any) -> ShownArm:
    """Return an arm in the method's style. An arm with a name of its own keeps it."""
    own = name not in ("", "sft", "dpo")
    return ShownArm(
        name=f"{name} ({method.short})" if own else method.label,
        short=name if own else method.short,
        colour=method.colour,
        marker=method.marker,
        **facts,
    )


def _recorded(m: Measurements, name: str) -> ShownArm:
    logged = set(m.metrics("reward_model", name))
    if _meta_steps(logged):
        return ShownArm(f"{name} (MetaRM)", name, "", "", trains=True, adapts=True)
    if logged:
        return ShownArm(f"{name} (retrained)", name, "", "", trains=True, retrains=True)
    if m.rounds(name, "ppo", "rewards/accuracies"):
        return _styled(_DPO, name, words="none", optimiser="dpo", is_dpo=True)
    return ShownArm(f"{name} (vanilla)", name, "", "", words="kept fixed", keeps=True)


def _distinct(arms: dict[str, ShownArm]) -> dict[str, ShownArm]:
    """Give spare colours and markers to arms that have none, or those of an arm before them."""
    declared = {arm.colour for arm in arms.values()}
    spare = [look for look in _SPARE if look[0] not in declared]
    seen: set[str] = {""}
    number = 0
    for name, arm in arms.items():
        if arm.colour in seen:
            colour, marker = spare[number % len(spare)]
            arms[name] = replace(arm, colour=colour, marker=marker)
            number += 1
        seen.add(arm.colour)
    return arms
