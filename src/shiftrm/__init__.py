"""Measures whether a reward model still works after RLHF has moved the policy, and adapts it.

The names below load on first use, so that `import shiftrm` and the command line stay fast.
"""

import importlib
from typing import Any

from shiftrm import _old_names

__version__ = "0.1.0"

_HOME = {
    "ContrastConfig": "shiftrm.trainers.contrast",
    "ContrastTrainer": "shiftrm.trainers.contrast",
    "MetaRMConfig": "shiftrm.trainers.metarm",
    "MetaRMTrainer": "shiftrm.trainers.metarm",
    "OODPLConfig": "shiftrm.oodpl.meta_config",
    "OODPLTrainer": "shiftrm.oodpl.trainer",
    "PPOConfig": "shiftrm.policies.ppo",
    "PPOTrainer": "shiftrm.policies.ppo",
    "RewardConfig": "shiftrm.trainers.reward",
    "RewardTrainer": "shiftrm.trainers.reward",
    "Scorer": "shiftrm.models.scoring",
    "SamplingConfig": "shiftrm.models.sampling",
    "UserError": "shiftrm.errors",
    "bradley_terry_loss": "shiftrm.core.losses",
    "difference_loss": "shiftrm.core.losses",
    "preference_policy_loss": "shiftrm.core.losses",
    "reward_weighted_loss": "shiftrm.core.losses",
}

__all__ = sorted(_HOME)


_old_names.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shiftrm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
