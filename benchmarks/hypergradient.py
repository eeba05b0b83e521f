"""Time and peak memory of the hypergradient, against autograd through the unroll and TorchOpt.

    python benchmarks/hypergradient.py --output runs/hypergradient.json

Every measurement is a process of its own: it builds the same two models and batches from the seed,
takes one hypergradient with D = 1 to warm up, and measures one with D steps. Methods alternate
within a repetition. Reported are the median time and the largest peak of memory above what the
process held just before. Peers are optional: `pip install torchopt` (and `higher`); without them
they are left out.

    exact, finite_difference, none   shiftrm.core.hypergradient with that curvature
    unroll                           torch.func.functional_call and create_graph=True
    torchopt                         torchopt.MetaSGD
    higher                           higher.innerloop_ctx (unmaintained)
    step                             an ordinary training step, for scale: one forward and backward
                                     pass of the policy on an inner batch, of the reward model on
                                     the same tokens, and of the policy on the outer batch
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import process_memory

METHODS = ("exact", "finite_difference", "none", "unroll", "torchopt", "higher", "step")
PEERS = ("unroll", "torchopt", "higher")
ALPHA, BETA = 0.02, 1.0


def main() -> int:
    args = parse()
    if args.child:
        print(json.dumps(measure(args)))
        return 0
    methods = [m for m in args.methods if m not in ("torchopt", "higher") or installed(m)]
    for missing in sorted(set(args.methods) - set(methods)):
        print(f"{missing} is left out; to compare with it: pip install {missing}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for repetition in range(args.repeats):
        for D in args.steps:
            for method in methods:
                if method == "step" and args.steps[0] != D:
                    continue
                row = run_child(method, D)
                rows.append({**row, "method": method, "D": D, "repetition": repetition})
                print(summary(rows[-1]), file=sys.stderr, flush=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(args.threads),
        "options": {k: v for k, v in vars(args).items() if k not in ("child", "output")},
        "rows": rows,
    }
    if args.output:
        from shiftrm.files import atomic_write_text

        atomic_write_text(args.output, json.dumps(report, indent=1, default=str) + "\n")
    print(markdown(report))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="D")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="rows a step, and pairs")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of these in the prompt")
    parser.add_argument(
        "--lengths",
        choices=("varied", "equal"),
        default="varied",
        help="varied: as in real data, padded to the longest; ours skips padding in micro-batches",
    )
    parser.add_argument("--micro-batch-size", type=int, default=8, metavar="N", help="ours only")
    parser.add_argument("--curvature-micro-batch-size", type=int, metavar="N", help="ours only")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="which time to report; cpu (of all threads) is fairer on a busy machine",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of all measurements")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_child(method: str, D: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", "--methods", method]
    done = subprocess.run(
        [*command, "--steps", str(D)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


# What one process does.


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    [method], [D] = args.methods, args.steps
    policy, reward_model = build(args)
    function = METHOD_FUNCTIONS.get(method, ours)
    function(policy, reward_model, *batches(args, 1, seed=1), args)  # warm-up
    inner, outer = batches(args, D, seed=2)
    gc.collect()
    before = reset_peak(args.device)
    start, cpu = time.perf_counter(), time.process_time()
    gradients = function(policy, reward_model, inner, outer, args)
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    parameters = sum(p.numel() * p.element_size() for p in policy.parameters())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": (peak_bytes(args.device) - before) / 2**20,
        # Ours keeps theta_0..theta_{D-1}.
        "trajectory_mb": D * parameters / 2**20,
        "fingerprint": fingerprint(gradients),
    }


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.width,
        "intermediate_size": 11 * args.width // 4,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 32,
        "num_key_value_heads": args.width // 64,
        "max_position_embeddings": args.tokens,
        "pad_token_id": 0,
    }
    policy = LlamaForCausalLM(LlamaConfig(**config))
    reward_model = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1))
    torch.nn.init.normal_(reward_model.score.weight, std=0.02)
    return policy.to(args.device).eval(), reward_model.to(args.device).eval()


def batches(args: argparse.Namespace, D: int, *, seed: int) -> tuple[Any, Any]:
    """Rows of random lengths from half of `--tokens` up, padded, or of equal length."""
    import torch

    from shiftrm.core.hypergradient import InnerBatch, OuterBatch, Sequences

    generator = torch.Generator().manual_seed(seed)

    def rows() -> Sequences:
        shape = (args.batch, args.tokens)
        ids = torch.randint(1, args.vocabulary, shape, generator=generator).to(args.device)
        real = torch.ones_like(ids)
        if args.lengths == "varied":
            length = torch.randint(
                args.tokens // 2, args.tokens + 1, shape[:1], generator=generator
            )
            length[0] = args.tokens
            real *= torch.arange(args.tokens)[None] < length[:, None]
        real = real.to(args.device)
        response = real.clone()
        response[:, : args.prompt] = 0
        return Sequences(ids, real, response)

    inner = []
    for _ in range(D):
        sequences = rows()
        inner.append(InnerBatch(sequences, sequences.input_ids, sequences.attention_mask))
    return inner, OuterBatch(rows(), rows())


def ours(policy: Any, reward_model: Any, inner: Any, outer: Any, args: Any) -> Any:
    from shiftrm.core.hypergradient import InnerProblem, InnerSettings, hypergradient
    from shiftrm.models.rewards import sequence_rewards

    settings = InnerSettings(
        inner_learning_rate=ALPHA,
        beta=BETA,
        reduction="mean",
        curvature=args.methods[0],
        micro_batch_size=args.micro_batch_size,
        curvature_micro_batch_size=args.curvature_micro_batch_size,
    )
    problem = InnerProblem(policy, reward_model, inner, sequence_rewards)
    return hypergradient(problem, outer, settings).gradients


def log_likelihood(model: Callable[..., Any], batch: Any) -> Any:
    """For the peers; like ours, they compute no logits of the prompt."""
    from shiftrm.core.losses import response_log_likelihood

    keep = int(batch.response_mask.any(dim=0).sum()) + 1
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return response_log_likelihood(
        logits, batch.input_ids[:, -keep:], batch.response_mask[:, -keep:], reduction="mean"
    )


def inner_loss(model: Callable[..., Any], reward_model: Any, batch: Any, *, twice: bool) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from shiftrm.core.losses import reward_weights
    from shiftrm.models.scoring import sequence_rewards

    rewards = sequence_rewards(reward_model, batch.reward_input_ids, batch.reward_attention_mask)
    # Only what is differentiated twice needs math attention.
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
        return -(reward_weights(rewards, beta=BETA) * log_likelihood(model, batch.policy)).mean()


def outer_loss(model: Callable[..., Any], outer: Any) -> Any:
    from shiftrm.core.losses import preference_policy_loss

    sides = (log_likelihood(model, side) for side in outer)
    return preference_policy_loss(*sides).mean()


def unroll(policy: Any, reward_model: Any, inner: Any, outer: Any, args: Any) -> Any:
    import torch
    from torch.func import functional_call

    theta = {n: p.detach().requires_grad_() for n, p in policy.named_parameters()}

    def model(**inputs: Any) -> Any:
        return functional_call(policy, theta, (), inputs)

    for batch in inner:
        loss = inner_loss(model, reward_model, batch, twice=True)
        gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: p - ALPHA * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    return finish(outer_loss(model, outer), reward_model)


def torchopt(policy: Any, reward_model: Any, inner: Any, outer: Any, args: Any) -> Any:
    import torchopt

    start = torchopt.extract_state_dict(policy)
    optimizer = torchopt.MetaSGD(policy, lr=ALPHA)
    for batch in inner:
        optimizer.step(inner_loss(policy, reward_model, batch, twice=True))
    gradients = finish(outer_loss(policy, outer), reward_model)
    torchopt.recover_state_dict(policy, start)
    return gradients


def higher(policy: Any, reward_model: Any, inner: Any, outer: Any, args: Any) -> Any:
    import higher
    import torch

    optimizer = torch.optim.SGD(policy.parameters(), lr=ALPHA)
    with higher.innerloop_ctx(policy, optimizer) as (model, differentiable):
        for batch in inner:
            differentiable.step(inner_loss(model, reward_model, batch, twice=True))
        return finish(outer_loss(model, outer), reward_model)


def finish(loss: Any, reward_model: Any) -> Any:
    import torch

    phi = dict(reward_model.named_parameters())
    gradient = torch.autograd.grad(loss, list(phi.values()), materialize_grads=True)
    return dict(zip(phi, gradient, strict=True))


def step(policy: Any, reward_model: Any, inner: Any, outer: Any, args: Any) -> Any:
    import torch

    loss = inner_loss(policy, reward_model, inner[0], twice=False)
    parameters = [*policy.parameters(), *reward_model.parameters()]
    torch.autograd.grad(loss, parameters)
    torch.autograd.grad(outer_loss(policy, outer), list(policy.parameters()))
    return {}


METHOD_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "unroll": unroll,
    "torchopt": torchopt,
    "higher": higher,
    "step": step,
}


def fingerprint(gradients: Any) -> list[float]:
    """Norm, and products with two fixed random vectors: equal gradients have equal ones."""
    import torch

    if not gradients:
        return []
    flat = torch.cat([g.detach().double().flatten().cpu() for g in gradients.values()])
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, len(flat), generator=generator, dtype=torch.float64)
    return [float(flat.norm()), *(random @ flat).tolist()]


def reset_peak(device: str) -> int:
    """Start measuring the peak; returns the bytes held now."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux, glibc: what the warm-up freed goes back, so that using it again counts.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process_memory.restart_peak()
    return process_memory.resident_bytes()


