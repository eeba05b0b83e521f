"""Responses per second of `generate`: prompts read once for all their responses, and once for each.

Both arms draw the same responses in one process, in turns. A second is a CPU second of this
process, or on a GPU a second between events. Random prompts; a model with random weights that
never ends a response, unless `--stop` gives the share of tokens that end one.

    python benchmarks/sampling.py                              # SmolLM2-135M's shape, 250/50, 63/50
    python benchmarks/sampling.py --shapes 35-257/50           # prompts of unequal lengths
    python benchmarks/sampling.py --model FOLDER               # a policy and its tokenizer
    python benchmarks/sampling.py --model gold-world --shapes 4/20 --prompts 16 --responses 16 \\
        --stop 0.1                                             # one step of the gold world's PPO
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reward_step import MODELS

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMOLLM2_135M = {
    **MODELS["smollm2-135m"],
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARMS = {"each": False, "once": True}


def policy(name: str, stop: float) -> tuple[Any, Any]:
    """Return a model and a tokenizer; `stop` is the share of its tokens that end a response."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from shiftrm.models.sampling import load_policy
    from shiftrm.world.build import WorldConfig, write_base_model

    torch.manual_seed(0)
    if name == "smollm2-135m":
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
        words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="</s>",
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            if name == "gold-world":
                write_base_model(Path(folder), WorldConfig())
            model, tokenizer = load_policy(folder if name == "gold-world" else name)
    if stop:
        ends = range(3, 3 + round(stop * model.config.vocab_size))
        model.generation_config = GenerationConfig(eos_token_id=list(ends))
    return model, tokenizer


def seconds(model: Any, work: Any) -> tuple[float, Any]:
    """Return how long a call takes, and its result."""
    import torch

    if model.device.type != "cuda":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, result


def measure(model: Any, tokenizer: Any, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of both arms on one shape, and what follows from them."""
    from shiftrm.models.sampling import SamplingConfig, generate

    lengths, response = shape.split("/")
    shortest, _, longest = lengths.partition("-")
    rng = random.Random(shape)
    prompts = [
        [
            rng.randrange(3, model.config.vocab_size)
            for _ in range(rng.randint(int(shortest), int(longest or shortest)))
        ]
        for _ in range(options.prompts)
    ]
    config = SamplingConfig(int(response), options.temperature, options.top_p)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    equal = tokens = 0
    for turn in range(options.warm_up + options.repeat):
        drawn = []
        for arm in sorted(ARMS, reverse=bool(turn % 2)):
            took, samples = seconds(
                model,
                lambda share=ARMS[arm], seed=turn: generate(
                    model,
                    tokenizer,
                    prompts,
                    config=config,
                    num_responses=options.responses,
                    seed=seed,
                    share_prompts=share,
                ),
            )
            drawn.append(samples)
            if turn >= options.warm_up:
                found[arm].append(took)
        equal += sum(a == b for a, b in zip(*drawn, strict=True))
        tokens += sum(len(s.response_ids) for s in drawn[0])
    count = options.prompts * options.responses
    turns = options.warm_up + options.repeat
    ratios = [each / once for each, once in zip(found["each"], found["once"], strict=True)]
    return {
        "seconds": found,
        "responses_per_second": {a: count / statistics.median(s) for a, s in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "equal_responses": equal / (count * turns),
        "mean_response": tokens / (count * turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME|FOLDER")
    parser.add_argument("--shapes", nargs="+", default=["250/50", "63/50"])
    parser.add_argument("--prompts", type=int, default=8, help="in a batch (default: 8)")
    parser.add_argument("--responses", type=int, default=5, help="a prompt (default: 5)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", type=float, default=0.0, help="share of tokens that end one")
    parser.add_argument("--repeat", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="turns not timed (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output", default="runs/bench/sampling.json", metavar="FILE")
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model, tokenizer = policy(options.model, options.stop)
    gpu = torch.cuda.is_available() and not options.cpu
    model.to(dtype=getattr(torch, options.dtype), device="cuda" if gpu else "cpu")
    found: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "shapes": {},
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    print("prompt/response  responses/s: each  once  ratio (range)  same responses  mean length")
    for shape in options.shapes:
        found["shapes"][shape] = result = measure(model, tokenizer, shape, options)
        rates = result["responses_per_second"]
        print(
            f"{shape:15}  {rates['each']:17.3g} {rates['once']:5.3g}  {result['ratio']:.2f} "
            f"({min(result['ratios']):.2f}-{max(result['ratios']):.2f})  "
            f"{result['equal_responses']:14.1%}  {result['mean_response']:.1f}",
            flush=True,
        )
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
