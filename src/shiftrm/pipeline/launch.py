"""Runs a job as a stage: in this process, in a child, or under `accelerate launch`."""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, missing_embedding
from shiftrm.files import atomic_write_text, iterate_jsonl, remove_temporary_files
from shiftrm.metrics import is_declared
from shiftrm.pipeline.children import run_child
from shiftrm.pipeline.engine import RECORDS_FILE, StageContext
from shiftrm.pipeline.jobs import External, MetaTest, Optimise, Sample, from_plain, located, plain
from shiftrm.progress import only_on_terminals, quieten_libraries, reporting, speaks
from shiftrm.records import read_records
from shiftrm.trainers.training_log import TRAINING_LOG

__all__ = ["Execution", "accumulation", "launcher", "perform", "record_made", "run_job"]

JOB_FILE, ERROR_FILE = "job.json", "error.json"
"""The job of a child process, and its error message."""

HOW_FILE = "execution.json"
"""Beside checkpoints: the settings of `execution` with which alone they can be continued."""

KINDS_OF_LAUNCH = (
    *("--multi_gpu", "--cpu", "--use_deepspeed", "--use_fsdp", "--tpu", "--use_megatron_lm"),
    "--config_file",
)
"""Arguments that tell `accelerate launch` what the processes run on."""


@dataclass(frozen=True)
class Execution:
    """How a run uses this machine. It may differ in the call that continues an interrupted run.

    Attributes:
        processes: processes per training; more than one run under `accelerate launch`.
        launch: arguments of `accelerate launch`, such as "--config_file fsdp.yaml".
        micro_batch_size: sequences (or pairs) that a process computes at once; larger batches are
            accumulated.
        sampling_batch_size: responses (or prompts) sampled or scored at once. Another size gives
            other draws from the same distribution.
        bf16: autocast in training. Weights stay in fp32, also those of models that only score.
        in_process: run jobs inside the workers, for tiny models that load quickly.
        workers: stages that run at the same time.
        report_to: "none", "tensorboard" or "wandb"; written beside each model.
        reward_host: name or address at which the reward server of a `policy.command` listens, and
            at which the command reaches it. One that other machines reach needs SHIFTRM_TOKEN.
        reward_devices: CUDA_VISIBLE_DEVICES of that server; by default the run's.
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
    reward_host: str = "127.0.0.1"
    reward_devices: str = ""

    def __post_init__(self) -> None:
        for name in ("processes", "micro_batch_size", "sampling_batch_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} is {getattr(self, name)}; it must be at least 1")
        if "--num_processes" in self.launch or "--num-processes" in self.launch:
            raise UserError(
                f"execution.launch is {self.launch!r}; give the number as execution.processes, "
                "by which batches are divided"
            )
        if self.in_process and (self.processes > 1 or self.launch):
            raise UserError(
                "execution.in_process runs a training on one process; leave out processes and "
                "launch, or say in_process=false"
            )


def accumulation(batch_size: int, execution: Execution, *, section: str) -> tuple[int, int]:
    """Return the micro-batch size of a process and the accumulation steps that give `batch_size`.

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


