"""What each stage of a gold-world run does: thin code around the trainers.

Every function takes a `StageContext`, reads the folders of the stages it needs and writes its own.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, SFTConfig, SFTTrainer

from shiftrm.config import from_mapping
from shiftrm.core.discrimination import difference_variance
from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import read_pairs
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.models.loading import load_reward_model
from shiftrm.models.rendering import encode, encode_prompt
from shiftrm.models.sampling import Draws, SamplingConfig, load_policy, sample_groups, sample_rows
from shiftrm.models.scoring import Scorer, mean_and_spread, score_rows
from shiftrm.pipeline.demo_plan import GOLD
from shiftrm.pipeline.engine import StageContext
from shiftrm.policies.ppo import PPOTrainer, Problem, Rollouts, StepLog, make_critic
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Recorder
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.world.build import (
    BASE_MODEL,
    PROMPTS_TRAIN,
    SFT,
    WorldConfig,
    label_pairs,
    write_world,
)
from shiftrm.world.gold import GoldReward
from shiftrm.world.language import parse_prompt

SPREAD_SAMPLES = 512
"""SFT responses on which a reward model's mean and spread are taken, before PPO."""


def make_world(context: StageContext) -> None:
    """Language, prompts, demonstrations and a random base model, as ordinary files."""
    write_world(context.out / "files", WorldConfig(**context.stage.settings))


