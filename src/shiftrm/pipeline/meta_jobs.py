"""The jobs of OODPL: meta-train a reward model, and test it in a domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from shiftrm.pipeline.job import Input, Training, as_word, options

__all__ = ["WAYS", "MetaTest", "MetaTrain"]

WAYS = ("weighted", "ppo", "rloo", "plain", "none")
"""How a policy is made for a domain: weighted by the reward model, by PPO or RLOO against it, by
plain fine-tuning, or not at all: the policy is measured as it is."""


@dataclass(frozen=True)
class MetaTrain(Training):
    """Meta-train a reward model over domains; see `oodpl.training_command`.

    Attributes:
        policy: the reference policy; None for `model`.
        held_out, validation: names of domains; None for those of `splits.json`.
    """

    model: Input
    domains: Input
    policy: Input | None = None
    held_out: Sequence[str] | None = None
    validation: Sequence[str] | None = None

    def _words(self) -> list[str]:
        named = {name: getattr(self, name) for name in ("held_out", "validation")}
        joined = {name: ",".join(value) for name, value in named.items() if value is not None}
        inputs = options(model=self.model, policy=self.policy, domains=self.domains)
        return ["meta-train", *inputs, *options(**joined)]

    def run(self, output: Path) -> str | None:
        from shiftrm.oodpl.training_command import meta_train

        return meta_train(
            str(self.model),
            policy=str(self.policy or self.model),
            domains=str(self.domains),
            output=output,
            held_out=self.held_out,
            validation=self.validation,
            settings=self.settings,
            command=self._told(output),
        )


@dataclass(frozen=True)
class MetaTest:
    """Make a policy for a domain and measure it; see `pipeline.meta_test_run`.

    Attributes:
        policy: the policy to start from.
        domains: the folder of domains.
        domain: the name of one.
        way: one of `WAYS`.
        reference: the policy to stay close to and to compare with; None for `policy`.
        reward: the reward model; ways "plain" and "none" need none.
        judge: an evaluation reward model, or the gold world's table of weights (`weights.json`).
        settings: by field of `MetaTestConfig`; its seed is that of the run.
    """

    makes: ClassVar[str] = "test"
    several: ClassVar[bool] = False

    policy: Input
    domains: Input
    domain: str
    way: str = "weighted"
    reference: Input | None = None
    reward: Input | None = None
    judge: Input | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def command(self, output: str) -> list[str]:
        named = ("policy", "reference", "reward", "domains")
        words = ["meta-test", *options(**{name: getattr(self, name) for name in named})]
        words += options(only=self.domain, way=self.way, judge=self.judge, output=output)
        return words + [as_word(key, value) for key, value in _flat(self.settings)]

    def on_machine(self, way: Mapping[str, Any]) -> "MetaTest":
        return self

    def run(self, output: Path) -> str:
        from shiftrm.files import new_folder
        from shiftrm.pipeline.meta_test_run import measure_domain

        with new_folder(output) as folder:
            measure_domain(self, folder)
        return f"{self.domain}, {self.way}: {output}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        found += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found
