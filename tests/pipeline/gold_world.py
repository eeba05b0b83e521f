"""The gold world as a user's own data: a tiny base model, demonstrations, prompts and pairs."""

import random
from pathlib import Path

import yaml

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.world.build import WorldConfig, label_pairs, write_world
from shiftrm.world.language import demonstration

WORLD = WorldConfig(
    sft_examples=48,
    train_prompts=64,
    eval_prompts=12,
    hidden_size=16,
    intermediate_size=16,
    layers=1,
    heads=2,
)


def write_gold_world(folder: Path) -> Path:
    """`base_model/`, `sft.jsonl`, `prompts_train.jsonl` and labelled `pairs.jsonl`."""
    write_world(folder, WORLD)
    rng = random.Random(0)
    prompts = [row["prompt"] for row in read_jsonl(folder / "prompts_train.jsonl")]
    first = [demonstration(rng, prompt, rng.random()) for prompt in prompts]
    second = [demonstration(rng, prompt, rng.random()) for prompt in prompts]
    write_jsonl(folder / "pairs.jsonl", label_pairs(prompts, first, second, seed=0))
    return folder


def recipe(world: Path, **sections) -> dict:
    """A recipe of one round on it; held-out sets are a share of the training prompts."""
    own = {"format": "preference"}
    return {
        "model": str(world / "base_model"),
        "rounds": 1,
        "methods": {"fixed": {"reward": "fixed"}},
        "data": {
            "demonstrations": {**own, "source": str(world / "sft.jsonl")},
            "pairs": {**own, "source": str(world / "pairs.jsonl")},
            "prompts": {**own, "source": str(world / "prompts_train.jsonl")},
            "heldout_share": 0.3,
        },
        "sft": {
            "batch_size": 4,
            "settings": {"max_steps": 2, "max_length": 64, "logging_steps": 1},
        },
        "reward": {
            "batch_size": 4,
            "settings": {"max_steps": 2, "max_length": 64, "logging_steps": 1},
            "meta": {"meta_batch_size": 2},
        },
        "groups": {"prompts": 4, "responses": 2},
        "sampling": {"max_new_tokens": 6},
        "policy": {
            "settings": {
                "steps": 2,
                "prompts_per_step": 2,
                "rollouts_per_prompt": 2,
                "minibatch_size": 4,
                "learning_rate": 1e-3,
                "kl_samples": 4,
            }
        },
        "dpo": {"batch_size": 4, "settings": {"max_steps": 2, "kl_samples": 4}},
        "evaluation": {"prompts": 6, "judged": 6},
        "execution": {
            "in_process": True,
            "bf16": False,
            "gradient_checkpointing": False,
        },
        **sections,
    }


def write_recipe(path: Path, world: Path, **sections) -> Path:
    """`recipe` as a file."""
    path.write_text(yaml.safe_dump(recipe(world, **sections)), encoding="utf-8")
    return path
