"""Jobs: the pieces of work that a command does alone and an experiment does in order.

A job is a frozen dataclass with its inputs, its settings and `run(out)`. `shiftrm train` and the
others build the same object from their options; the pipeline reads it from a stage.
"""

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shiftrm.errors import UserError
from shiftrm.methods.method import METHODS
from shiftrm.models.generation import SamplingConfig
from shiftrm.pipeline.external import External
from shiftrm.pipeline.job import Input, Job, Made, Training, as_word, options, text
from shiftrm.pipeline.meta_jobs import MetaTest, MetaTrain
from shiftrm.progress import task
from shiftrm.trainers.kinds import MODELS

if TYPE_CHECKING:
    from shiftrm.trainers.kinds import Training as Kind

__all__ = [
    "JOBS", "External", "Input", "Job", "Made", "MetaTest", "MetaTrain", "Optimise", "Sample",
    "Sft", "TrainReward",
    "as_word", "from_plain", "inputs_of", "is_training", "located", "place", "plain", "plain_input",
]  # fmt: skip

SELDOM = {"seldom": True}
"""Marks a field that is left out of a job's plain data where it is None, so that a run from before
the field existed goes on."""

Bar = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True)
class Sft(Training):
    """Fine-tune a policy on demonstrations; see `policies.commands.sft`.

    The setting `chat_template_path` may be the name of a template of this package.
    """

    model: Input
    demonstrations: Input

    def _words(self) -> list[str]:
        return ["sft", *options(model=self.model, demonstrations=self.demonstrations)]

    def run(self, output: Path) -> str | None:
        from shiftrm.models.templates import packaged
        from shiftrm.policies.commands import sft

        settings = dict(self.settings)
        if "chat_template_path" in settings:
            settings["chat_template_path"] = packaged(settings["chat_template_path"])
        return sft(
            str(self.model),
            demonstrations=str(self.demonstrations),
            output=output,
            settings=settings,
            command=self._told(output),
        )


@dataclass(frozen=True)
class TrainReward(Training):
    """Train a reward model on pairs, with MetaRM where groups are given; see `trainers.training`.

    Attributes:
        eval_pairs: held-out pairs by name; the name of a single one may be empty.
        adaptation: a method as in `methods.method.METHODS`; its settings are defaults.
        policy, reference, reward: today's policy, the SFT policy and the last round's reward model,
            for methods that use them.
    """

    model: Input
    pairs: Input
    eval_pairs: Mapping[str, Input] = field(default_factory=dict)
    groups: Input | None = None
    adaptation: str | None = None
    policy: Input | None = field(default=None, metadata=SELDOM)
    reference: Input | None = field(default=None, metadata=SELDOM)
    reward: Input | None = field(default=None, metadata=SELDOM)

    def training(self) -> "Kind":
        """Return the classes that train; importing them takes seconds.

        Raises:
            UserError: the method is unknown, trains nothing, or does not fit the data.
        """
        from shiftrm.trainers.kinds import pairs_only, with_groups

        if self.adaptation is None:
            found = pairs_only() if self.groups is None else with_groups()
            name = "retrained" if self.groups is None else "metarm"
        else:
            method, name = METHODS.get(self.adaptation), self.adaptation
            if not method.trains:
                raise UserError(f"method {name}: trains nothing")
            found = method.classes().settled({**method.settings, **self.settings})
        found.check(name, {"groups": self.groups, **self._models()})
        return found

    def _models(self) -> dict[str, str | None]:
        return {name: text(getattr(self, name)) for name in MODELS}

    def _defaults(self) -> Mapping[str, Any]:
        return {} if self.adaptation is None else METHODS.get(self.adaptation).settings

    def _words(self) -> list[str]:
        words = ["train", *options(model=self.model, pairs=self.pairs)]
        for name, source in self.eval_pairs.items():
            words += ["--eval-pairs", f"{name}={source}" if name else str(source)]
        return words + options(groups=self.groups, method=self.adaptation, **self._models())

    def run(self, output: Path) -> str | None:
        from shiftrm.trainers.training import TrainingRequest, train

        request = TrainingRequest(
            str(self.model),
            pairs=str(self.pairs),
            output=output,
            settings={**self._defaults(), **self.settings},
            groups=text(self.groups),
            eval_pairs={name: str(source) for name, source in self.eval_pairs.items()},
            command=self._told(output),
            **self._models(),
        )
        return train(request, self.training())


