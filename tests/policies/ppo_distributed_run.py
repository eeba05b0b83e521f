"""The PPO runs of test_ppo_distributed.py: in one process, or in each of two.

`python ppo_distributed_run.py FOLDER` is what the launcher starts.
"""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from shiftrm.errors import UserError
from shiftrm.models.sampling import SamplingConfig
from shiftrm.policies import ppo_runtime, ppo_update
from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic
from tests.policies.test_ppo import make_llama, make_tokenizer, share_of_a
from tests.policies.test_ppo_models import with_lora

SETTINGS = {
    "steps": 3,
    "epochs": 2,
    "prompts_per_step": 5,  # chunks, rows and minibatches that do not divide among two
    "rollouts_per_prompt": 3,
    "forward_batch_size": 3,
    "minibatch_size": 7,
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "max_grad_norm": 0.1,
    "kl_target": 1.0,
    "reward_whitening": "batch",
    "save_steps": 1,
}
CASES = {
    "fp64": {},
    "fp32": {},
    "portions": {"micro_batch_size": 2, "gradient_checkpointing": True},
    "idle": {"forward_batch_size": 100, "minibatch_size": 1},  # nothing to sample, nothing to learn
    "lora": {},
    "resumed": {},
}


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


class Killed(Exception):
    pass


def train(name, *, reward_fn=share_of_a, on_step=None, checkpoints=None, **settings):
    """Logs, texts by step where `on_step` is called, and trained weights."""
    dtype = torch.float32 if name == "fp32" else torch.float64
    policy = make_llama().to(dtype)
    reference = None if name == "lora" else make_llama(seed=1).to(dtype)
    policy = with_lora(policy) if name == "lora" else policy
    critic = make_critic(policy, seed=rank())  # the main process's counts
    if rank():
        torch.nn.init.ones_(critic.score.weight)
    texts = []

    def record(log, rollouts):
        texts.append([rollouts.prompts, rollouts.responses, rollouts.rewards])
        if on_step is not None:
            on_step(log)

    problem = Problem(policy, reference, make_tokenizer(), ["go", "on a b", "go on"], reward_fn)
    settings = {**SETTINGS, **CASES[name], **settings}
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=6), **settings)
    trainer = PPOTrainer(problem, critic, config, record, checkpoints)
    logs = trainer.train()
    weights = {
        f"{m}.{n}": p.detach() for m, t in trainer._updater.trained.items() for n, p in t.items()
    }
    return {"logs": [asdict(log) for log in logs], "texts": texts, "weights": weights}


def run(folder):
    results = {}
    for name in CASES:
        if name == "resumed":
            try:
                train(name, on_step=kill_at_2, checkpoints=folder)
            except (Killed, UserError) as error:
                results["killed"] = str(error)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = train(name, checkpoints=folder if name == "resumed" else None)
        results[name]["warnings"] = [str(w.message) for w in caught]
    results["errors"] = failures(folder)
    return results


def kill_at_2(log):
    if log.step == 2:
        raise Killed("on purpose")


def failures(folder):
    """What this process says where one of the two fails."""
    said = {}
    for what in ("reward", "memory", "bug", "disk", "nan"):
        plain_loss, plain_save = ppo_update.clipped_policy_loss, ppo_runtime.save_file

        def reward_fn(prompts, responses, *, finished, what=what):
            if rank() == 1 and what == "reward":
                raise UserError("the reward model has no words for it")
            if rank() == 1 and what == "bug":
                raise KeyError("a bug")
            if rank() == 1 and what == "nan":
                return [float("nan")] * len(responses)
            return share_of_a(prompts, responses, finished=finished)

        def loss(*args, plain=plain_loss, what=what, **options):
            if rank() == 1 and what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(*args, **options)

        def save(*args, plain=plain_save, what=what):
            if what == "disk":
                raise OSError(28, "No space left on device")
            plain(*args)

        ppo_update.clipped_policy_loss, ppo_runtime.save_file = loss, save
        try:
            train("fp64", reward_fn=reward_fn, checkpoints=folder / what)
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"
        finally:
            ppo_update.clipped_policy_loss, ppo_runtime.save_file = plain_loss, plain_save
    return said


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = run(folder)
    torch.save(results, folder / f"results-{rank()}.pt")
    (folder / f"processes-{rank()}.json").write_text(json.dumps(dist.get_world_size()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
