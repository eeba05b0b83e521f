"""One MetaRM training for test_distributed.py, alone or under torch.distributed.run."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer


def main(folder: Path, result: Path, per_device: int) -> None:
    torch.set_num_threads(1)
    data = json.loads((folder / "data.json").read_text())
    args = MetaRMConfig(
        str(result.with_suffix("")),
        preset="scale_free",
        meta_learning_rate=0.2,
        meta_batch_size=3,  # does not divide among two processes
        max_steps=5,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
    )
    trainer = MetaRMTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype="float64"),
        args,
        train_dataset=Dataset.from_list(data["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        meta_dataset=data["groups"],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "meta_objective" in log]
        weights = {k: v.tolist() for k, v in trainer.model.named_parameters()}
        result.write_text(
            json.dumps(
                {
                    "processes": trainer.accelerator.num_processes,
                    "weights": weights,
                    "objective": [log["meta_objective"] for log in logs],
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
