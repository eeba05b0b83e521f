"""Where a run's data comes from: data sets, or the gold world and labels in it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.jobs import Input, Made, plain_input
from shiftrm.world.build import BASE_MODEL, SFT
from shiftrm.world.world import GOLD

__all__ = [
    "PREPARE", "Sources", "data_stages", "label_prompts", "label_stage", "record_as", "sources",
]  # fmt: skip

PREPARE = "shiftrm.pipeline.prepare"
RESPONSES = "responses.jsonl"

Sampling = Callable[[str, str, Made, int], Stage]
"""Makes a stage that samples from the SFT policy: (name, role, prompts, responses a prompt)."""


def record_as(stage: str, method: str, number: int) -> dict[str, Any]:
    """Return the key that a stage's records share."""
    return {"stage": stage, "method": method, "round": number}


@dataclass(frozen=True)
class Sources:
    """The inputs that stages share.

    Attributes:
        base: model to fine-tune, or the fine-tuned policy.
        scale: responses of the SFT policy that give the scale of rewards; None: each training of a
            policy samples its own.
    """

    base: Input
    demonstrations: Made
    pairs: Made
    heldout: Made
    scale: Made | None = None

    def policy_prompts(self, number: int) -> Made:
        """Return the prompts of a round's policy optimisation."""
        name = "prompts" if self.scale is None else f"policy_prompts-{number}"
        return Made("data", f"{name}.jsonl")


def sources(experiment: Experiment) -> Sources:
    """Return where the run's stages find their inputs."""
    if experiment.domains is not None:
        return Sources(
            Made("data", f"world/{BASE_MODEL}"),
            Made("data", f"world/{SFT}"),
            Made("data", "pairs.jsonl"),
            Made("data", "heldout.jsonl"),  # no stage reads it: each domain has its own
        )
    if experiment.world is None:
        data = [Made("data", f"{name}.jsonl") for name in ("demonstrations", "pairs", "heldout")]
        return Sources(str(experiment.model), *data)
    return Sources(
        Made("data", f"world/{BASE_MODEL}"),
        Made("data", f"world/{SFT}"),
        Made("pairs", "pairs.jsonl"),
        Made("pairs", "heldout.jsonl"),
        Made("scale", RESPONSES),
    )


def data_stages(experiment: Experiment, sample: Sampling) -> tuple[Stage, list[Stage]]:
    """Return the first stage, and those that follow supervised fine-tuning."""
    if experiment.domains is not None:
        return _domains(experiment), []
    if experiment.world is None:
        return _data_sets(experiment), []
    return _world(experiment), [
        sample("samples/pairs", "pairs/train", Made("data", "pair_prompts.jsonl"), 2),
        sample("samples/heldout", "pairs/heldout", Made("data", "heldout_prompts.jsonl"), 2),
        _labelled(
            "pairs",
            {
                "pairs": ("samples/pairs", "pairs/train", "pairs", []),
                "heldout": ("samples/heldout", "pairs/heldout", "heldout", []),
            },
            record_as("pairs", "sft", 0),
            experiment.gold,
        ),
        sample("scale", "spread", Made("data", "scale_prompts.jsonl"), 2),
    ]


def label_stage(
    here: str,
    samples: str,
    after: Made,
    number: int,
    method: str,
    *,
    gold: str,
    active: tuple[int, Input] | None = None,
) -> Stage:
    """Return the stage that adds fresh labels of a round to the pairs that the arm has.

    Args:
        active: how many of the samples are labelled, those that say most about a reward model that
            was trained on the pairs; and that model. None: all.
    """
    files = {"pairs": (samples, f"labels/{number}", "labels", [after])}
    stage = _labelled(here, files, record_as("labels", method, number), gold)
    if active is None:
        return stage
    count, reward = active
    choice = {"count": count, "reward": plain_input(reward)}
    needs = [*stage.needs, *_of([reward] if isinstance(reward, Made) else [])]
    settings = {**stage.settings, "choice": choice}
    return replace(stage, settings=settings, needs=tuple(dict.fromkeys(needs)))


