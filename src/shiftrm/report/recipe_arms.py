"""The arms of a recipe: kinds (from the recipe or the records), names and styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shiftrm.records import Record
from shiftrm.report.arms import DPO, FIXED, SFT, ArmStyle, arm_styles, in_order
from shiftrm.report.measurements import Measurements

__all__ = ["Arms", "Kind", "arms_of"]

Kind = Literal["fixed", "retrained", "metarm", "dpo", "sft"]

_WORDS: dict[Kind, str] = {
    "fixed": "reward model kept fixed",
    "retrained": "retrained on the same pairs, no meta step",
    "metarm": "MetaRM",
    "dpo": "DPO",
    "sft": "where all arms start",
}
_NAMES: dict[Kind, str] = {"metarm": "MetaRM", "dpo": "DPO", "sft": "SFT", "retrained": "Retrained"}


@dataclass(frozen=True)
class Arms:
    """The arms of a page.

    Attributes:
        kinds: kind by arm, SFT included, in the order in which they are shown.
        optimisers: optimiser of each arm's policy, if the recipe names it.
        styles: colours and markers by arm.
    """

    kinds: dict[str, Kind]
    optimisers: dict[str, str] = field(default_factory=dict)
    styles: dict[str, ArmStyle] = field(default_factory=dict)

    @property
    def trained(self) -> list[str]:
        """All arms except SFT."""
        return [name for name, kind in self.kinds.items() if kind != "sft"]

    @property
    def adapted(self) -> list[str]:
        """Arms with a meta step."""
        return [name for name, kind in self.kinds.items() if kind == "metarm"]

    def is_adapted(self, method: str) -> bool:
        """Whether the arm's reward model takes meta steps."""
        return self.kinds.get(method) == "metarm"

    @property
    def with_reward_model(self) -> list[str]:
        """Arms whose policy is trained on a reward model."""
        return [name for name in self.trained if self.kinds[name] != "dpo"]

    @property
    def vanilla(self) -> str | None:
        """The first arm with a fixed reward model."""
        fixed = [name for name, kind in self.kinds.items() if kind == "fixed"]
        return FIXED if FIXED in fixed else (fixed[0] if fixed else None)

    def name(self, method: str) -> str:
        """Return the recipe's name of the arm, with its kind if the name does not tell."""
        kind = self.kinds.get(method)
        if kind is None:
            return method
        if method == kind and kind in _NAMES:
            return _NAMES[kind]
        if kind == "fixed":
            optimiser = self.optimisers.get(method)
            return f"{method} (vanilla {optimiser.upper()})" if optimiser else f"{method} (vanilla)"
        if method.lower().startswith(kind):
            return method
        return f"{method} ({_NAMES[kind]})"

    def short(self, method: str) -> str:
        """Return the name for legends and terminals."""
        kind = self.kinds.get(method)
        return _NAMES[kind] if kind in _NAMES and method == kind else method

    def words(self, method: str) -> str:
        """Describe what happens to the arm's reward model."""
        return _WORDS[self.kinds[method]]


def arms_of(
    m: Measurements, records: Sequence[Record], config: Mapping[str, Any] | None = None
) -> Arms:
    """Return the arms of a run.

    The kind of an arm that the recipe does not name comes from its records: MetaRM has meta-step
    metrics, another arm with its own reward model is retrained, and DPO logs accuracies in policy
    training.
    """
    said = _section((config or {}).get("methods"))
    default = _section((config or {}).get("policy")).get("method")
    seen = {
        (record.stage, str(record.method), record.metric)
        for record in records
        if record.stage in ("reward_model", "ppo")
    }
    found = m.methods()
    order = [SFT, *(name for name in said if name in found), *in_order(found)]
    kinds: dict[str, Kind] = {}
    optimisers: dict[str, str] = {}
    for name in order:
        if name in kinds or name not in found:
            continue
        arm = _section(said.get(name))
        kinds[name] = _kind(name, arm, seen)
        optimiser = arm.get("policy") or default
        if arm and isinstance(optimiser, str):
            optimisers[name] = optimiser
    arms = Arms(kinds, optimisers)
    return replace(arms, styles=_styles(arms))


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _kind(name: str, arm: Mapping[str, Any], seen: set[tuple[str, str, str]]) -> Kind:
    if name == SFT:
        return "sft"
    if arm.get("policy") == DPO:
        return "dpo"
    if arm.get("reward") in ("fixed", "retrained", "metarm"):
        return arm["reward"]
    metrics = {
        metric for stage, method, metric in seen if (stage, method) == ("reward_model", name)
    }
    if any(metric.startswith("meta_") for metric in metrics) or name.startswith("metarm"):
        return "metarm"
    if metrics or name == "retrained":
        return "retrained"
    return "dpo" if name == DPO or ("ppo", name, "accuracy") in seen else "fixed"


def _styles(arms: Arms) -> dict[str, ArmStyle]:
    """Return the demo's styles for known names, including "metarm", and spare ones for others."""
    stand_in = {name: "metarm_scale_free" if name == "metarm" else name for name in arms.kinds}
    if len(set(stand_in.values())) < len(stand_in):
        stand_in = {name: name for name in arms.kinds}
    found = arm_styles(stand_in.values())
    return {
        name: replace(found[other], name=arms.name(name), short=arms.short(name))
        for name, other in stand_in.items()
    }
