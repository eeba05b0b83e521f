"""CPU time and memory of one PPO step without its sampling, at the shape of SmolLM2-135M.

    python benchmarks/ppo_step.py --against PATH-OF-ANOTHER-CHECKOUT
    python benchmarks/ppo_step.py --prompt 35-257 --response 48 --prompts 4 --rollouts 4

Random weights and random roll-outs; log-probabilities, values, KL and entropy before the update,
then one epoch of updates of policy and critic. The optimizers' own steps are left out. Every
repetition is a process of its own, in turn from this checkout and from the other one; the table
has medians. Memory is the largest resident set during the step, less what was resident before it
(the models, without gradients).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reward_step import MODELS

SMOLLM2 = {
    **MODELS["smollm2-135m"],
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HERE = Path(__file__).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="250", metavar="N|LOW-HIGH", help="tokens of a prompt")
    parser.add_argument("--response", default="50", metavar="N|LOW-HIGH", help="of a response")
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="of the step")
    parser.add_argument("--rollouts", type=int, default=16, metavar="N", help="of each prompt")
    parser.add_argument("--minibatch", type=int, default=16, metavar="N", help="rows")
    parser.add_argument("--micro", type=int, metavar="N", help="rows of a backward pass")
    parser.add_argument("--layers", type=int, default=30, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=49_152, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return 0
    checkouts = {"this checkout": HERE.parents[1]}
    if args.against is not None:
        checkouts[f"against {args.against.name}"] = args.against.resolve()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(args.repeat):
        for name, root in checkouts.items():
            found[name].append(child(root))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    return 0


def child(root: Path) -> dict[str, float]:
    """Measure once in a new process that imports the library of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), *sys.argv[1:], "--child"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| | CPU seconds | memory, MiB | value loss | gradient norm | KL |",
        "|---|" + "-:|" * 5,
    ]
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"| {name} | {middle['seconds']:.1f} | {middle['mebibytes']:.0f} | "
            f"{middle['value_loss']:.6f} | {middle['gradient_norm']:.6f} | {middle['kl']:.6f} |"
        )
    return lines


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds, memory and the statistics of one step in this process."""
    import torch

    torch.set_num_threads(1)
    trainer = make_trainer(args)
    trainer._sample = lambda step: rollouts(args)
    for optimizer in trainer._updater.optimizers.values():
        optimizer.step = lambda *given: None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident("VmRSS"), time.process_time()
    log, _ = trainer.step(1)
    return {
        "seconds": time.process_time() - start,
        "mebibytes": (resident("VmHWM") - before) / 1024,
        **{name: getattr(log, name) for name in ("policy_loss", "value_loss")},
        **{name: getattr(log, name) for name in ("gradient_norm", "kl", "entropy")},
    }


def resident(name: str) -> int:
    """Return a line of the process's memory, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def make_trainer(args: argparse.Namespace) -> Any:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shiftrm.models.sampling import SamplingConfig
    from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic

    torch.manual_seed(0)
    sizes = {**SMOLLM2, "vocab_size": args.vocabulary, "num_hidden_layers": args.layers}
    config = LlamaConfig(**sizes)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False)
    critic = make_critic(policy)
    torch.nn.init.normal_(critic.score.weight, std=0.02)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        eos_token="a",
        pad_token="a",
    )
    settings = PPOConfig(
        steps=1,
        prompts_per_step=args.prompts,
        rollouts_per_prompt=args.rollouts,
        minibatch_size=args.minibatch,
        micro_batch_size=args.micro,
        sampling=SamplingConfig(max_new_tokens=64),
    )
    problem = Problem(policy, reference, tokenizer, ["a"], lambda *texts, finished: [])
    return PPOTrainer(problem, critic, settings)


def rollouts(args: argparse.Namespace) -> Any:
    """Return random roll-outs, those of one prompt next to each other."""
    from shiftrm.models.sampling import Sample
    from shiftrm.policies.ppo import Rollouts

    rng = random.Random(0)

    def tokens(length: str) -> list[int]:
        low, _, high = length.partition("-")
        return [
            rng.randrange(1, args.vocabulary)
            for _ in range(rng.randint(int(low), int(high or low)))
        ]

    samples = []
    for _ in range(args.prompts):
        prompt = tokens(args.prompt)
        samples += [Sample(prompt, tokens(args.response), True) for _ in range(args.rollouts)]
    count = len(samples)
    rewards = [rng.gauss(0, 1) for _ in samples]
    return Rollouts(["a"] * count, ["a"] * count, [True] * count, rewards, samples, "", [])


if __name__ == "__main__":
    sys.exit(main())