def train_sft(context: StageContext) -> None:
    """Supervised fine-tuning of the base model on the world's demonstrations (TRL)."""
    settings, files = context.stage.settings, context.folder("world") / "files"
    model, tokenizer = load_policy(files / BASE_MODEL)
    rows = []
    for row in read_jsonl(files / SFT):
        ids = encode(tokenizer, row["prompt"], row["completion"])
        length = len(encode_prompt(tokenizer, row["prompt"]))
        rows.append({"input_ids": ids, "completion_mask": [0] * length + [1] * (len(ids) - length)})
    args = SFTConfig(
        **training_arguments(context, "sft"),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=settings["warmup_steps"],
        logging_steps=20,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run_trainer(trainer, context.recorder, {"loss": "loss"})
    save(context.out, trainer.model, tokenizer)


def make_pairs(context: StageContext) -> None:
    """Preference pairs of SFT responses with noisy gold labels, and SFT samples for spread."""
    settings = context.stage.settings
    sampling = SamplingConfig(**settings["sampling"])
    model, tokenizer = load_policy(context.folder("sft"))
    for name, count in (("train", settings["pairs"]), ("heldout", settings["heldout_pairs"])):
        rows = _labelled_pairs(context, model, tokenizer, sampling, count, role=f"pairs/{name}")
        write_jsonl(context.out / f"{name}.jsonl", rows)
        context.recorder.add(f"pairs_{name}", float(len(rows)))
    prompts = draw_prompts(context, SPREAD_SAMPLES, "spread")
    rows = sample_pairs(model, tokenizer, prompts, sampling, context.random_seed("spread"))
    write_jsonl(context.out / "sft_samples.jsonl", rows)


def sample_groups_of_policy(context: StageContext) -> None:
    """K unlabelled responses per prompt of the policy the reward model is to be adapted to."""
    settings = context.stage.settings
    model, tokenizer = load_policy(context.folder(settings["policy"]))
    role = f"groups/{settings['round']}"
    path = sample_groups(
        model,
        tokenizer,
        draw_prompts(context, settings["groups"], role),
        context.out / "groups.jsonl",
        Draws(
            SamplingConfig(**settings["sampling"]),
            settings["responses_per_group"],
            batch_size=64,
            seed=context.random_seed(role),
        ),
    )
    rows = [{**row, "domain": parse_prompt(row["prompt"]).topic} for row in read_groups(path)]
    write_jsonl(path, rows)


def buy_labels(context: StageContext) -> None:
    """The ceiling: fresh gold labels on pairs of the current policy."""
    settings = context.stage.settings
    model, tokenizer = load_policy(context.folder(settings["policy"]))
    rows = _labelled_pairs(
        context,
        model,
        tokenizer,
        SamplingConfig(**settings["sampling"]),
        settings["labels"],
        role=f"labels/{settings['round']}",
    )
    write_jsonl(context.out / "labels.jsonl", rows)
    context.recorder.add("labels", float(len(rows)))


def train_reward(context: StageContext) -> None:
    """A reward model from the SFT backbone and a new head: vanilla, or MetaRM with groups.

    Every arm takes the same number of optimizer steps; all arms of a round share head and order,
    in the first round with the reward model that the arm "fixed" keeps.
    """
    settings = context.stage.settings
    pairs = read_pairs(context.folder("pairs") / "train.jsonl")
    steps = math.ceil(settings["epochs"] * len(pairs) / settings["batch_size"])
    for name in context.stage.needs:
        if name.endswith("/labels"):
            pairs += read_pairs(context.folder(name) / "labels.jsonl")
    fit_reward(context, pairs, steps=steps)


def fit_reward(context: StageContext, pairs: list[Row], *, steps: int) -> None:
    """Train on these pairs for so many optimizer steps, with MetaRM if the settings name a preset.

    Records accuracy on the held-out original pairs and saves the model.
    """
    settings = context.stage.settings
    heldout = read_pairs(context.folder("pairs") / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(context.folder("sft"))
    seed = context.random_seed(f"reward/{settings['round']}")
    model = new_reward_model(context.folder("sft"), seed=seed)
    common: dict[str, Any] = {
        **training_arguments(context, f"reward/{settings['round']}"),
        "max_steps": steps,
        "per_device_train_batch_size": settings["batch_size"],
        "per_device_eval_batch_size": 250,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "linear",
        "max_length": None,
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // settings["evaluations"]),
        "logging_steps": max(1, steps // settings["evaluations"]),
    }
    data = {
        "train_dataset": Dataset.from_list(pairs),
        "eval_dataset": Dataset.from_list(heldout),
        "processing_class": tokenizer,
    }
    trainer: RewardTrainer
    if settings["preset"] is None:
        trainer = RewardTrainer(model, RewardConfig(**common), **data)
    else:
        step = {"meta_learning_rate": settings["scale_free_step"]}
        args = MetaRMConfig(
            **common,
            preset=settings["preset"],
            meta_batch_size=settings["meta_batch_size"],
            **(step if settings["preset"] == "scale_free" else {}),
        )
        groups = [name for name in context.stage.needs if name.endswith("/groups")]
        trainer = MetaRMTrainer(
            model,
            args,
            meta_dataset=read_groups(context.folder(groups[0]) / "groups.jsonl"),
            **data,
        )
    run_trainer(trainer, context.recorder, _REWARD_METRICS)
    context.recorder.add("eval_accuracy_final", trainer.evaluate()["eval_accuracy"], n=len(heldout))
    save(context.out, trainer.model, tokenizer)


_REWARD_METRICS = {
    "loss": "loss",
    "eval_accuracy": "eval_accuracy",
    "meta_objective": "meta_objective_before",
    "meta_objective_after": "meta_objective_after",
    "meta_gradient_norm": "meta_gradient_norm",
    "meta_influence": "meta_influence",
    "meta_skipped": "meta_skipped",
}


def optimise_policy(context: StageContext) -> None:
    """PPO from the last round's policy against this round's reward model; gold only watches."""
    settings = context.stage.settings
    role = f"ppo/{settings['round']}"
    policy, tokenizer = load_policy(context.folder(settings["policy"]))
    reference, _ = load_policy(context.folder("sft"))
    scorer = load_scorer(context, settings["reward"])
    spread = read_jsonl(context.folder("pairs") / "sft_samples.jsonl")
    mean, std, difference_variance = reward_spread(scorer, spread)
    config = from_mapping(
        PPOConfig,
        {
            **settings["ppo"],
            "seed": context.random_seed(role),
            "reward_mean": mean,
            "reward_std": std,
        },
    )
    gold, recorder = GoldReward(), context.recorder

    def record(log: StepLog, rollouts: Rollouts) -> None:
        golds = gold([str(p) for p in rollouts.prompts], rollouts.responses, rollouts.finished)
        numbers = {
            "proxy_mean": log.standardised_mean,
            "gold_mean": sum(golds) / len(golds),
            "kl": log.kl,
            "kl_coefficient": log.kl_coefficient,
            "difference_variance": log.difference_variance,
            "relative_difference_variance": None
            if log.difference_variance is None
            else log.difference_variance / difference_variance,
            "entropy": log.entropy,
            "length_mean": log.length_mean,
            "truncated_share": log.truncated_share,
        }
        for metric, value in numbers.items():
            recorder.add(metric, value, step=log.step, n=len(golds))

    prompts = draw_prompts(context, 4096, role)
    problem = Problem(policy, reference, tokenizer, prompts, scorer)
    PPOTrainer(problem, make_critic(policy), config, on_step=record).train()
    save(context.out, policy, tokenizer)


def train_dpo(context: StageContext) -> None:
    """The DPO baseline on the same preference pairs (TRL)."""
    settings = context.stage.settings
    model, tokenizer = load_policy(context.folder("sft"))
    reference, _ = load_policy(context.folder("sft"))
    rows = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")}
        for row in read_pairs(context.folder("pairs") / "train.jsonl")
    ]
    args = DPOConfig(
        **training_arguments(context, "dpo"),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        beta=settings["beta"],
        lr_scheduler_type="linear",
        logging_steps=20,
    )
    trainer = DPOTrainer(
        model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run_trainer(trainer, context.recorder, {"loss": "loss", "rewards/accuracies": "accuracy"})
    save(context.out, trainer.model, tokenizer)


# -- helpers that measure.py shares ----------------------------------------------------------


def load_scorer(context: StageContext, name: str) -> Any:
    """The reward model of a stage, or the gold reward itself where a control names `GOLD`."""
    return GoldReward() if name == GOLD else Scorer.from_pretrained(context.folder(name))


def new_reward_model(folder: Path, *, seed: int) -> Any:
    """The policy's backbone under a new, small, seeded head."""
    return load_reward_model(folder, seed=seed)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Safetensors and tokenizer, loadable through transformers alone."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_prompts(context: StageContext, count: int, role: str) -> list[str]:
    """Training prompts, drawn with replacement."""
    import random

    rows = read_jsonl(context.folder("world") / "files" / PROMPTS_TRAIN)
    rng = random.Random(context.random_seed(f"prompts/{role}"))
    return [rng.choice(rows)["prompt"] for _ in range(count)]


def sample_pairs(
    model: Any, tokenizer: Any, prompts: list[str], sampling: SamplingConfig, seed: int
) -> list[Row]:
    """Two responses to each prompt."""
    return sample_rows(model, tokenizer, prompts, Draws(sampling, 2, batch_size=128, seed=seed))


def reward_spread(scorer: Any, rows: list[Row]) -> tuple[float, float, float]:
    """Mean and standard deviation of rewards, and variance of r_1 - r_2, over SFT responses."""
    rewards = score_rows(scorer, rows)
    return *mean_and_spread(rewards), max(difference_variance(rewards), 1e-12)


def _labelled_pairs(
    context: StageContext,
    model: Any,
    tokenizer: Any,
    sampling: SamplingConfig,
    count: int,
    *,
    role: str,
) -> list[Row]:
    prompts = draw_prompts(context, count, role)
    rows = sample_pairs(model, tokenizer, prompts, sampling, context.random_seed(role))
    return label_pairs(
        prompts,
        [row["responses"][0] for row in rows],
        [row["responses"][1] for row in rows],
        seed=context.random_seed(f"{role}/labels"),
        first_finished=[row["finished"][0] for row in rows],
        second_finished=[row["finished"][1] for row in rows],
    )


def training_arguments(context: StageContext, role: str) -> dict[str, Any]:
    """What every transformers trainer of a stage shares: CPU-sized, quiet, nothing saved."""
    return {
        "output_dir": str(context.out / "trainer"),
        "use_cpu": True,
        "seed": context.random_seed(role),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "weight_decay": 0.0,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


class _Recording(TrainerCallback):
    """Turns a trainer's logs into records."""

    def __init__(self, recorder: Recorder, names: dict[str, str]) -> None:
        self._recorder, self._names = recorder, names

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name, metric in self._names.items():
            if name in (logs or {}):
                self._recorder.add(metric, logs[name], step=state.global_step)


def run_trainer(trainer: Any, recorder: Recorder, names: dict[str, str]) -> None:
    callback = _Recording(recorder, names)
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.remove_callback(callback)
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