def label_prompts(experiment: Experiment, name: str, number: int) -> Made:
    """Return the prompts of the responses that an arm labels, or chooses from, in a round."""
    return Made("data", f"{_label_file(experiment, name, number)}.jsonl")


def _label_file(experiment: Experiment, name: str, number: int) -> str:
    assert experiment.world is not None
    _, pool = experiment.labels_of(name)
    more = "" if pool == experiment.world.labels else f"-{pool}"
    return f"label_prompts-{number}{more}"


def _rounds(experiment: Experiment) -> int:
    return max(experiment.rounds_of(name) for name in experiment.methods)


def _best_of_n_prompts(experiment: Experiment) -> int | None:
    measured = experiment.evaluation
    return None if measured.best_of_n is None else measured.best_of_n_prompts


def _data_sets(experiment: Experiment) -> Stage:
    data = experiment.data
    assert data is not None
    settings = {
        **to_mapping(data),
        "heldout_share": data.share,
        "group_prompts": experiment.groups.prompts,
        "eval_prompts_count": experiment.evaluation.prompts,
        "best_of_n_prompts": _best_of_n_prompts(experiment),
        "rounds": _rounds(experiment),
        "demonstrations_needed": experiment.sft is not None,
    }
    record = record_as("data", "sft", 0)
    return Stage("data", f"{PREPARE}:prepare_data", settings, record_as=record)


def _world(experiment: Experiment) -> Stage:
    world = experiment.world
    assert world is not None
    wanted = experiment.groups.prompts
    groups = world.train_prompts if wanted == "all" else wanted
    draws: dict[str, tuple[str, int]] = {
        "pair_prompts": ("pairs/train", world.pairs),
        "heldout_prompts": ("pairs/heldout", world.heldout_pairs),
        "scale_prompts": ("spread", world.scale_prompts),
    }
    for number in range(1, _rounds(experiment) + 1):
        draws[f"group_prompts-{number}"] = (f"groups/{number}", groups)
        draws[f"label_prompts-{number}"] = (f"labels/{number}", world.labels)
        draws[f"policy_prompts-{number}"] = (f"ppo/{number}", world.policy_prompts)
    for name, arm in experiment.methods.items():
        if "labels" in arm.method.needs and not arm.is_dpo:
            for number in range(1, experiment.rounds_of(name) + 1):
                pool = experiment.labels_of(name)[1]
                draws[_label_file(experiment, name, number)] = (f"labels/{number}", pool)
    evaluated = {"eval_prompts": experiment.evaluation.prompts}
    if (count := _best_of_n_prompts(experiment)) is not None:
        evaluated["best_of_n_prompts"] = count
    settings = {
        "files": world.files(experiment.seed).plain(),
        "draws": {name: list(draw) for name, draw in draws.items()},
        "evaluated": evaluated,
    }
    record = record_as("data", "sft", 0)
    return Stage("data", f"{PREPARE}:prepare_world", settings, record_as=record)


def _domains(experiment: Experiment) -> Stage:
    section = experiment.domains
    assert section is not None
    settings = {
        "files": {**asdict(section.world), "seed": experiment.seed},
        "sources": list(section.sources),
    }
    return Stage("data", f"{PREPARE}:prepare_domains", settings, (), record_as("data", "sft", 0))


def _labelled(
    here: str,
    files: dict[str, tuple[str, str, str, list[Made]]],
    record: dict[str, Any],
    gold: str,
) -> Stage:
    """Files by name, each from a stage of samples, a role, a metric and earlier pairs."""
    wanted = {
        name: {
            "samples": plain_input(Made(samples, RESPONSES)),
            "role": role,
            "metric": metric,
            "after": [plain_input(before) for before in after],
        }
        for name, (samples, role, metric, after) in files.items()
    }
    needs = [stage for samples, *_, after in files.values() for stage in (samples, *_of(after))]
    unique = tuple(dict.fromkeys(needs))
    settings: dict[str, Any] = {"files": wanted}
    if gold != GOLD:  # stages of the default world stay as they were before there was another
        settings["gold"] = gold
    return Stage(here, f"{PREPARE}:label_samples", settings, unique, record)


def _of(inputs: list[Made]) -> list[str]:
    return [made.stage for made in inputs]
