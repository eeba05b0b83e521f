"""What each stage of a run over the gold world's domains does: thin code around the trainers.

Budgets. Whatever learns from preference pairs (meta-training, Bradley-Terry on pooled pairs or on a
target's own, DPO) takes the same number of updates on the same number of pairs each. Whatever makes
a policy of the reference (fine-tuning, weighted or not, and PPO) takes the same number of updates
of the same number of sequences. DPO takes none of the latter: it has no use for a domain without
pairs.
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, SFTConfig, SFTTrainer

from shiftrm.config import from_mapping
from shiftrm.data.domains import Domain, DomainSplit, load_split, split_domains
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.models.loading import load_reward_model
from shiftrm.models.rendering import encode, encode_prompt
from shiftrm.models.sampling import load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.oodpl.fine_tuning import FineTuningConfig, FineTuningLog
from shiftrm.oodpl.meta_test import (
    EvaluationConfig,
    evaluate_policy,
    guide_by_ppo,
    guide_by_weights,
)
from shiftrm.oodpl.trainer import OODPLConfig, OODPLTrainer
from shiftrm.pipeline.domain_plan import sources, targets
from shiftrm.pipeline.engine import StageContext
from shiftrm.policies.ppo import RewardFunction, StepLog
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Recorder
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.world.build import BASE_MODEL, SFT
from shiftrm.world.build_domains import DOMAINS, DomainWorldConfig, read_table, write_domain_world
from shiftrm.world.domain_gold import gold_of

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "chosen_finished", "rejected_finished")

META_METRICS = (
    "loss",
    "accuracy",
    "hypergradient_norm",
    "effective_sample_share",
    "reward_mean",
    "reward_std",
    "eval_accuracy",
    "eval_loss",
    "eval_reference_accuracy",
)


def make_world(context: StageContext) -> None:
    """The language, the base model and 16 domains as files; seeded by the run."""
    settings = {**context.stage.settings["world"], "seed": context.seed}
    write_domain_world(context.out / "files", DomainWorldConfig(**settings))


def meta_train(context: StageContext) -> None:
    """OODPL on the sources. A_PL on the targets is watched, and decides nothing."""
    settings = context.stage.settings
    split = _split(context)
    steps = settings["outer_steps"]
    options = {
        key: value
        for key, value in settings.items()
        if key not in ("search", "outer_steps", "evaluations")
    }
    every = max(1, steps // settings["evaluations"])
    args = OODPLConfig(
        **{
            k: v
            for k, v in training_arguments(context, "meta").items()
            if k != "activation_checkpointing"
        },
        **options,
        max_steps=steps,
        lr_scheduler_type="linear",
        logging_steps=max(1, steps // 40),
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(context.folder("sft"))
    policy, _ = load_policy(context.folder("sft"))
    trainer = OODPLTrainer(
        # The head's draws are those of the pooled model: both start from the same weights.
        new_reward_model(context.folder("sft"), seed=context.random_seed("reward")),
        policy,
        args,
        split=replace(split, validation=split.held_out),
        processing_class=tokenizer,
        policy_processing_class=tokenizer,
    )
    names = {name: name for name in META_METRICS}
    for domain in split.held_out:
        for what in ("accuracy", "reference_accuracy"):
            names[f"eval_{domain.name}_{what}"] = f"eval_{domain.name}_{what}"
    run_trainer(trainer, context.recorder, names)
    save(context.out, trainer.model, tokenizer)


def train_on_pairs(context: StageContext) -> None:
    """Bradley-Terry: on the sources' pairs pooled, or on a target's own (the oracle)."""
    settings = context.stage.settings
    split = _split(context)
    target = settings.get("target")
    learnt = [d for d in split.held_out if d.name == target] if target else split.source
    rows = [_pair(row) for domain in learnt for row in domain.query]
    tokenizer = AutoTokenizer.from_pretrained(context.folder("sft"))
    args = RewardConfig(
        **training_arguments(context, "pairs"),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["pairs"],
        per_device_eval_batch_size=128,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        logging_steps=max(1, settings["steps"] // 20),
        max_length=None,
    )
    heldout = {d.name: Dataset.from_list([_pair(r) for r in d.eval_pairs]) for d in split.held_out}
    trainer = RewardTrainer(
        new_reward_model(context.folder("sft"), seed=context.random_seed("reward")),
        args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    run_trainer(trainer, context.recorder, {"loss": "loss", "accuracy": "accuracy"})
    for name in heldout:
        if target in (None, name):
            found = trainer.evaluate(heldout[name], metric_key_prefix="eval")
            context.recorder.add(f"pair_accuracy_{name}", found["eval_accuracy"])
    save(context.out, trainer.model, tokenizer)


def train_dpo(context: StageContext) -> None:
    """DPO on the sources' pairs (TRL); the policy then answers in domains it has no pairs of."""
    settings = context.stage.settings
    model, tokenizer = load_policy(context.folder("sft"))
    reference, _ = load_policy(context.folder("sft"))
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for domain in _split(context).source
        for row in domain.query
    ]
    args = DPOConfig(
        **training_arguments(context, "pairs"),  # in the order of the pooled reward model
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["pairs"],
        learning_rate=settings["learning_rate"],
        beta=settings["beta"],
        lr_scheduler_type="linear",
        logging_steps=max(1, settings["steps"] // 20),
    )
    trainer = DPOTrainer(
        model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run_trainer(trainer, context.recorder, {"loss": "loss", "rewards/accuracies": "accuracy"})
    save(context.out, trainer.model, tokenizer)


def make_policies(context: StageContext) -> None:
    """A policy for every target by one method, measured with the gold reward; none is kept.

    Gold only watches: no method reads it.
    """
    settings = context.stage.settings
    reference, tokenizer = load_policy(context.folder("sft"))
    table = read_table(context.root / "world" / "files")
    evaluation = from_mapping(
        EvaluationConfig,
        {**settings["evaluation"], "seed": context.random_seed("evaluation")},
    )
    for domain in _split(context).held_out:
        recorder = Recorder(
            stage=f"evaluate/{domain.name}", method=settings["method"], round=0, seed=context.seed
        )
        proxy = _reward_model(context, domain)
        policy = _make_policy(context, reference, tokenizer, domain, proxy, recorder)
        found = evaluate_policy(
            policy,
            reference,
            tokenizer,
            domain,
            evaluation,
            judge=_gold(domain.name, table),
            proxy=proxy,
        )
        for name, value in found.numbers.items():
            of_pairs = name.startswith(("accuracy", "pl_loss"))
            metric = "gold_mean" if name == "judged" else name
            recorder.add(metric, value, n=found.pairs if of_pairs else found.responses)
        context.recorder.records += recorder.records
        write_jsonl(context.out / f"{domain.name}.jsonl", found.rows)


def _make_policy(
    context: StageContext,
    reference: Any,
    tokenizer: Any,
    domain: Domain,
    proxy: RewardFunction | None,
    recorder: Recorder,
) -> Any:
    """The method's policy for one target."""
    settings = context.stage.settings
    if settings["method"] == "reference":
        return reference
    if settings["method"] == "dpo":
        return load_policy(context.folder("dpo"))[0]
    policy = copy.deepcopy(reference)
    seed = context.random_seed(f"policy/{domain.name}")
    if "ppo" in settings and proxy is not None:

        def note(log: StepLog) -> None:
            recorder.add("ppo_kl", log.kl, step=log.step)
            recorder.add("ppo_score", log.standardised_mean, step=log.step)

        config = from_mapping(PPOConfig, {**settings["ppo"], "seed": seed})
        guide_by_ppo(policy, reference, tokenizer, domain, config, reward_fn=proxy, on_step=note)
    else:
        shares: list[FineTuningLog] = []
        tuning = from_mapping(FineTuningConfig, {**settings["policy"], "seed": seed})
        guide_by_weights(policy, tokenizer, domain, tuning, reward_fn=proxy, on_step=shares.append)
        recorder.add(
            "effective_sample_share", sum(s.effective_sample_share for s in shares) / len(shares)
        )
    return policy


def _reward_model(context: StageContext, domain: Domain) -> RewardFunction | None:
    model = context.stage.settings["model"]
    if model is None or model == "dpo":
        return None
    name = f"oracle/{domain.name}" if model == "oracle" else model
    return Scorer.from_pretrained(context.folder(name))


def _gold(domain: str, table: Any) -> RewardFunction:
    one = gold_of(domain, table)

    def reward(prompts: Any, responses: Any, *, finished: Any) -> list[float]:
        return [one(p, r, finished=f) for p, r, f in zip(prompts, responses, finished, strict=True)]

    return reward


def _split(context: StageContext) -> DomainSplit:
    """Sources and targets; the targets are the split's held-out domains."""
    search = context.stage.settings["search"]
    folder: Path = context.folder("world") / "files" / DOMAINS
    whole = load_split(folder)
    return split_domains(whole.all, source=sources(search=search), held_out=targets(search=search))


def _pair(row: Row) -> Row:
    return {key: row[key] for key in PAIR_COLUMNS}


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


def new_reward_model(folder: Path, *, seed: int) -> Any:
    """The policy's backbone under a new, small, seeded head."""
    return load_reward_model(folder, seed=seed)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Safetensors and tokenizer, loadable through transformers alone."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
