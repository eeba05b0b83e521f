"""Time and memory of one PPO step without its sampling, at the shape of SmolLM2-135M.

    python benchmarks/ppo_step.py --against PATH-OF-ANOTHER-CHECKOUT
    python benchmarks/ppo_step.py --prompt 35-257 --response 48 --prompts 4 --rollouts 4
    python benchmarks/ppo_step.py --grpo                         # beside TRL's GRPO, without critic
    python benchmarks/ppo_step.py --device cuda --prompt 512 --response 512 --prompts 2 --bf16

Random weights and random roll-outs; log-probabilities, values, KL and entropy before the update,
then one epoch of updates of policy and critic. The optimizers' own steps are left out. Every
repetition is a process of its own, and the arms take turns; the table has medians and, where there
is a second arm, the median of the ratios within a turn. A second is a CPU second, or with `--device
cuda` one between events. Memory is the largest resident set (on a GPU: allocated) during the step,
less what was held before it (the models, without gradients).

TRL's step is one of its `GRPOTrainer` on the same roll-outs, models and rewards: log-probabilities
of the reference, then one optimizer step per minibatch, with the KL penalty and no critic.
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

from process_memory import peak_bytes, resident_bytes, restart_peak
from reward_step import MODELS, environment

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
    parser.add_argument("--grpo", action="store_true", help="a second arm, TRL's GRPO")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bf16", action="store_true", help="passes in bf16 on fp32 weights")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return 0
    here = HERE.parents[1]
    arms = {"PPO": (here, "ppo")}
    if args.against is not None:
        arms[f"PPO of {args.against.name}"] = (args.against.resolve(), "ppo")
    if args.grpo:
        arms["TRL's GRPO"] = (here, "grpo")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(args.repeat):
        for name, (root, which) in arms.items():
            found[name].append(child(root, which))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = {**environment(), "command": " ".join(sys.argv)}
        args.output.write_text(json.dumps({**about, "arms": found}, indent=1))
    print("\n".join(table(found)))
    return 0


def child(root: Path, which: str) -> dict[str, float]:
    """Measure once in a new process that imports the library of a checkout."""
    places = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), *sys.argv[1:], "--child", which]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    shown = ("value_loss", "gradient_norm", "kl")
    lines = [
        "| | seconds (min-max) | this / first | memory, MiB | value loss | gradient norm | KL |",
        "|---|" + "-:|" * 6,
    ]
    first = next(iter(found.values()))
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        pairs = zip(seconds, (run["seconds"] for run in first), strict=True)
        numbers = [f"{runs[0][key]:.6f}" if key in runs[0] else "-" for key in shown]
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            f" | {statistics.median(a / b for a, b in pairs):.2f}"
            f" | {statistics.median(run['mebibytes'] for run in runs):.0f}"
            f" | {' | '.join(numbers)} |"
        )
    return lines


class Meter:
    """Seconds and memory from its start on, of this process or of its GPU."""

    def __init__(self, device: str):
        import torch

        self.cuda = torch.cuda if device == "cuda" else None
        if self.cuda is None:
            restart_peak()
            self.held, self.start = resident_bytes(), time.process_time()
        else:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()
            self.held = self.cuda.memory_allocated()
            self.begin, self.end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.begin.record()

    def read(self) -> dict[str, float]:
        if self.cuda is None:
            seconds = time.process_time() - self.start
            return {"seconds": seconds, "mebibytes": (peak_bytes() - self.held) / 2**20}
        self.end.record()
        self.cuda.synchronize()
        peak = self.cuda.max_memory_allocated() - self.held
        return {
            "seconds": self.begin.elapsed_time(self.end) / 1000,
            "mebibytes": peak / 2**20,
        }


def measure_ppo(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds, memory and the statistics of one step in this process."""
    import torch

    torch.set_num_threads(1)
    trainer = make_trainer(args)
    trainer._sample = lambda step: rollouts(args)
    for optimizer in trainer._updater.optimizers.values():
        optimizer.step = lambda *given: None
    if args.device == "cuda":
        trainer.step(1)  # kernels are chosen and loaded
    meter = Meter(args.device)
    log, _ = trainer.step(1)
    return {
        **meter.read(),
        **{name: getattr(log, name) for name in ("policy_loss", "value_loss")},
        **{name: getattr(log, name) for name in ("gradient_norm", "kl", "entropy")},
    }


def measure_grpo(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds and memory of one step of TRL's `GRPOTrainer` on the same roll-outs."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    given = rollouts(args)
    meters: list[Meter] = []
    found: list[dict[str, float]] = []
    generations = 2 if args.device == "cuda" else 1  # as above, the last one counts

    def answer(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        meters.append(Meter(args.device))
        return {
            "prompt_ids": [sample.prompt_ids for sample in given.samples],
            "completion_ids": [sample.response_ids for sample in given.samples],
            "logprobs": None,
        }

    updates = -(-len(given.samples) // args.minibatch)

    class Read(TrainerCallback):
        def on_step_end(self, args_: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == generations * updates:
                found.append(meters[-1].read())

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, config = toy_tokenizer(), model_config(args)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)  # TRL loads the reference from there
        tokenizer.save_pretrained(folder)
        micro = args.micro or args.minibatch
        settings = GRPOConfig(
            output_dir=f"{folder}/out",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.minibatch // micro,
            generation_batch_size=len(given.samples),
            num_generations=args.rollouts,
            max_steps=generations * updates,
            beta=0.05,
            learning_rate=5e-7,
            gradient_checkpointing=False,
            bf16=args.bf16,
            use_cpu=args.device == "cpu",
            model_init_kwargs={"dtype": "float32"},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            folder,
            reward_funcs=lambda completions, **kwargs: given.rewards,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * args.prompts),
            processing_class=tokenizer,
            rollout_func=answer,
            callbacks=[Read()],
        )
        trainer.create_optimizer()
        trainer.optimizer.step = lambda *given, **named: None
        trainer.train()
    return found[0]


CHILDREN = {"ppo": measure_ppo, "grpo": measure_grpo}


def model_config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    sizes = {**SMOLLM2, "vocab_size": args.vocabulary, "num_hidden_layers": args.layers}
    return LlamaConfig(**sizes)


def toy_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        eos_token="a",
        pad_token="a",
    )


def make_trainer(args: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from shiftrm.models.sampling import SamplingConfig
    from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic

    torch.manual_seed(0)
    config = model_config(args)
    with torch.device(args.device):
        policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False)
        critic = make_critic(policy)
    torch.nn.init.normal_(critic.score.weight, std=0.02)
    settings = PPOConfig(
        steps=1,
        bf16=args.bf16,
        prompts_per_step=args.prompts,
        rollouts_per_prompt=args.rollouts,
        minibatch_size=args.minibatch,
        micro_batch_size=args.micro,
        sampling=SamplingConfig(max_new_tokens=64),
    )
    problem = Problem(policy, reference, toy_tokenizer(), ["a"], lambda *texts, finished: [])
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
