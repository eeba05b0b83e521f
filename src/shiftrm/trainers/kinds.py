"""The two ways to train a reward model: on pairs, and on pairs with a meta step on groups."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Training:
    """A configuration class and its trainer class.

    Attributes:
        config: `RewardConfig` or a subclass.
        trainer: `RewardTrainer` or a subclass, called as `trainer(model, args, **data)`.
        takes_groups: whether `data` includes `meta_dataset`.
    """

    config: type
    trainer: Any
    takes_groups: bool = False


def pairs_only() -> Training:
    from shiftrm.trainers.reward import RewardConfig, RewardTrainer

    return Training(RewardConfig, RewardTrainer)


def with_groups() -> Training:
    from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer

    return Training(MetaRMConfig, MetaRMTrainer, takes_groups=True)
