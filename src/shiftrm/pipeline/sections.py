"""The sections of an experiment: one field per option, with its default and its meaning.

Settings of the training commands (learning rates, schedules, LoRA, ...) are in the `settings` of a
section under the commands' own names. The commands' configuration classes check them, so that each
is declared in one place only.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shiftrm.errors import UserError, suggest
from shiftrm.policies.external import parse_command
from shiftrm.world.build import WorldConfig
from shiftrm.world.world import gold_world

__all__ = [
    "DPOSection", "DataSettings", "EvaluationSettings", "GroupSection", "JudgeSettings",
    "PolicySection", "RewardSection", "SFTSection", "Source", "WorldSection",
]  # fmt: skip

JUDGES = ("none", "endpoint", "reward-model", "gold")


@dataclass(frozen=True)
class Source:
    """One data set (`shiftrm convert --help` lists the formats and their options).

    Attributes:
        format: how its rows are read, such as "hh_rlhf"; "preference" is TRL's own.
        source: hub name, file or folder; by default the publisher's place.
        split: by default the format's own.
        options: options of the format.
    """

    format: str
    source: str | None = None
    split: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """The data sets, and how many rows of each are used.

    Attributes:
        demonstrations: for supervised fine-tuning; not needed if the model is already fine-tuned.
        pairs: preference pairs, from the distribution that was labelled.
        heldout: pairs to measure accuracy on; by default `heldout_share` of the prompts of `pairs`.
        prompts: unlabelled prompts that the policy answers, for groups and policy optimisation.
        eval_prompts: prompts to measure on; by default `heldout_share` of `prompts`.
        heldout_share: share of each of these two sets that is not named; 0.05 by default.
        max_pairs, max_demonstrations, max_prompts: the most rows, drawn with the run's seed.
    """

    pairs: Source
    prompts: Source
    demonstrations: Source | None = None
    heldout: Source | None = None
    eval_prompts: Source | None = None
    heldout_share: float | None = None
    max_pairs: int | None = None
    max_demonstrations: int | None = None
    max_prompts: int | None = None
    max_heldout: int | None = 2000

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"data.heldout_share is {self.heldout_share}; it must lie in (0, 1)")
        if self.heldout_share is not None and self.heldout and self.eval_prompts:
            raise UserError(
                "data.heldout_share is for sets that are not named, but data.heldout and "
                "data.eval_prompts are; leave it out, or give heldout=null or eval_prompts=null"
            )
        for name in ("max_pairs", "max_demonstrations", "max_prompts", "max_heldout"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"data.{name} is {value}; it must be at least 2, or null")

    @property
    def share(self) -> float:
        """Return `heldout_share` or its default."""
        return 0.05 if self.heldout_share is None else self.heldout_share


@dataclass(frozen=True)
class WorldSection(WorldConfig):
    """The gold world, in place of data sets and a base model.

    Its prompts and demonstrations are written by the run, pairs are responses of the SFT policy
    with noisy labels by the gold reward. The run's seed is also the world's. Beside the fields of
    `WorldConfig`:

    Attributes:
        pairs, heldout_pairs: pairs to label. Pairs of equal or empty responses are dropped.
        labels: pairs of the round's policy to label, for methods that need labels.
        label_pool: pairs that active labels are chosen from, as a multiple of those labelled.
        scale_prompts: prompts whose SFT responses (two each) give the mean and the standard
            deviation of a reward model's rewards.
        policy_prompts: prompts drawn for each round's policy optimisation.
    """

    pairs: int = 3000
    heldout_pairs: int = 500
    labels: int = 300
    label_pool: int = 4
    scale_prompts: int = 512
    policy_prompts: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed:
            raise UserError("world.seed follows the run's seed; set seed instead")

    def files(self, seed: int) -> WorldConfig:
        """Return the configuration of the world's files."""
        own = {option.name: getattr(self, option.name) for option in fields(WorldConfig)}
        return WorldConfig(**{**own, "seed": seed})


