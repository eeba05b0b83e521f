"""Reward models that keep telling responses apart after the policy has moved.

The names below load on first use, so that `import shiftrm` and the command line stay fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MetaRMConfig": "shiftrm.trainers.metarm",
    "MetaRMTrainer": "shiftrm.trainers.metarm",
    "OODPLConfig": "shiftrm.trainers.oodpl_config",
    "OODPLTrainer": "shiftrm.trainers.oodpl",
    "PPOConfig": "shiftrm.trainers.ppo",
    "PPOTrainer": "shiftrm.trainers.ppo",
    "RewardConfig": "shiftrm.trainers.reward",
    "RewardTrainer": "shiftrm.trainers.reward",
    "Scorer": "shiftrm.scoring",
    "SamplingConfig": "shiftrm.sampling",
    "UserError": "shiftrm.errors",
    "bradley_terry_loss": "shiftrm.losses",
    "difference_loss": "shiftrm.losses",
    "preference_policy_loss": "shiftrm.losses",
    "reward_weighted_loss": "shiftrm.losses",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shiftrm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
