"""The trainings of test_distributed.py: in one process, or in each of several.

`python distributed_run.py FOLDER RESULT` is what the launchers start; with `cuda` behind it, on one
process with a GPU. Every case has the same global batches whatever the number of processes.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from shiftrm.models.rewards import sequence_rewards
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer, MetaStepState
from shiftrm.trainers.reward import RewardConfig, RewardTrainer
from shiftrm.trainers.sharding import reshard, whole

COMMON = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.2,  # below most steps' norm
    "logging_steps": 1,
    "eval_strategy": "steps",  # passes without gradients in between
    "eval_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
LOGGED = ["loss", "accuracy", "num_tokens"]
LOGGED += ["meta_objective", "meta_objective_after", "meta_gradient_norm", "grad_norm", "eval_loss"]
META = {"meta_batch_size": 3}  # does not divide among two processes
CASES = {
    # pairs in a micro-batch over all processes, and the configuration
    "reward": (4, {}),
    "scale_free": (4, {**META, "preset": "scale_free", "meta_learning_rate": 0.2}),
    # One group a micro-batch and process: the process with one group fewer runs an empty pass.
    "adaptive": (
        2,
        {
            **META,
            "preset": "adaptive",
            "optim": "adamw_torch",
            "learning_rate": 0.002,
            "meta_learning_rate": 0.01,
            "save_strategy": "steps",
            "save_steps": 3,
        },
    ),
    # At the end a further step, whose loss is that of the first pairs.
    "by_effect": (4, {**META, "preset": "by_effect"}),
    # Under FSDP2 by differences, whose error is no rounding any more; elsewhere exact.
    "second_order": (
        4,
        {**META, "preset": "scale_free", "meta_learning_rate": 0.2, "meta_order": "exact"},
    ),
    "midpoint": (
        4,
        {**META, "preset": "scale_free", "meta_learning_rate": 0.2, "meta_shift": "midpoint"},
    ),
    # 13 pairs, 8 a step: the second step has 5, and at last one process only what fills a batch up.
    "uneven": (
        4,
        {
            **META,
            "preset": "scale_free",
            "meta_learning_rate": 0.2,
            "max_steps": 4,
            "center_rewards_coefficient": 0.1,
        },
    ),
    # It cannot share prefixes, which is found out by a pass that fails halfway.
    "encoder": (4, {"max_steps": 2}),
    "lora": (
        4,
        {
            **META,
            "meta_learning_rate": 1.0,
            "gradient_checkpointing": True,
        },
    ),
}


def write_inputs(folder, reward_model, tokenizer, pairs, groups):
    """Write what every case reads: a model with its tokenizer, and rows."""
    reward_model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save({"pairs": [*pairs, *pairs[:4]], "groups": groups}, folder / "data.pt")


class Watch(TrainerCallback):
    """Notes how the parameters lie on this process after each step."""

    def __init__(self):
        self.sharded = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        reshard(model)
        parameters = list(model.parameters())
        here = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        share = here / sum(p.numel() for p in parameters)
        self.sharded.append((all(isinstance(p, DTensor) for p in parameters), share))


def train(folder, output, case, *, processes, dtype=torch.float64, **options):
    """Train one case; its trainer and what it left, the same on every process.

    `options` go over the case's configuration.
    """
    batch, config = CASES[case]
    config = {**COMMON, "per_device_train_batch_size": batch // processes, **config, **options}
    config["per_device_eval_batch_size"] = 1
    data = torch.load(folder / "data.pt")
    pairs = data["pairs"][: 13 if case == "uneven" else None]
    watch = Watch()
    arguments = {
        "train_dataset": Dataset.from_list(pairs),
        "eval_dataset": Dataset.from_list(data["pairs"][:4]),
        "processing_class": AutoTokenizer.from_pretrained(folder / "model"),
        "callbacks": [watch],
    }
    if case == "lora":
        arguments["peft_config"] = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    name = "encoder" if case == "encoder" else "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder / name, dtype=dtype)
    resume = config.pop("resume_from_checkpoint", None)
    if case in ("reward", "encoder"):
        trainer = RewardTrainer(model, RewardConfig(str(output / case), **config), **arguments)
    else:
        args = MetaRMConfig(str(output / case), **config)
        trainer = MetaRMTrainer(model, args, **arguments, meta_dataset=data["groups"])
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: whole(p).detach().cpu() for n, p in trainer.model.named_parameters()}
    left = {
        "sharing": trainer._sharing,
        "in_shards": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": {name: weight.clone() for name, weight in weights.items()},
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": watch.sharded,
        "processes": trainer.accelerator.num_processes,
    }
    for key in (*LOGGED, "meta_influence"):
        left[key] = [float(log[key]) for log in trainer.state.log_history if key in log]
    return trainer, left


def seen_by_a_forward_pass(trainer):
    """Rewards at theta, at theta' and at theta again, by passes without gradients only."""
    ids = torch.tensor([[1, 5, 9, 2]])
    values = []

    def look():
        with torch.no_grad():
            values.append(float(sequence_rewards(trainer.model, ids, torch.ones_like(ids))))

    trainer.model.eval()
    look()
    ones = [torch.ones_like(p) for p in trainer._trainable()]
    trainer._step_state = MetaStepState(
        ones, trainer.args.meta_learning_rate, None, skipped=False, change=[]
    )
    trainer._look_ahead(trainer.model_wrapped)
    look()
    trainer._end_step()
    look()
    return values


def run(folder, output, *, processes):
    """Every case, by name; what is saved lies in `output`."""
    results = {}
    for case in CASES:
        if case == "encoder" and "ACCELERATE_USE_FSDP" in os.environ:
            continue  # see main
        trainer, results[case] = train(folder, output, case, processes=processes)
        if case in ("scale_free", "lora"):
            trainer.save_model(str(output / f"{case}-saved"))
        if case == "scale_free":
            results[case]["seen"] = seen_by_a_forward_pass(trainer)
    half = {"bf16": True, "dtype": torch.float32}
    _, results["bf16"] = train(folder, output, "scale_free", processes=processes, **half)
    checkpoint = str(output / "adaptive" / "checkpoint-3")
    _, results["resumed"] = train(
        folder, output, "adaptive", processes=processes, resume_from_checkpoint=checkpoint
    )
    return results


def on_one_gpu(folder: Path, output: Path) -> None:
    results = {
        case: train(folder, output, case, processes=1, use_cpu=False)[1]
        for case in ("reward", "scale_free")
    }
    torch.save(results, output / "results.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    results = run(folder, output, processes=2)
    if "ACCELERATE_USE_FSDP" not in os.environ:  # FSDP2 asked for by the training arguments
        options = {"fsdp": True, "fsdp_config": {"version": 2}, "processes": 2}
        there = output / "arguments"
        _, results["arguments"] = train(folder, there, "adaptive", **options)
        options["resume_from_checkpoint"] = str(there / "adaptive" / "checkpoint-3")
        _, results["arguments_resumed"] = train(folder, there, "adaptive", **options)
        # BERT's _no_split_modules name its embeddings, which accelerate then shards twice.
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
        options = {"fsdp": True, "fsdp_config": layers, "processes": 2}
        _, results["arguments_encoder"] = train(folder, there, "encoder", **options)
    if torch.distributed.get_rank() == 0:
        torch.save(results, output / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    start = on_one_gpu if sys.argv[3:] == ["cuda"] else main
    start(Path(sys.argv[1]), Path(sys.argv[2]))
