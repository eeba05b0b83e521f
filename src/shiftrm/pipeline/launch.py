"""Running a command as a stage: in this process, or as `accelerate launch -m shiftrm ...`."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm import models
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text, iterate_jsonl
from shiftrm.pipeline.children import run_child
from shiftrm.pipeline.engine import StageContext

__all__ = ["Execution", "accumulation", "run_command", "spoken"]

PLACE = re.compile(r"\{(stage|out|template)(?::([^}]*))?\}")
"""`{stage:NAME}` is the folder of a finished stage, `{out}` where the command may write, and
`{template:NAME}` a chat template of this package."""

TEMPLATES = Path(models.__file__).parent / "chat_templates"

ERROR = "shiftrm: error: "

LOG = "training_log.jsonl"
"""What the training commands leave beside their model: a line for every logged step."""

HOW_FILE = "execution.json"
"""Beside checkpoints: in which way they were made, as far as only that way continues them."""

KINDS_OF_LAUNCH = (
    *("--multi_gpu", "--cpu", "--use_deepspeed", "--use_fsdp", "--tpu", "--use_megatron_lm"),
    "--config_file",
)
"""Words that tell `accelerate launch` what the processes run on."""

COMMANDS_ON_SEVERAL = ("train", "sft", "optimise")
"""Commands that use several processes; the others run on one."""


@dataclass(frozen=True)
class Execution:
    """How a run uses this machine: may change between an interruption and the next call.

    Attributes:
        processes: of each training; more than one goes through `accelerate launch`.
        launch: words for `accelerate launch`, such as "--config_file fsdp.yaml".
        micro_batch_size: sequences (or pairs) a process computes at once; batches are accumulated.
        sampling_batch_size: responses (or prompts) sampled or scored at once. Other sizes are other
            draws of the same distribution.
        bf16: autocast in training; weights stay in fp32, of models that only score, too, whose
            differences bf16 would round.
        in_process: run commands inside the workers; for tiny models, which load in no time.
        workers: stages at a time.
        report_to: "none", "tensorboard" or "wandb"; written beside each model.
    """

    processes: int = 1
    launch: str = ""
    micro_batch_size: int = 4
    sampling_batch_size: int = 32
    bf16: bool = True
    gradient_checkpointing: bool = True
    in_process: bool = False
    workers: int = 1
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in ("processes", "micro_batch_size", "sampling_batch_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} is {getattr(self, name)}; it must be at least 1")
        if "--num_processes" in self.launch or "--num-processes" in self.launch:
            raise UserError(
                f"execution.launch is {self.launch!r}; say the number as execution.processes, by "
                "which batches are divided, too"
            )
        if self.in_process and (self.processes > 1 or self.launch):
            raise UserError(
                "execution.in_process runs a training on one process; leave out processes and "
                "launch, or say in_process=false"
            )


def accumulation(batch_size: int, execution: Execution, *, section: str) -> tuple[int, int]:
    """Sequences a process and micro-batch, and micro-batches a step, that make `batch_size`.

    Raises:
        UserError: the batch does not divide by the processes and the micro-batch.
    """
    share, rest = divmod(batch_size, execution.processes)
    if rest:
        raise UserError(
            f"{section}.batch_size is {batch_size}; it must be a multiple of the "
            f"{execution.processes} processes"
        )
    micro = next(k for k in range(min(share, execution.micro_batch_size), 0, -1) if share % k == 0)
    return micro, share // micro


def spoken(words: Sequence[str], folders: Mapping[str, str], out: str) -> list[str]:
    """The words of a command with the places in them said."""

    def place(found: re.Match[str]) -> str:
        if found[1] == "template":
            return str(TEMPLATES / f"{found[2]}.jinja")
        return out if found[1] == "out" else folders[found[2]]

    return [PLACE.sub(place, word) for word in words]


def launcher(words: Sequence[str], execution: Mapping[str, Any]) -> list[str]:
    """The command line that runs `shiftrm` with these words on so many processes."""
    several = words[0] in COMMANDS_ON_SEVERAL
    if several and (execution["processes"] > 1 or execution["launch"]):
        # Always said, over a file's: batches are divided by it.
        options = [
            "--num_processes",
            str(execution["processes"]),
            *shlex.split(execution["launch"]),
        ]
        kind = any(word.partition("=")[0] in KINDS_OF_LAUNCH for word in options)
        if execution["processes"] > 1 and not kind:
            options = ["--multi_gpu", *options]  # or else it may start one, with a warning
        start = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "shiftrm"]
    else:
        start = [sys.executable, "-m", "shiftrm"]
    return [*start, *words]


def run_command(context: StageContext) -> None:
    """A stage that is one command; what it writes below `{out}` becomes the stage's.

    Settings: `words`, the command; `logged`, names in its training log by metric. Execution: an
    `Execution` as plain data, and `words`, further words that change the way and not the result.
    """
    stage, keep = context.stage, context.keep
    _begin_or_continue(keep, stage.execution)
    folders = {name: str(context.folder(name)) for name in stage.needs}
    words = spoken(stage.settings["words"], folders, str(keep))
    target = Path(spoken([stage.settings["makes"]], folders, str(keep))[0])
    if not target.exists():  # it was finished before an interruption otherwise
        run_words([*words, *spoken(stage.execution["words"], folders, str(keep))], context)
    if not target.exists():
        raise RuntimeError(f"{words[0]} ended well but left no {target.name}")
    made = context.out / target.name
    for path in sorted(keep.iterdir(), key=lambda path: path == target):  # the target last: while
        if path.name != HOW_FILE:  # it stands there, nothing has to be done again
            path.rename(context.out / path.name)
    card = made / "README.md"
    if card.is_file():  # the command knew only where it was to write
        text = card.read_text(encoding="utf-8")
        atomic_write_text(card, text.replace(str(keep), str(context.root / stage.name)))
    _record_log(context, made)


def _begin_or_continue(keep: Path, execution: Mapping[str, Any]) -> None:
    """Make the folder; an unfinished training goes unless this way of running can continue it."""
    how = {name: execution[name] for name in ("processes", "launch", "bf16", "report_to")}
    path = keep / HOW_FILE
    if keep.is_dir() and (not path.is_file() or json.loads(path.read_text("utf-8")) != how):
        print("run in another way than before the interruption: this stage begins anew", flush=True)
        shutil.rmtree(keep)
    keep.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        atomic_write_text(path, json.dumps(how))


def run_words(words: list[str], context: StageContext) -> None:
    """Run one command and raise its error as ours."""
    execution = context.stage.execution
    print(f"$ {shlex.join(['shiftrm', *words])}", flush=True)
    if execution["in_process"]:
        status = _run_here(words)
    else:
        status = run_child(launcher(words, execution), env=_environment())
    if not status:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    said = _last_error(context.out / "log.txt")
    if said is not None and "out of memory" in said:
        raise UserError(out_of_memory_line(words, execution))
    if status == 2 or said:
        raise UserError(said or f"`shiftrm {words[0]}` refused its options")
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise UserError(
            f"`shiftrm {words[0]}` was killed, perhaps for lack of memory; "
            f"{_smaller(words, execution)}"
        )
    raise RuntimeError(f"`shiftrm {words[0]}` ended with status {status}")


def out_of_memory_line(words: Sequence[str], execution: Mapping[str, Any]) -> str:
    """What to change in the recipe where a command's own settings are not the user's."""
    return f"out of memory; {_smaller(words, execution)}"


def _smaller(words: Sequence[str], execution: Mapping[str, Any]) -> str:
    names = []
    if words[0] in COMMANDS_ON_SEVERAL:
        names.append("micro_batch_size")
    if words[0] == "sample" or words[:2] == ["optimise", "ppo"]:
        names.append("sampling_batch_size")
    smaller = " or ".join(
        f"execution.{n}={max(1, execution[n] // 2)} (now {execution[n]})" for n in names
    )
    if all(execution[n] == 1 for n in names):
        smaller = "lora={lora_r: 16}, shorter texts (max_length, sampling.max_new_tokens)"
        return f"its batches are of one already: try {smaller} or more memory"
    if not execution["gradient_checkpointing"] and words[0] in COMMANDS_ON_SEVERAL:
        smaller += " or execution.gradient_checkpointing=true"
    return f"give {smaller}: the same command with it continues this run"


def _run_here(words: list[str]) -> int:
    """The command in this process; what it says goes where file descriptor 1 leads, the log."""
    from shiftrm.cli import main

    with (
        os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            return main(words)
        except SystemExit as error:  # argparse
            return int(error.code or 0)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _last_error(log: Path) -> str | None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith(ERROR)]
    return found[-1].removeprefix(ERROR) if found else None


def _record_log(context: StageContext, model: Path) -> None:
    """The training log as records."""
    path = (model if model.is_dir() else model.parent) / LOG
    names = context.stage.settings.get("logged", {})
    if not path.is_file():
        return
    for _, row in iterate_jsonl(path, required=("step",)):
        for name, metric in names.items():
            if isinstance(row.get(name), int | float):
                context.recorder.add(metric, float(row[name]), step=int(row["step"]))
