"""Import paths of version 0.1, which import the moved modules with a warning."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGES = ("shiftrm.testbed", "shiftrm.trainers.policy")
_MOVED = {
    "shiftrm.curvature": "shiftrm.core.curvature",
    "shiftrm.hypergradient": "shiftrm.core.hypergradient",
    "shiftrm.losses": "shiftrm.core.losses",
    "shiftrm.meta": "shiftrm.core.meta",
    "shiftrm.prefix": "shiftrm.models.prefix",
    "shiftrm.rendering": "shiftrm.models.rendering",
    "shiftrm.responses": "shiftrm.models.responses",
    "shiftrm.rewards": "shiftrm.models.rewards",
    "shiftrm.sampling": "shiftrm.models.sampling",
    "shiftrm.scoring": "shiftrm.models.scoring",
    "shiftrm.templates": "shiftrm.models.templates",
    "shiftrm.testbed.gold": "shiftrm.world.gold",
    "shiftrm.testbed.language": "shiftrm.world.language",
    "shiftrm.testbed.world": "shiftrm.world.build",
    "shiftrm.trainers.metarm_config": "shiftrm.trainers.reward_configs",
    "shiftrm.trainers.oodpl": "shiftrm.oodpl.trainer",
    "shiftrm.trainers.policy.tokens": "shiftrm.policies.tokens",
    "shiftrm.trainers.ppo": "shiftrm.policies.ppo",
    "shiftrm.trainers.ppo_config": "shiftrm.policies.ppo_config",
    "shiftrm.trainers.ppo_math": "shiftrm.policies.ppo_math",
    "shiftrm.trainers.reward_config": "shiftrm.trainers.reward_configs",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in _MOVED and fullname not in _PACKAGES:
            return None
        return ModuleSpec(fullname, self, is_package=fullname in _PACKAGES)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name not in _MOVED:
            return None
        new = _MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """The module ran where it is now."""


def install() -> None:
    """Let `import` find the old paths."""
    sys.meta_path.append(_Finder())