def peak_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return process_memory.peak_bytes()


# From measurements to a table.


def machine(threads: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "torchopt", "higher")
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "versions": {p: importlib.metadata.version(p) for p in packages if installed(p)},
        "python": platform.python_version(),
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
    }


def summary(row: dict[str, Any]) -> str:
    start = f"{row['method']} D={row['D']}"
    if "error" in row:
        return f"{start}: {row['error']}"
    times = f"{row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of CPU)"
    return f"{start}: {times}, {row['peak_mb']:.0f} MB"


def markdown(report: dict[str, Any]) -> str:
    rows = [r for r in report["rows"] if "error" not in r]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    steps = sorted({r["D"] for r in rows})
    cells = {
        (m, D): [r for r in rows if (r["method"], r["D"]) == (m, D)] for m in methods for D in steps
    }

    def seconds(m: str, D: int) -> float:
        field = "seconds" if report["options"]["clock"] == "wall" else "cpu_seconds"
        return statistics.median(r[field] for r in cells[m, D])

    def peak(m: str, D: int, *, trajectory: bool = True) -> float:
        return max(r["peak_mb"] - (0 if trajectory else r["trajectory_mb"]) for r in cells[m, D])

    lines = ["| method |" + "".join(f" D = {D} |" for D in steps), "|---|" + "---|" * len(steps)]
    for m in methods:
        entries = [
            f"{seconds(m, D):.2f} s, {peak(m, D):.0f} MB" if cells[m, D] else "-" for D in steps
        ]
        lines.append(f"| {m} | " + " | ".join(entries) + " |")
    lines += ["", *goals(methods, steps, cells, seconds, peak)]
    errors = {f"{r['method']}: {r['error']}" for r in report["rows"] if "error" in r}
    lines += [f"- failed: {e}" for e in sorted(errors)]
    about = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    lines += [
        "",
        f"{about['date']}, {about['processor']}, {about['threads']} threads, Python "
        f"{about['python']}, {versions}. `{report['command']}`",
    ]
    return "\n".join(lines)


