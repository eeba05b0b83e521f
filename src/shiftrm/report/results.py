"""What a page is made from: the records of one experiment, its configuration and its arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shiftrm.records import Record
from shiftrm.report.arms import SFT, ShownArm, arms_of
from shiftrm.report.measurements import Measurements, SeedEstimate


class Results(Measurements):
    """The records of a run (or of several seeds) with its configuration.

    Attributes:
        config: the resolved configuration; empty if there is none.
        arms: the arms that have records, in the order in which they are shown; SFT comes first.
    """

    def __init__(self, records: Iterable[Record], config: Mapping[str, Any] | None = None) -> None:
        super().__init__(records)
        self.config: Mapping[str, Any] = config or {}
        self.arms: dict[str, ShownArm] = arms_of(self, self.config)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the configuration; empty if it is missing."""
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}

    def name(self, arm: str) -> str:
        return self.arms[arm].name

    def short(self, arm: str) -> str:
        return self.arms[arm].short

    @property
    def trained(self) -> list[str]:
        """All arms except SFT."""
        return [name for name in self.arms if name != SFT]

    @property
    def with_rewards(self) -> list[str]:
        """The arms whose policy is trained on a reward model."""
        arms = self.arms
        return [a for a in self.trained if not arms[a].is_dpo and not arms[a].is_gold]

    @property
    def ceiling(self) -> str | None:
        """The first arm whose policy is trained on the gold reward itself."""
        return next((a for a in self.trained if self.arms[a].is_gold), None)

    @property
    def adapted(self) -> list[str]:
        """The arms with meta steps."""
        return [name for name in self.arms if self.arms[name].adapts]

    @property
    def vanilla(self) -> str | None:
        """The first arm whose reward model is kept."""
        return next((a for a in self.with_rewards if self.arms[a].keeps), None)

    @property
    def retrained(self) -> str | None:
        """The first arm that trains on the original pairs alone."""
        return next((a for a in self.with_rewards if self.arms[a].retrains), None)

    @property
    def all_rounds(self) -> list[int]:
        """The rounds after which responses were measured."""
        return sorted({r for arm in self.trained for r in self.rounds(arm)})

    def last(self, arm: str, metric: str) -> tuple[int, SeedEstimate] | None:
        """Return the last round in which a metric was evaluated, and its estimate."""
        course = self.course(arm, metric)
        return course[-1] if course else None

    def has(self, metric: str) -> bool:
        """Whether an evaluation of any arm has this metric."""
        return any(self.rounds(arm, "evaluate", metric) for arm in self.arms)

    @property
    def judged(self) -> bool:
        return self.has("win_vs_sft")

    @property
    def judge(self) -> str | None:
        """The kind of judge that the configuration names."""
        kind = self.section("judge").get("kind")
        return None if kind is None else str(kind).partition(":")[0]  # gold:NAME is gold, too

    @property
    def gold_is_true(self) -> bool:
        """Whether gold is the known reward of the gold world, not a second reward model's."""
        judge = str(self.section("evaluation").get("gold"))
        return bool(self.section("world")) or judge.partition(":")[0] == "gold"

    @property
    def chosen_by_gold(self) -> bool:
        """Whether best rounds were chosen by gold, as earlier versions of the demo did."""
        return isinstance(self.config.get("methods"), list)

    @property
    def steered(self) -> bool:
        """Whether the arms' KL was steered to one target."""
        if "matched_kl" in self.config:
            return bool(self.config["matched_kl"])
        optimiser, settings = self.section("policy"), self.section("policy").get("settings") or {}
        return optimiser.get("method") != "ppo" or settings.get("kl_target") is not None

    @property
    def keys(self) -> list[tuple[str, int]]:
        """All evaluated (arm, round)."""
        return [(arm, round_) for arm in self.arms for round_ in self.rounds(arm)]