@dataclass(frozen=True)
class Optimise(Training):
    """Train a policy against a reward model or on pairs; see `policies.commands.optimise`.

    Attributes:
        scale: responses of the reference, from which mean and standard deviation of the rewards are
            measured, unless the settings give them; None: the training samples its own.
    """

    method: str
    policy: Input
    reference: Input | None = None
    reward: Input | None = None
    prompts: Input | None = None
    pairs: Input | None = None
    scale: Input | None = None
    watch: Input | None = None

    def _words(self) -> list[str]:
        named = ("policy", "reference", "reward", "prompts", "pairs", "scale", "watch")
        return ["optimise", self.method, *options(**{n: getattr(self, n) for n in named})]

    def run(self, output: Path) -> str | None:
        from shiftrm.policies.commands import Inputs, optimise

        named = ("reference", "reward", "prompts", "pairs", "watch")
        return optimise(
            self.method,
            Inputs(str(self.policy), **{name: text(getattr(self, name)) for name in named}),
            output=output,
            settings={**self._scale(), **self.settings},
            command=self._told(output),
        )

    def _scale(self) -> dict[str, float]:
        """Return the settings that standardise the rewards."""
        if self.scale is None:
            return {}
        if self.method != "ppo":
            raise UserError(f"{self.method} does not standardise rewards; leave out --scale")
        from shiftrm.policies.text_rewards import scale_of

        mean, spread = scale_of(str(self.reward), str(self.scale))
        return {"reward_mean": mean, "reward_std": spread}


@dataclass(frozen=True)
class Sample:
    """Sample K responses per prompt from a policy into a group file.

    Attributes:
        responses: to each prompt.
        batch_size: prompts in a batch; with vLLM, prompts in progress at one time.
        server: a running vLLM server, up to and with /v1.
        served_model: what the server calls the policy, if not `policy`.
        vllm: start `vllm serve` for the policy, with `vllm_arguments`, and end it afterwards.
    """

    several: ClassVar[bool] = False

    policy: Input
    prompts: Input
    makes: str = "responses.jsonl"
    responses: int = 5
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 32
    seed: int = 0
    server: str | None = None
    served_model: str | None = None
    vllm: bool = False
    vllm_arguments: tuple[str, ...] = ()

    def command(self, output: str) -> list[str]:
        words = ["sample", *options(policy=self.policy, prompts=self.prompts, output=output)]
        words += options(responses=self.responses, **vars(self.sampling))
        words += options(batch_size=self.batch_size, seed=self.seed)
        words += options(server=self.server, served_model=self.served_model)
        words += ["--vllm"] if self.vllm else []
        if self.vllm_arguments:
            words.append(f"--vllm-arguments={shlex.join(self.vllm_arguments)}")
        return words

    def on_machine(self, way: Mapping[str, Any]) -> "Sample":
        return replace(self, **way)

    def run(self, output: Path, *, bar: Bar = task) -> str:
        from shiftrm.data.prompts import read_prompts
        from shiftrm.models.group_files import holds_groups

        names, prompts = read_prompts(str(self.prompts))
        there = holds_groups(output, prompts, num_responses=self.responses)
        if self.server or self.vllm:
            self._by_vllm(output, names, prompts, bar)
        else:
            self._here(output, names, prompts, bar)
        groups = f"{len(prompts)} groups of {self.responses} responses"
        return (
            f"{output}: already there, {groups}; left as it is" if there else f"{groups}: {output}"
        )

    def _here(self, output: Path, names: list[str], prompts: list[Any], bar: Bar) -> None:
        from shiftrm.data.prompts import warn_of_joined_ends
        from shiftrm.models.loading import to_accelerator
        from shiftrm.models.sampling import encode_prompts, load_policy, sample_groups

        with task("loading the policy", None):
            model, tokenizer = load_policy(str(self.policy))
            to_accelerator(model)
        # Encoded again below, but only here do errors know the line.
        encode_prompts(model, tokenizer, prompts, room=self.sampling.max_new_tokens, names=names)
        warn_of_joined_ends(tokenizer, prompts, source=str(self.prompts))
        with bar("sampling", len(prompts)) as advance:
            sample_groups(model, tokenizer, prompts, output, self._draws(), progress=advance)

    def _by_vllm(self, output: Path, names: list[str], prompts: list[Any], bar: Bar) -> None:
        from shiftrm.data.prompts import warn_of_joined_ends
        from shiftrm.models import sampling_vllm
        from shiftrm.models.sampling import encode_prompts
        from shiftrm.models.vllm_server import find_vllm, vllm_server

        policy, room = str(self.policy), self.sampling.max_new_tokens
        tokenizer = sampling_vllm.load_tokenizer(policy)
        warn_of_joined_ends(tokenizer, prompts, source=str(self.prompts))
        serving: AbstractContextManager[Any]
        if output.exists():
            limits = sampling_vllm.policy_limits(policy, self.served_model)
            if sampling_vllm.ServerSampler(limits, tokenizer).holds(prompts, output, self._draws()):
                return
        if self.vllm:  # before the minutes that a server takes to start
            find_vllm()
            limits = sampling_vllm.policy_limits(policy)
            encode_prompts(limits, tokenizer, prompts, room=room, names=names)
            log = output.with_name(output.name + ".vllm.log")
            serving = vllm_server(policy, log=log, arguments=list(self.vllm_arguments))
        else:
            assert self.server is not None
            serving = nullcontext(
                sampling_vllm.connect(self.server, policy, served=self.served_model)
            )
        with serving as server:
            encode_prompts(server, tokenizer, prompts, room=room, names=names)
            with bar("sampling", len(prompts)) as advance:
                sampling_vllm.sample_groups_vllm(
                    server, tokenizer, prompts, output, self._draws(), progress=advance
                )

    def _draws(self) -> Any:
        from shiftrm.models.sampling import Draws

        return Draws(self.sampling, self.responses, self.batch_size, self.seed)