def goals(methods: Any, steps: Any, cells: Any, seconds: Any, peak: Any) -> list[str]:
    """The comparisons the project set itself, for each of our methods."""
    lines = []
    peers = [m for m in PEERS if m in methods]
    for m in [m for m in methods if m not in (*PEERS, "step")]:
        if {1, 16} <= set(steps):
            ratio = peak(m, 16, trajectory=False) / peak(m, 1, trajectory=False)
            lines.append(f"- {m}: peak at D = 16 is {ratio:.2f} of D = 1, trajectories apart")
        if 8 in steps and any(cells[p, 8] for p in peers):
            fastest = min((p for p in peers if cells[p, 8]), key=lambda p: seconds(p, 8))
            lines.append(
                f"- {m}: at D = 8, {seconds(m, 8) / seconds(fastest, 8):.2f} of the time and "
                f"{peak(m, 8) / peak(fastest, 8):.2f} of the memory of the fastest peer, {fastest}"
            )
        if 1 in steps and "step" in methods:
            lines.append(f"- {m}: D = 1 takes {seconds(m, 1) / seconds('step', 1):.2f} steps")
        if "unroll" in methods:
            errors = [
                abs(a - b) / max(map(abs, o))
                for D in steps
                if cells[m, D] and cells["unroll", D]
                for o in [cells["unroll", D][0]["fingerprint"]]
                for a, b in zip(cells[m, D][0]["fingerprint"], o, strict=True)
            ]
            if errors:
                lines.append(f"- {m}: differs from unroll by at most {max(errors):.1e} (relative)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
