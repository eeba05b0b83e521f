"""How long an optimizer step of reward-model training takes: TRL, a packed peer, ours, and MetaRM.

Each arm is a process of its own with the same model, the same data and the real trainer (the packed
peer is a bare loop, `packed_peer.py`); the arms take turns, one step each, so that a noisy machine
is noisy to all of them. Medians, ratios to the steps of TRL and of the packed peer in the same
round (their median), tokens of the pairs per second, and each process's peak memory. The ceiling is
what sharing prefixes can gain over packing by the number of tokens.

    python benchmarks/reward_step.py                       # `make bench`: three shapes, 2 CPU cores
    python benchmarks/reward_step.py --shapes 350/35 --steps 5
    python benchmarks/reward_step.py --arms packed shiftrm padded unshared   # what packing adds
    python benchmarks/reward_step.py --arms shiftrm checkpointed compiled unshared unshared_compiled
    python benchmarks/reward_step.py --model llama-3-8b --dtype bfloat16 --shapes 350/35   # a GPU
    python benchmarks/reward_step.py --warm-up 0            # the first steps count, too
    python benchmarks/reward_step.py --threads 2 --busy 4   # on a machine that others use as well

The first step of ours compares shared with plain prefixes, once a run; with `--warm-up 0` its cost
is in the totals of `trainer.train()`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

from process_memory import peak_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MODELS = {
    # 14 M parameters, between 10 and 30 M.
    "small": {
        "vocab_size": 8000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SHAPES = {"350/35": "summaries", "150/70": "dialogue", "50/250": "long answers: the worst case"}
WORDS = {
    "trl": "TRL, pairs",
    "packed": "packed peer, pairs",
    "shiftrm": "shiftrm, pairs",
    "metarm": "MetaRM, pairs and groups",
    "padded": "shiftrm, rows padded",
    "unshared": "shiftrm, prefixes not shared",
    "metarm_plain": "MetaRM, prefixes not shared",
    "checkpointed": "shiftrm, activation checkpointing",
    "compiled": "shiftrm, layers compiled",
    "unshared_compiled": "shiftrm, prefixes not shared, layers compiled",
}
USUAL = ("trl", "packed", "shiftrm", "metarm")
PLAIN = ("trl", "unshared", "metarm_plain", "unshared_compiled")
K = 5


def lengths(rng: random.Random, mean: int) -> int:
    """Between 0.6 and 1.4 times the mean."""
    return rng.randint(int(mean * 0.6), int(mean * 1.4))


def make_data(shape: str, batch: int, steps: int, vocabulary: int) -> tuple[list, list]:
    """Pairs and groups of random words, the same for every arm."""
    prompt, response = map(int, shape.split("/"))
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(lengths(rng, mean)))

    pairs, groups = [], []
    for _ in range(batch * steps):
        opening = text(prompt) + " "
        pairs.append({"prompt": opening, "chosen": text(response), "rejected": text(response)})
        opening = text(prompt) + " "
        groups.append({"prompt": opening, "responses": [text(response) for _ in range(K)]})
    return pairs, groups


def make_tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(vocabulary - 3))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def arm_process(arm: str, options: argparse.Namespace, shape: str, link) -> None:
    """One trainer, which waits at the end of every step until it is its turn again."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback
    from trl import RewardTrainer as TRLRewardTrainer

    from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
    from shiftrm.trainers.reward import RewardTrainer

    disable_progress_bars()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = MODELS[options.model]
    if options.layers:
        sizes = {**sizes, "num_hidden_layers": options.layers}
    config = LlamaConfig(
        **sizes, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        num_labels=1,
    )  # fmt: skip
    attention = options.trl_attention if arm in PLAIN else options.attention
    on_gpu = torch.cuda.is_available() and not options.cpu
    dtype = getattr(torch, options.dtype)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForSequenceClassification._from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    model = model.to(dtype)
    if arm.endswith("compiled"):
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    steps = options.warm_up + options.steps
    vocabulary = min(sizes["vocab_size"], 30_000)
    pairs, groups = make_data(shape, options.batch, steps, vocabulary - 3)

    take_turns = turns(link, on_gpu)

    class TakeTurns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            take_turns()

        def on_train_begin(self, args, state, control, **kwargs):
            take_turns()

    settings = {
        "output_dir": str(Path(options.output).parent / "unused"),
        "per_device_train_batch_size": options.batch,
        "max_steps": steps,
        "logging_steps": 10,
        "learning_rate": 1e-5,
        "max_length": None,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and options.dtype == "float32",
        "activation_checkpointing": options.checkpointing or arm == "checkpointed",
        "optim": options.optim,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "preset": "paper",
        "shared_prefixes": arm not in PLAIN,
    }
    set_packing(arm, options)
    cls = TRLRewardTrainer if arm == "trl" else RewardTrainer
    cls = MetaRMTrainer if arm.startswith("metarm") else cls
    trainer = cls(
        model,
        MetaRMConfig(**settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=make_tokenizer(vocabulary),
        callbacks=[TakeTurns()],
        **({"meta_dataset": groups} if cls is MetaRMTrainer else {}),
    )
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback

    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.remove_callback(PrinterCallback)
    link.send("ready")
    if arm == "packed":
        model.to(trainer.args.device)
        loss = [train_packed(trainer, model, options.batch, steps, take_turns)]
    else:
        trainer.train()
        loss = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    tokens = [count_tokens(trainer.train_dataset, options.batch, step) for step in range(steps)]
    assert len(trainer.train_dataset) == options.batch * steps
    link.send(
        {
            "peak": peak,
            "parameters": model.num_parameters(),
            "loss": loss[-1:],
            "tokens": [mine[0] for mine in tokens][options.warm_up :],
            "tokens_shared": [mine[1] for mine in tokens][options.warm_up :],
        }
    )


def turns(link, on_gpu: bool):
    """A function to call before the first step and after every one: reports its times and waits."""
    import torch

    started: list[tuple[float, float]] = []

    def take_turns() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if started:
            link.send([now[0] - started[0][0], now[1] - started[0][1]])
        link.recv()
        started[:] = [(time.perf_counter(), time.process_time())]

    return take_turns


def set_packing(arm: str, options: argparse.Namespace) -> None:
    """Pack the rows of ours whatever the model's size, or none of the arm "padded"."""
    from shiftrm.models import packed

    for device in packed.PACKED_FROM:
        if arm == "padded":
            packed.PACKED_FROM[device] = 10**15
        elif options.pack_all:
            packed.PACKED_FROM[device] = 0


def train_packed(trainer, model, batch: int, steps: int, take_turns) -> float:
    """The packed peer's steps, on the same batches in order of the data."""
    import packed_peer

    rows = trainer.train_dataset.with_format(None)[:]
    pairs = list(zip(rows["chosen_ids"], rows["rejected_ids"], strict=True))
    batches = (pairs[step * batch : (step + 1) * batch] for step in range(steps))
    packed_peer.use(model)
    packed_peer.require_rewards(model, [s for pair in pairs[:3] for s in pair])
    take_turns()
    return packed_peer.steps(model, batches, trainer, end_of_step=take_turns)


def count_tokens(dataset, batch: int, step: int) -> tuple[int, int]:
    """Tokens of a step's pairs without padding: one by one, and with shared prefixes."""
    from shiftrm.models.prefix import common_prefix_length

    rows = dataset.with_format(None)[step * batch : (step + 1) * batch]
    pairs = list(zip(rows["chosen_ids"], rows["rejected_ids"], strict=True))
    alone = sum(len(a) + len(b) for a, b in pairs)
    return alone, alone - sum(common_prefix_length(pair) for pair in pairs)


def measure(shape: str, options: argparse.Namespace) -> dict:
    """Times and peak memory of every arm at one shape."""
    context = multiprocessing.get_context("spawn")
    result = {}
    for arms in [[arm] for arm in options.arms] if options.one_by_one else [options.arms]:
        result |= measure_together(arms, shape, options, context)
    return result


def measure_together(arms: list[str], shape: str, options: argparse.Namespace, context) -> dict:
    """Times and peak memory of arms that take turns."""
    links, processes = {}, {}
    for arm in arms:
        links[arm], other = context.Pipe()
        processes[arm] = context.Process(target=arm_process, args=(arm, options, shape, other))
        processes[arm].start()
    for link in links.values():
        assert link.recv() == "ready"
    times: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for step in range(options.warm_up + options.steps):
        for arm in arms:
            links[arm].send("go")
            seconds = links[arm].recv()
            if step >= options.warm_up:
                times[arm].append(seconds)
        print(
            f"  {shape} step {step + 1}/{options.warm_up + options.steps}",
            file=sys.stderr,
            flush=True,
        )
    result = {}
    for arm in arms:
        links[arm].send("go")
        wall, cpu = zip(*times[arm], strict=True)
        result[arm] = {**links[arm].recv(), "seconds": wall, "cpu_seconds": cpu}
        processes[arm].join()
    return result


def keep_busy() -> None:
    """Another user of the machine, until it is ended."""
    while True:
        sum(range(100_000))


def ratio(result: dict, above: str, below: str, clock: str = "seconds") -> float:
    """Median of the ratios within a round of turns."""
    pairs = zip(result[above][clock], result[below][clock], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(shape: str, result: dict, batch: int) -> str:
    """Markdown. CPU time counts what the arm itself used, whatever else the machine did.

    The last ratio is of all timed steps together, so that a slow first one counts in full.
    """
    base = "trl" if "trl" in result else next(iter(result))
    some = result[base]
    ceiling = sum(some["tokens"]) / sum(some["tokens_shared"])
    lines = [
        f"**{shape}** ({SHAPES.get(shape, 'prompt/response tokens')}), {batch} pairs a step"
        f" and, for MetaRM, {batch} groups of {K}; sharing can gain {ceiling:.2f} over packing:",
        "",
        f"| | CPU seconds a step, median (min-max) | {WORDS[base]} / this: CPU time | wall time |"
        " packed peer / this: CPU time | wall time | pairs' tokens a CPU second | a second |"
        " all steps, CPU time | peak memory, MB |",
        "|" + "---|" * 10,
    ]
    for arm, found in result.items():
        seconds, wall = found["cpu_seconds"], found["seconds"]
        peer = ["-", "-"]
        if "packed" in result:
            peer = [f"{ratio(result, 'packed', arm, c):.2f}" for c in ("cpu_seconds", "seconds")]
        rates = (
            statistics.median(n / t for n, t in zip(found["tokens"], times, strict=True))
            for times in (seconds, wall)
        )
        lines.append(
            f"| {WORDS[arm]} | {statistics.median(seconds):.2f}"
            f" ({min(seconds):.2f}-{max(seconds):.2f}) |"
            f" {ratio(result, base, arm, 'cpu_seconds'):.2f} | {ratio(result, base, arm):.2f} |"
            f" {peer[0]} | {peer[1]} | {' | '.join(f'{rate:.0f}' for rate in rates)} |"
            f" {sum(some['cpu_seconds']) / sum(found['cpu_seconds']):.2f} |"
            f" {found['peak'] / 1e6:.0f} |"
        )
    if {"packed", "shiftrm"} <= result.keys():
        share = ratio(result, "packed", "shiftrm", "cpu_seconds") / ceiling
        lines += ["", f"Share of the ceiling reached (CPU time): {share:.2f}."]
    if {"metarm", "metarm_plain"} <= result.keys():
        wall = ratio(result, "metarm_plain", "metarm")
        cpu = ratio(result, "metarm_plain", "metarm", "cpu_seconds")
        lines += ["", f"MetaRM on the plain path / with shared prefixes: {wall:.2f} ({cpu:.2f})."]
    return "\n".join(lines)


def environment() -> dict:
    import accelerate
    import torch
    import transformers
    import trl

    import shiftrm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = (shiftrm, torch, transformers, trl, accelerate)
    return {
        "versions": {p.__name__: p.__version__ for p in packages},
        "python": platform.python_version(),
        "device": gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="PROMPT/RESPONSE")
    parser.add_argument("--arms", nargs="+", default=list(USUAL), choices=WORDS)
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step (default: 8)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps not timed (default: 2)")
    parser.add_argument("--busy", type=int, default=0, help="processes that use the machine beside")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa", help="of the arms that share prefixes")
    parser.add_argument("--trl-attention", default="sdpa", help="of TRL and the plain path")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument(
        "--one-by-one", action="store_true", help="arms one after another: they do not fit together"
    )
    parser.add_argument("--pack-all", action="store_true", help="pack models of any size")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output", default="runs/bench/reward_step.json", metavar="FILE")
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    found = {**environment(), "command": " ".join(sys.argv), "shapes": {}}
    print(json.dumps({k: v for k, v in found.items() if k != "shapes"}))
    context = multiprocessing.get_context("spawn")
    crowd = [context.Process(target=keep_busy, daemon=True) for _ in range(options.busy)]
    for process in crowd:
        process.start()
    for shape in options.shapes:
        found["shapes"][shape] = result = measure(shape, options)
        print("\n" + table(shape, result, options.batch) + "\n", flush=True)
        Path(options.output).write_text(json.dumps(found, indent=1))
    for process in crowd:
        process.kill()


if __name__ == "__main__":
    main()
