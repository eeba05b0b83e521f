"""Methods for adapting a reward model, by name.

To add a method, write a file in `methods/registered`, or give `package.module:attribute` as its
name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shiftrm.registry import Registry
from shiftrm.trainers.kinds import Training

Need = Literal["pairs", "groups", "earlier_groups", "policy", "reward", "labels", "gold"]
"""Preference pairs; unlabelled groups of the policy's responses; with them, in a recipe, those of
earlier rounds, in the same file; today's policy itself, with the SFT policy; the last round's
reward model; new labels of the policy's responses; the gold world's reward itself. The last two
exist in the gold world only."""

Start = Literal["sft", "policy", "reward"]
"""A checkpoint that training starts from: the SFT policy or today's policy, each with a new score
head, or the last round's reward model."""


@dataclass(frozen=True)
class Method:
    """A method of getting a round's reward model.

    Attributes:
        label: name on the page. "{labels}" in it stands for the labels that a round buys.
        short: name in legends and terminal tables, likewise.
        colour, marker: in plots: hex code, and Matplotlib's letter.
        needs: what it is trained on. "groups", "policy" and "reward" are handed to the trainer, so
            its `Training.takes` names them, too.
        training: returns the configuration class and the trainer class; a function, because both
            are slow to import. None: the reward model is kept as it is.
        settings: defaults of that configuration which differ from the class's.
        policy_settings: settings of PPO for this method, such as
            `{"reward_shaping": "log_sigmoid"}`; other optimisers do not get them.
        reference_reset: whether the KL of a round is to the policy that the round starts from,
            instead of the SFT policy.
        start: the checkpoint that a round's training starts from. `shiftrm train` starts from its
            `--model`. `shiftrm adapt` does, too, but for "policy".
        members: number of reward models that are trained one after another with seeds of their own
            (`trainers.members`); training costs as many times as much.
        combine: how what was trained becomes one reward, a key of `trainers.members.COMBINATIONS`;
            None: the model is the reward.
        label_choice: for methods that need labels, which of the policy's responses are labelled:
            drawn at random, or the pairs of a larger pool that say most about the reward model
            (`pipeline.active_labels`).
    """

    label: str
    short: str
    colour: str
    marker: str
    needs: frozenset[Need] = frozenset()
    training: Callable[[], Training] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy_settings: Mapping[str, Any] = field(default_factory=dict)
    reference_reset: bool = False
    start: Start = "sft"
    members: int = 1
    combine: str | None = None
    label_choice: Literal["random", "active"] = "random"

    @property
    def trains(self) -> bool:
        return self.training is not None

    @property
    def adapts(self) -> bool:
        """Whether it trains a reward model without new labels, as `shiftrm adapt` does."""
        return self.trains and not self.needs & {"labels", "gold"}

    def classes(self) -> Training:
        """Return what `training` returns, with the members; importing it takes seconds."""
        assert self.training is not None
        return replace(self.training(), members=self.members, combine=self.combine)


METHODS = Registry[Method]("method", Method, home="shiftrm.methods.registered")
