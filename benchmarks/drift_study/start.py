"""What the runs of a seed start from: world, SFT policy and reward model, as in the demo.

Plain loops in place of TRL's trainers, with the demo's sizes and rates, so that a machine with
torch and transformers can make all of them in a minute.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plain_training import Schedule, train
from shiftrm.core.losses import bradley_terry_loss
from shiftrm.files import Row, atomic_write_text, read_jsonl, write_jsonl
from shiftrm.models.rendering import encode
from shiftrm.models.rewards import pad_right, sequence_rewards
from shiftrm.models.sampling import Draws, SamplingConfig, sample_rows
from shiftrm.models.scoring import Scorer
from shiftrm.world.build import (
    BASE_MODEL,
    PROMPTS_TRAIN,
    SFT,
    WorldConfig,
    label_pairs,
    write_world,
)

BATCH, PAIRS, HELD_OUT, SCALE = 32, 3000, 500, 256
SFT_RATE, REWARD_RATE, REWARD_STEPS = 2e-3, 1e-3, 187
POLICY, REWARD, SECOND, RESPONSES, DONE = "policy", "reward", "second", "scale.jsonl", "start.json"
TRAINING_PAIRS = "pairs.jsonl"

OTHER = 10_000
"""Added to a run's seed for the head and the order of the second reward model."""


def make_start(seed: int, folder: Path) -> Path:
    """Make the start of a seed, if it is not there, and return its folder."""
    if (folder / DONE).exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = folder / "world"
    if not (world / "README.txt").exists():
        write_world(world, WorldConfig(seed=seed))
    tokenizer = AutoTokenizer.from_pretrained(world / BASE_MODEL)
    policy = AutoModelForCausalLM.from_pretrained(world / BASE_MODEL)
    _fine_tune(policy, tokenizer, read_jsonl(world / SFT), seed)
    policy.save_pretrained(folder / POLICY)
    tokenizer.save_pretrained(folder / POLICY)
    prompts = [row["prompt"] for row in read_jsonl(world / PROMPTS_TRAIN)]
    rng = random.Random(f"start/{seed}")
    rows = _sampled(policy.eval(), tokenizer, prompts, PAIRS + HELD_OUT, rng)
    labelled = label_pairs(
        [row["prompt"] for row in rows],
        *([row["responses"][side] for row in rows] for side in (0, 1)),
        seed=rng.getrandbits(31),
        finished=[tuple(row["finished"]) for row in rows],
    )
    held_out, pairs = labelled[:HELD_OUT], labelled[HELD_OUT:]
    write_jsonl(folder / RESPONSES, _sampled(policy, tokenizer, prompts, SCALE // 2, rng))
    write_jsonl(folder / TRAINING_PAIRS, pairs)
    for name, drawn in ((REWARD, seed), (SECOND, seed + OTHER)):
        _reward_model(folder, name, pairs, drawn)
    accuracy = _accuracy(Scorer.from_pretrained(folder / REWARD), held_out)
    atomic_write_text(folder / DONE, json.dumps({"seed": seed, "held_out_accuracy": accuracy}))
    return folder


def _sampled(
    policy: Any, tokenizer: Any, prompts: Sequence[str], count: int, rng: random.Random
) -> list[Row]:
    drawn = [rng.choice(prompts) for _ in range(count)]
    draws = Draws(SamplingConfig(max_new_tokens=20), 2, batch_size=128, seed=rng.getrandbits(31))
    return sample_rows(policy, tokenizer, drawn, draws)


def _fine_tune(policy: nn.Module, tokenizer: Any, rows: Sequence[Row], seed: int) -> None:
    """One epoch of the likelihood of the demonstrations, as the recipe's SFT."""
    given = [len(encode(tokenizer, None, row["prompt"], finished=False)) for row in rows]
    texts = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def loss(step: int) -> torch.Tensor:
        batch = batches[step]
        ids, mask = pad_right([texts[i] for i in batch], pad_token_id=tokenizer.pad_token_id)
        labels = ids.masked_fill(mask == 0, -100)
        for row, i in enumerate(batch):
            labels[row, : given[i]] = -100
        return policy(input_ids=ids, attention_mask=mask, labels=labels).loss

    train(policy.train(), loss, Schedule(len(batches), SFT_RATE, warmup=20))
    policy.eval()


def _reward_model(folder: Path, name: str, pairs: Sequence[Row], seed: int) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / POLICY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder / POLICY, num_labels=1)
    if name == REWARD:  # the second one keeps its own random head
        nn.init.zeros_(model.score.weight)
    rng = random.Random(f"reward/{seed}")
    places: list[int] = []
    while len(places) < REWARD_STEPS * BATCH:
        places += rng.sample(range(len(pairs)), len(pairs))
    batches = [places[at : at + BATCH] for at in range(0, REWARD_STEPS * BATCH, BATCH)]
    sides = [
        [
            encode(tokenizer, row["prompt"], row[side], finished=row[f"{side}_finished"])
            for row in pairs
        ]
        for side in ("chosen", "rejected")
    ]

    def loss(step: int) -> torch.Tensor:
        texts = [side[i] for side in sides for i in batches[step]]
        ids, mask = pad_right(texts, pad_token_id=tokenizer.pad_token_id)
        chosen, rejected = sequence_rewards(model, ids, mask).chunk(2)
        return bradley_terry_loss(chosen, rejected).mean()

    train(model.train(), loss, Schedule(REWARD_STEPS, REWARD_RATE))
    model.eval()
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def _accuracy(scorer: Scorer, pairs: Sequence[Row]) -> float:
    values = [
        scorer(
            [row["prompt"] for row in pairs],
            [row[side] for row in pairs],
            finished=[row[f"{side}_finished"] for row in pairs],
        )
        for side in ("chosen", "rejected")
    ]
    right = [0.5 if a == b else float(a > b) for a, b in zip(*values, strict=True)]
    return sum(right) / len(right)
