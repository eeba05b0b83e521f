"""The two ways to train a reward model: on pairs, and on pairs with a meta step on groups."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shiftrm.errors import UserError, suggest

Data = Literal["groups", "policy", "reward"]
"""What a trainer can take besides pairs: unlabelled groups of responses of today's policy; that
policy itself with the SFT policy; the last round's reward model."""

INPUTS: dict[Data, dict[str, str]] = {
    "groups": {"groups": "groups"},
    "policy": {"policy": "today's policy", "reference": "the SFT policy"},
    "reward": {"reward": "the last round's reward model"},
}
"""The inputs by the data that they are part of, and what each is."""

ORDINARY = ("RewardTrainer", "MetaRMTrainer")
"""The trainers that are told apart by the data they were given; records name others."""

MODELS = tuple(name for data, names in INPUTS.items() if data != "groups" for name in names)
"""The inputs that are checkpoints."""


COMBINE = ("mean", "min", "variance", "warm", "laplace")
"""The ways to make one reward of what was trained (`members.COMBINATIONS`)."""


@dataclass(frozen=True)
class Training:
    """A configuration class and its trainer class.

    Attributes:
        config: `RewardConfig` or a subclass.
        trainer: `RewardTrainer` or a subclass, called as `trainer(model, args, **data)`.
        takes: what `data` includes besides the pairs. "groups": `meta_dataset`, a list of rows.
            "policy": `policy` and `reference`, "reward": `reward`, each a folder or hub name.
        members, combine: as in `methods.method.Method`.
        spared: what of `takes`' kinds may be given although it is not used.
        by_settings: returns the training for given settings, if these say what it takes.

    Raises:
        UserError: members that are not combined, or an unknown way to combine.
    """

    config: type
    trainer: Any
    takes: frozenset[Data] = frozenset()
    members: int = 1
    combine: str | None = None
    spared: frozenset[Data] = frozenset()
    by_settings: "Callable[[Training, Mapping[str, Any]], Training] | None" = None

    def __post_init__(self) -> None:
        if self.combine is not None and self.combine not in COMBINE:
            raise UserError(f"combine is {self.combine!r}{suggest(self.combine, list(COMBINE))}")
        if (self.members > 1) != (self.combine not in (None, "laplace")) or self.members < 1:
            raise UserError(
                f"members is {self.members} and combine is {self.combine!r}; give 2 or more "
                "members with mean, min, variance or warm, and 1 without or with laplace"
            )

    @property
    def takes_groups(self) -> bool:
        return "groups" in self.takes

    def settled(self, settings: Mapping[str, Any]) -> "Training":
        """Return the training with what it takes under these settings."""
        return self if self.by_settings is None else self.by_settings(self, settings)

    def check(self, method: str, given: Mapping[str, Any]) -> None:
        """Check that there are exactly the inputs that the trainer takes.

        Args:
            method: its name, for errors.
            given: inputs by name (`INPUTS`); None where there is none.

        Raises:
            UserError: says which flag is missing, or given and not used.
        """
        for data, names in INPUTS.items():
            for name, what in names.items():
                is_given = given.get(name) is not None
                if data in self.takes and not is_given:
                    raise UserError(f"method {method}: needs {what}; give --{name}")
                if data not in self.takes | self.spared and is_given:
                    raise UserError(f"method {method}: uses no {name}; leave out --{name}")


def pairs_only() -> Training:
    from shiftrm.trainers.reward import RewardConfig, RewardTrainer

    return Training(RewardConfig, RewardTrainer)


def with_groups() -> Training:
    from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer

    return Training(MetaRMConfig, MetaRMTrainer, frozenset({"groups"}))