@dataclass(frozen=True)
class SFTSection:
    """Supervised fine-tuning (`shiftrm sft`); `batch_size` examples per optimizer step."""

    batch_size: int = 32
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardSection:
    """Reward-model training (`shiftrm train`); `batch_size` pairs per optimizer step.

    Attributes:
        meta: further settings of the arms with a meta step, such as `meta_batch_size`.
    """

    batch_size: int = 16
    settings: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupSection:
    """Unlabelled responses of the round's policy (`shiftrm sample`).

    Attributes:
        prompts: number of training prompts to answer, drawn anew each round; "all" takes every
            prompt, as in the paper.
        responses: responses per prompt.
        batch_size: prompts sampled at once; by default `execution.sampling_batch_size`. Another
            size gives other draws.
    """

    prompts: int | Literal["all"] = 1000
    responses: int = 5
    batch_size: int | None = None


@dataclass(frozen=True)
class PolicySection:
    """Policy optimisation (`shiftrm optimise`, or another program).

    Attributes:
        method: ppo (ours), rloo or grpo (TRL's), or command: the program of `command`.
        batch_size: responses per optimizer step of rloo and grpo, over all processes; ppo has its
            own setting `minibatch_size`.
        settings: settings of that method.
        command: the command line of another trainer: a text, or a list of words, with places for
            its inputs (`policies.external.PLACES`).
    """

    method: str = "ppo"
    batch_size: int = 64
    settings: dict[str, Any] = field(default_factory=dict)
    command: Any = None

    def __post_init__(self) -> None:
        if self.command is not None:
            try:
                parse_command(self.command)
            except UserError as error:
                raise UserError(f"policy.command {error}") from None


@dataclass(frozen=True)
class DPOSection:
    """The DPO baseline on the same pairs; `batch_size` pairs per optimizer step."""

    batch_size: int = 32
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """What every round is measured on.

    Attributes:
        prompts: number of test prompts that are answered.
        judged: how many of them a judge sees (100 in the paper).
        responses: responses per prompt; the first is judged, two are needed for differences.
        kept_values: number of reward differences kept for pictures of their distribution.
        embedder: sentence-transformers name or local folder, for the embedding half of diversity.
        gold: a second reward model that trains nothing ("gold" is the reward of the run's gold
            world, "gold:NAME" that of another). It scores the roll-outs of every step and the
            responses at the end of a round.
        sight_pairs: pairs of each sight test (`measure.sight`) of the round's reward model; 0 makes
            none.
        features: whether to record what the reward model pays for: in a gold world the terms of its
            reward (`evaluation.gold`), elsewhere features of the text.
        best_of_n: samples of the SFT policy per prompt, from which the first reward model picks
            the best; needs `gold`.
        best_of_n_prompts: number of test prompts to do that on.
    """

    prompts: int = 1000
    judged: int = 100
    responses: int = 2
    kept_values: int = 1000
    diversity_prompts: int = 100
    embedder: str | None = None
    gold: str | None = None
    sight_pairs: int = 400
    features: bool = True
    best_of_n: int | None = None
    best_of_n_prompts: int = 100


@dataclass(frozen=True)
class JudgeSettings:
    """The judge that compares two responses.

    Attributes:
        kind: "none", "endpoint" (an OpenAI-compatible server), "reward-model" (`model` is its
            folder) or "gold" (the reward of the run's gold world, for its prompts; "gold:NAME" is
            that of another world).
        model: name at the endpoint, or folder.
        base_url: address of the endpoint; its key is in the environment variable `key_variable`.
        template: name or file of the judge's prompt.
        parameters: parameters of the requests, in addition to temperature 0; null removes one.
        tie_margin: largest difference that is a tie, for judges that give numbers.
        price_in, price_out: price of a million tokens, for the estimate of the cost.
        max_requests: a run that needs more is refused before the first request.
    """

    kind: str = "none"
    model: str | None = None
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    template: str = "helpful"
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    tie_margin: float = 0.0
    price_in: float | None = None
    price_out: float | None = None
    max_requests: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in JUDGES and gold_world(self.kind) is None:
            raise UserError(f"judge.kind is {self.kind!r}{suggest(self.kind, list(JUDGES))}")
        if self.kind in ("endpoint", "reward-model") and self.model is None:
            raise UserError(f"judge.kind is {self.kind}; also set judge.model")
