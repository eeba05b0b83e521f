"""The stages that make a run's data: read data sets, or write the gold world; label pairs."""

import logging
import random
from typing import Any

from transformers import AutoTokenizer

from shiftrm.data.groups import read_groups
from shiftrm.data.loaded import Loaded
from shiftrm.data.pairs import read_pairs
from shiftrm.errors import UserError
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.models.loading import load_reward_model
from shiftrm.pipeline.active_labels import informative_pairs
from shiftrm.pipeline.data_sets import assembled
from shiftrm.pipeline.engine import StageContext
from shiftrm.pipeline.jobs import place
from shiftrm.world.build import PROMPTS_EVAL, PROMPTS_TRAIN, WorldConfig, label_pairs, write_world
from shiftrm.world.build_domains import DOMAINS, DomainWorldConfig, write_domain_world
from shiftrm.world.world import GOLD, World, gold_world

__all__ = [
    "join_groups",
    "label_samples",
    "new_reward_model",
    "prepare_data",
    "prepare_domains",
    "prepare_world",
]

logger = logging.getLogger(__name__)

WORLD = "world"
"""Folder of the gold world's files in the stage "data"."""


def prepare_data(context: StageContext) -> None:
    """Read every data set, split by prompt, and write the files that all stages read.

    No evaluation prompt stays in any training file. Every row that was dropped is counted by
    reason in the records and named in `dropped.jsonl`.
    """
    settings = context.stage.settings
    found = assembled(settings, seed=context.random_seed("splits"))
    dropped: list[Row] = []
    for name, loaded in found.items():
        dropped += [{"data": name, **row} for row in loaded.dropped]
        _write(context, name, loaded)
    write_jsonl(context.out / "dropped.jsonl", dropped)
    if settings["best_of_n_prompts"]:
        first = found["eval_prompts"].rows[: settings["best_of_n_prompts"]]
        write_jsonl(context.out / "best_of_n_prompts.jsonl", first)
    prompts = found["prompts"].rows
    for number in range(1, settings["rounds"] + 1):
        draws = random.Random(context.random_seed(f"groups/{number}"))
        wanted = settings["group_prompts"]
        count = len(prompts) if wanted == "all" else min(wanted, len(prompts))
        drawn = draws.sample(prompts, count)
        write_jsonl(context.out / f"group_prompts-{number}.jsonl", drawn)


def _write(context: StageContext, name: str, loaded: Loaded) -> None:
    if not loaded.rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in loaded.counts().items())
        raise UserError(f"data.{name}: no rows are left ({counts or 'the source is empty'})")
    write_jsonl(context.out / f"{name}.jsonl", loaded.rows)
    context.recorder.add(name, float(len(loaded.rows)))
    for reason, count in loaded.counts().items():
        context.recorder.add(f"{name}_dropped_{reason}", float(count))


def prepare_world(context: StageContext) -> None:
    """Write the gold world, and the prompts that each later stage answers.

    There are few different prompts, so every file draws from the training prompts with
    replacement; the role of a file in the run decides its draws.

    Settings: `files`, the fields of a `WorldConfig`; `draws`, the number of prompts by file name
    and role; `evaluated`, the number of evaluation prompts by file name.
    """
    settings = context.stage.settings
    folder = write_world(context.out / WORLD, WorldConfig(**settings["files"]))
    prompts = read_jsonl(folder / PROMPTS_TRAIN)
    for name, (role, count) in settings["draws"].items():
        rng = random.Random(context.random_seed(f"prompts/{role}"))
        drawn = [{"prompt": rng.choice(prompts)["prompt"]} for _ in range(count)]
        write_jsonl(context.out / f"{name}.jsonl", drawn)
    held_out = read_jsonl(folder / PROMPTS_EVAL)
    for name, count in settings["evaluated"].items():
        write_jsonl(context.out / f"{name}.jsonl", held_out[:count])
    context.recorder.add("demonstrations", float(settings["files"]["sft_examples"]))
    context.recorder.add("eval_prompts", float(settings["evaluated"]["eval_prompts"]))


def prepare_domains(context: StageContext) -> None:
    """Write the gold world's domains, and the pairs of the sources in one file.

    Settings: `files`, the fields of a `DomainWorldConfig`; `sources`, the names of domains.
    """
    settings = context.stage.settings
    config = DomainWorldConfig(**settings["files"])
    folder = write_domain_world(context.out / WORLD, config)
    pairs: list[Row] = []
    for name in settings["sources"]:
        pairs += read_pairs(str(folder / DOMAINS / name / "pairs.jsonl"))
    write_jsonl(context.out / "pairs.jsonl", pairs)
    context.recorder.add("demonstrations", float(config.sft_examples))
    context.recorder.add("pairs", float(len(pairs)))


def new_reward_model(context: StageContext) -> None:
    """Write a reward model that is not trained yet: a policy's backbone under a new head.

    Settings: `policy`, an input; `role`, which decides the draws of the head.
    """
    settings = context.stage.settings
    policy = place(settings["policy"], context.root)
    seed = context.random_seed(settings["role"])
    load_reward_model(policy, seed=seed).save_pretrained(context.out / "model")
    AutoTokenizer.from_pretrained(policy).save_pretrained(context.out / "model")


def join_groups(context: StageContext) -> None:
    """Write the groups of several files, in order, to `groups.jsonl`. Settings: `files`, inputs."""
    files = [place(file, context.root) for file in context.stage.settings["files"]]
    write_jsonl(context.out / "groups.jsonl", [row for file in files for row in read_jsonl(file)])


def label_samples(context: StageContext) -> None:
    """Label pairs of sampled responses with noise by the gold reward; write `NAME.jsonl`.

    Settings: `files`, by name the `samples` (an input of two responses a prompt), the `role` of the
    draws, and `after`: a list of inputs whose pairs come first; `gold`, the name of the gold
    reward, by default that of the default world; `choice`, `count` and `reward`: label only the
    pairs that say most about that reward model, which was trained on those of `after`.
    """
    choice = context.stage.settings.get("choice")
    world = gold_world(context.stage.settings.get("gold", GOLD))
    assert world is not None
    for name, said in context.stage.settings["files"].items():
        rows = [row for before in said["after"] for row in read_pairs(place(before, context.root))]
        samples = read_groups(place(said["samples"], context.root))
        if choice is not None:
            reward = place(choice["reward"], context.root)
            kept = informative_pairs(reward, rows, samples, count=choice["count"])
            if len(kept) < choice["count"]:
                logger.warning(
                    "%s: %d of %d labels are bought, since the policy gave only so many pairs of "
                    "different responses that are not blank",
                    name,
                    len(kept),
                    choice["count"],
                )
            samples = [samples[i] for i in kept]
        labelled = _labelled(
            world,
            samples,
            seed=context.random_seed(f"{said['role']}/labels"),
        )
        write_jsonl(context.out / f"{name}.jsonl", [*rows, *labelled])
        context.recorder.add(said["metric"], float(len(labelled)))


def _labelled(world: World, samples: list[Row], *, seed: int) -> list[Row]:
    def each(column: str, number: int) -> list[Any]:
        return [row[column][number] for row in samples]

    return label_pairs(
        [row["prompt"] for row in samples],
        each("responses", 0),
        each("responses", 1),
        seed=seed,
        finished=[tuple(row["finished"]) for row in samples],
        reward=world.gold_reward,
        domain=world.domain_of,
    )
