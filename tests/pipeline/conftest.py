"""The recipes' data sets, made up in their public schemas, and a base model that fits them."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from shiftrm.pipeline import engine
from shiftrm.pipeline.run import read_recipe
from tests.data import public_schemas as schemas
from tests.pipeline.gold_world import write_gold_world
from tests.pipeline.tiny import write_base_model

RECIPES = Path(__file__).parents[2] / "recipes"
LOOP = ("hh_helpful", "hh_harmless", "hh_eta", "summary", "ood_helpful", "ood_harmless")


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    """Folder with a made-up file or folder of every public data set, and `base`, a model."""
    folder = tmp_path_factory.mktemp("public")
    schemas.write_hh_folder(folder / "hh_rlhf", 24)
    schemas.write_sharegpt(folder / "sharegpt.json", 16)
    schemas.write_oasst1(folder / "oasst1.jsonl", 24)
    schemas.write_oasst1(folder / "oasst1-test.jsonl", 6, seed=1)
    schemas.write_pku(folder / "pku.jsonl", 24)
    schemas.write_pku(folder / "pku-test.jsonl", 6, seed=1)
    schemas.write_comparisons(folder / "summarize.jsonl", 24)
    schemas.write_comparisons(folder / "summarize-test.jsonl", 6, seed=1, split="valid1")
    schemas.write_posts(folder / "tldr.jsonl", 16)
    schemas.write_posts(folder / "tldr-test.jsonl", 6, seed=1)
    texts = [f"{schemas.GOOD} {schemas.BAD}", " ".join(schemas.WORDS), "Human: Assistant:"]
    write_base_model(folder / "base", texts)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder of the gold world as a user's own data."""
    return write_gold_world(tmp_path_factory.mktemp("gold") / "world")


SMALL = [
    "rounds=2",
    "execution={in_process: true, bf16: false, gradient_checkpointing: false, workers: 2}",
    "sft.batch_size=2",
    "sft.settings.max_steps=2",
    "sft.settings.learning_rate=1e-3",
    "reward.batch_size=2",
    "reward.settings.max_steps=2",
    "reward.meta.meta_batch_size=2",
    "reward.settings.eval_steps=1",
    "reward.settings.logging_steps=1",
    "groups={prompts: 3, responses: 2}",
    "policy.settings.steps=2",
    "policy.settings.prompts_per_step=2",
    "policy.settings.rollouts_per_prompt=2",
    "policy.settings.minibatch_size=2",
    "dpo.batch_size=2",
    "dpo.settings.max_steps=2",
    "sampling.max_new_tokens=4",
    "evaluation.prompts=4",
    "evaluation.judged=4",
    "data.max_heldout=4",
]
"""Two rounds of two steps on tiny models."""


def sources(name, public):
    """The data of a recipe on this machine instead of the hub's."""
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["model=x/y"])
    words = []
    for key in ("demonstrations", "pairs", "heldout", "prompts", "eval_prompts"):
        form = getattr(recipe.data, key).format
        evaluated = key in ("heldout", "eval_prompts")
        path = {
            "hh_rlhf": public / "hh_rlhf",
            "sharegpt": public / "sharegpt.json",
        }.get(form, public / f"{form}{'-test' if evaluated else ''}.jsonl")
        words.append(f"data.{key}.source={path}")
    return words


class HereExecutor:
    """Runs every stage at once in this process, which has imported everything already."""

    _processes = None

    def __init__(self, **_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process: what workers are is tested in test_processes.py."""
    monkeypatch.setattr(engine, "ProcessPoolExecutor", HereExecutor)


@pytest.fixture
def words(public):
    """`words(name)`: the command line's settings for a tiny run of a recipe."""

    def settings(name):
        return [f"model={public / 'base'}", *sources(name, public), *SMALL]

    return settings