def launcher(job: Any, execution: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """Return the command line that runs a job's file in as many processes as `execution` says."""
    start = [sys.executable, "-m"]
    if job.several and (execution["processes"] > 1 or execution["launch"]):
        # The number is always given, over that of a file: batches are divided by it.
        options = [
            "--num_processes",
            str(execution["processes"]),
            *shlex.split(execution["launch"]),
        ]
        kind = any(word.partition("=")[0] in KINDS_OF_LAUNCH for word in options)
        if execution["processes"] > 1 and not kind:
            options = ["--multi_gpu", *options]  # or else it may start one, with a warning
        start += ["accelerate.commands.launch", *options, "-m"]
    return [*start, "shiftrm.pipeline.child", *files]


def run_job(context: StageContext) -> None:
    """Run a stage's job and move what it makes into the stage's folder.

    Settings: `job`, see `jobs.plain`. Execution: an `Execution` as plain data, and `way`, see
    `Job.on_machine`.
    """
    stage, keep = context.stage, context.keep
    _begin_or_continue(keep, stage.execution)
    job = located(from_plain(stage.settings["job"]), context.root)
    target = keep / job.makes
    if not target.exists():  # it was finished before an interruption otherwise
        _run(job.on_machine(stage.execution["way"]), target, context)
    if not target.exists():
        raise RuntimeError(f"the job ended well but left no {target.name}")
    made = context.out / target.name
    for path in sorted(keep.iterdir(), key=lambda path: path == target):  # the target last: while
        if path.name != HOW_FILE:  # it stands there, nothing has to be done again
            path.rename(context.out / path.name)
    card = made / "README.md"
    if card.is_file():  # the job knew only where it was to write
        text = card.read_text(encoding="utf-8")
        atomic_write_text(card, text.replace(str(keep), str(context.root / stage.name)))
    _record_log(context, made)
    record_made(context, made)


def record_made(context: StageContext, folder: Path) -> None:
    """Record again, as the stage's own, what a job measured and wrote into its folder."""
    path = folder / RECORDS_FILE
    for record in read_records(path) if path.is_file() else ():
        context.recorder.add(record.metric, record.value, step=record.step, n=record.n)


def _begin_or_continue(keep: Path, execution: Mapping[str, Any]) -> None:
    """Create the folder; delete an unfinished training that this way of running cannot continue."""
    how = {name: execution[name] for name in ("processes", "launch", "bf16", "report_to")}
    path = keep / HOW_FILE
    if keep.is_dir() and (not path.is_file() or json.loads(path.read_text("utf-8")) != how):
        print("run in another way than before the interruption: this stage begins anew", flush=True)
        shutil.rmtree(keep)
    keep.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(keep)  # or they would be published with the stage
    if not path.exists():
        atomic_write_text(path, json.dumps(how))


def _run(job: Any, target: Path, context: StageContext) -> None:
    """Run one job; an error in a child process is raised here."""
    execution = context.stage.execution
    if isinstance(job, External):
        with _printing_to_log():
            print(job.run(target))
        return
    command = job.command(str(target))
    print(f"$ {shlex.join(['shiftrm', *command])}", flush=True)
    try:
        if execution["in_process"]:
            _run_here(job, target)
        else:
            _run_in_child(job, target, context)
    except UserError as error:
        if "out of memory" in str(error):
            raise UserError(out_of_memory_line(job, execution)) from None
        raise


def _run_here(job: Any, target: Path) -> None:
    """Run a job in this process."""
    with _printing_to_log():
        perform(job, target)


@contextmanager
def _printing_to_log() -> Iterator[None]:
    """Print to file descriptor 1, which is the log."""
    with (
        os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        yield


def _run_in_child(job: Any, target: Path, context: StageContext) -> None:
    execution = context.stage.execution
    files = [context.out / JOB_FILE, context.out / ERROR_FILE]
    atomic_write_text(files[0], json.dumps({"job": plain(job), "output": str(target)}))
    status = run_child(launcher(job, execution, [str(f) for f in files]), env=_environment())
    if not status:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if files[1].is_file():
        said = json.loads(files[1].read_text(encoding="utf-8"))
        if "errno" in said:
            raise OSError(said["errno"], said["message"])
        raise UserError(said["message"])
    name = job.command("")[0]
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise UserError(
            f"`shiftrm {name}` was killed, perhaps for lack of memory; {_smaller(job, execution)}"
        )
    raise RuntimeError(f"`shiftrm {name}` ended with status {status}")


def perform(job: Any, output: Path) -> None:
    """Run a job with its progress as lines, and print its summary."""
    quieten_libraries()
    only_on_terminals()
    with reporting(job.command("")[0], speaks=speaks()):
        try:
            summary = job.run(output)
        except IndexError as error:
            raise missing_embedding(error) or error from None
    if summary is not None:
        print(summary)


def out_of_memory_line(job: Any, execution: Mapping[str, Any]) -> str:
    """Return the error for a job that ran out of memory, in terms of the recipe's settings."""
    return f"out of memory; {_smaller(job, execution)}"


def _smaller(job: Any, execution: Mapping[str, Any]) -> str:
    if isinstance(job, MetaTest):
        return "lower batch_size in domains.weighted, or forward_batch_size in policy.settings"
    names = ["micro_batch_size"] if job.several else []
    if isinstance(job, Sample) or (isinstance(job, Optimise) and job.method == "ppo"):
        names.append("sampling_batch_size")
    smaller = " or ".join(
        f"execution.{n}={max(1, execution[n] // 2)} (now {execution[n]})" for n in names
    )
    if all(execution[n] == 1 for n in names):
        smaller = "lora={lora_r: 16}, shorter texts (max_length, sampling.max_new_tokens)"
        return f"its batches are of one already: try {smaller} or more memory"
    if not execution["gradient_checkpointing"] and job.several:
        smaller += " or execution.gradient_checkpointing=true"
    return f"give {smaller}: the same command with it continues this run"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _record_log(context: StageContext, model: Path) -> None:
    """Record the declared metrics of the training log, under the names they have there."""
    path = (model if model.is_dir() else model.parent) / TRAINING_LOG
    if not path.is_file():
        return
    for _, row in iterate_jsonl(path, required=("step",)):
        for name, value in sorted(row.items()):  # a log that was resumed has another order
            if isinstance(value, int | float) and is_declared(name):
                context.recorder.add(name, float(value), step=int(row["step"]))