def is_training(job: Any) -> bool:
    """Whether a job trains, and so has settings."""
    return isinstance(job, Training)


JOBS: dict[str, type] = {
    "sft": Sft,
    "train_reward": TrainReward,
    "optimise": Optimise,
    "external": External,
    "sample": Sample,
    "meta_train": MetaTrain,
    "meta_test": MetaTest,
}
"""The jobs by the name that a file calls them."""


def plain(job: Any) -> dict[str, Any]:
    """Return the job as plain data, for a stage's settings and for a file."""
    kind = next(name for name, cls in JOBS.items() if cls is type(job))
    values = {option.name: getattr(job, option.name) for option in fields(job)}
    for option in fields(job):
        if option.metadata == SELDOM and values[option.name] is None:
            del values[option.name]
    return {"kind": kind} | {name: _plain(value) for name, value in values.items()}


def from_plain(data: Mapping[str, Any]) -> Any:
    """Return the job that `plain` was given."""
    values = {name: _typed(value) for name, value in data.items() if name != "kind"}
    if "sampling" in values:
        values["sampling"] = SamplingConfig(**values["sampling"])
    for name in ("vllm_arguments", "words"):
        if name in values:
            values[name] = tuple(values[name])
    return JOBS[data["kind"]](**values)


def inputs_of(job: Any) -> tuple[str, ...]:
    """The stages whose files a job reads, each once."""
    found = []
    for option in fields(job):
        value = getattr(job, option.name)
        found += list(value.values()) if isinstance(value, Mapping) else [value]
    return tuple(dict.fromkeys(value.stage for value in found if isinstance(value, Made)))


def located(job: Any, root: Path) -> Any:
    """Return the job with paths below the run's folder in place of `Made`."""

    def path(value: Any) -> Any:
        if isinstance(value, Made):
            return str(root / value.stage / value.file)
        if isinstance(value, Mapping):
            return {key: path(inner) for key, inner in value.items()}
        return value

    return replace(job, **{o.name: path(getattr(job, o.name)) for o in fields(job)})


def plain_input(value: Input) -> Any:
    """Return an input as plain data; `place` reads it back."""
    return _plain(value)


def place(data: Any, root: Path) -> str:
    """Return the path or name of an input that `plain_input` was given."""
    value = _typed(data)
    return str(root / value.stage / value.file) if isinstance(value, Made) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Made):
        return {"stage": value.stage, "file": value.file}
    if isinstance(value, SamplingConfig):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"stage", "file"}:
            return Made(**value)
        return {key: _typed(inner) for key, inner in value.items()}
    return value
