"""The trainings of test_oodpl_distributed.py: in one process, or in each of two.

`python oodpl_distributed_run.py FOLDER RESULT` is what the launcher starts.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from shiftrm.errors import UserError
from shiftrm.oodpl.trainer import OODPLConfig, OODPLTrainer
from tests.oodpl.domains import make_models, make_split

COMMON = {
    "max_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "max_grad_norm": 0.01,
    "inner_learning_rate": 0.05,
    "inner_steps": 2,
    "support_batch_size": 3,
    "query_batch_size": 2,
    "domains_per_step": 3,  # does not divide among two processes
    "log_cosine": True,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_trainer(folder, output, **config):
    policy, reward_model = make_models()
    return OODPLTrainer(
        reward_model,
        policy,
        OODPLConfig(str(output), **{**COMMON, **config}),
        split=make_split(),
        processing_class=AutoTokenizer.from_pretrained(folder),
        policy_processing_class=AutoTokenizer.from_pretrained(folder),
    )


def run(folder, output):
    """Weights and logs, straight and resumed; and what stops a run of bad weights."""
    results = {}
    for name, resume in (("straight", None), ("resumed", str(output / "checkpoint-2"))):
        trainer = make_trainer(folder, output)
        trainer.train(resume_from_checkpoint=resume)
        results[name] = {
            "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
            "logs": [h for h in trainer.state.log_history if "loss" in h or "eval_loss" in h],
            "processes": trainer.accelerator.num_processes,
        }
    trainer = make_trainer(folder, output, beta=1e-4)
    with torch.no_grad():
        trainer.model.score.weight.mul_(100)
    try:
        trainer.train()
    except UserError as error:
        results["error"] = str(error)
    try:
        make_trainer(folder, output, domains_per_step=1)
    except UserError as error:
        results["too_few"] = str(error)
    return results


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    results = run(folder, output)
    if torch.distributed.get_rank() == 0:
        torch.save(results, output / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
