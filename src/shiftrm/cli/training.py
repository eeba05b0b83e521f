"""What the commands that train have in common: options, help, and running a job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.cli.checks import WORK, output_folder
from shiftrm.cli.options import build, command_line, inputs, option, optional
from shiftrm.cli.progress import only_on_terminals
from shiftrm.methods.method import METHODS

__all__ = [
    "POLICY_HELP", "REWARD_HELP", "RewardOptions", "TrainingOptions", "methods_help",
    "result_folder", "run_job",
]  # fmt: skip

POLICY_HELP = """Settings: every option of {configs}, and of
trl.ModelConfig (dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...), as key=value, as
--key value (--learning-rate 5e-6, --bf16, --no-bf16) or in the file. With use_peft=true the output
is the merged model, and its folder adapter holds the adapter. training_log.jsonl in the output has
a line for every logged step; report_to=tensorboard or wandb also logs there.

FILE.yaml holds the same options and settings in one flat mapping; the command line wins.

Checkpoints are written into .NAME.work beside the output. A command that was interrupted, killed,
or stopped by a full disk or lack of memory continues from the last one when it is given again.
"""
"""Help text of the commands that train policies."""

REWARD_HELP = """Settings: every option of trl.RewardConfig (and so of TrainingArguments), with
groups also of MetaRMConfig (preset, meta_step, meta_learning_rate, meta_batch_size, deploy) or of
the method's own configuration (ContrastConfig: contrast_share, contrast_negatives, ...), and of
trl.ModelConfig (dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...), as key=value, as
--key value (--learning-rate 5e-6, --bf16, --no-bf16) or in the file. Code that comes with a model
is only run with --trust-remote-code.
"""
"""Help text of the commands that train reward models."""


def methods_help() -> str:
    """List the values of --method with their labels."""
    methods = {name: METHODS.get(name) for name in METHODS.names()}
    lines = [f"  {name:27}{m.label}" for name, m in methods.items() if m.adapts]
    about = "Methods (docs/methods.md says what each does and compares them):"
    return "\n".join([about, *lines]) + "\n\n"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of every command that takes settings."""

    config: str | None = optional("FILE", "YAML with the options and settings below", reads=True)
    output: str = option("DIR", "folder of the result")
    settings: dict[str, Any] = option(
        "key=value", "any setting, such as learning_rate=5e-6", default={}
    )


@dataclass(frozen=True, kw_only=True)
class RewardOptions(TrainingOptions):
    """The options of the commands that train reward models."""

    model: str = option("DIR", "checkpoint or hub name", reads=True)
    pairs: str = option("DATA", "preference pairs", reads=True)
    eval_pairs: dict[str, str] = option(
        "[NAME=]DATA",
        "held-out pairs; may be repeated, with a name for each",
        default={},
        reads=True,
    )


def result_folder(options: TrainingOptions) -> Path:
    """Return the output folder, locked and apart from all inputs; see `checks.output_folder`."""
    return output_folder(options.output, apart_from=inputs(options), beside=[WORK])


def run_job(kind: str, options: TrainingOptions, *, note: str | None = None, **more: Any) -> None:
    """Run a job of `pipeline.jobs` and print its summary.

    Args:
        kind: the name of the job's class.
        options: the job's fields are taken from here.
        note: is printed after the summary.
        more: further fields.
    """
    output = result_folder(options)  # before the slow import
    from shiftrm.pipeline import jobs

    only_on_terminals()
    summary = build(getattr(jobs, kind), options, told=command_line(), **more).run(output)
    if summary is not None:
        print(summary if note is None else f"{summary}\n{note}")
