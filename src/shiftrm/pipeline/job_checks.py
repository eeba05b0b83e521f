"""The settings of a job, checked before the run starts as the job itself will check them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftrm.config import from_mapping
from shiftrm.errors import UserError
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.jobs import (
    External,
    MetaTest,
    MetaTrain,
    Optimise,
    TrainReward,
    from_plain,
    is_training,
)

__all__ = ["check_job", "job_of", "settings_of"]


def job_of(stage: Stage) -> Any:
    """Return the job that a stage runs, or None."""
    data = stage.settings.get("job")
    return None if data is None else from_plain(data)


def settings_of(stage: Stage) -> dict[str, Any]:
    """Return the settings of a stage's training, those of this machine included."""
    job = job_of(stage)
    return {**job.settings, **stage.execution["way"]} if is_training(job) else {}


def check_job(job: Any, way: Mapping[str, Any], *, processes: int = 1) -> None:
    """Check the settings of a job as the job itself does when it runs.

    Args:
        way: see `Job.on_machine`.
        processes: how many the job will run on.

    Raises:
        UserError: names the setting.
    """
    if isinstance(job, MetaTest):
        from shiftrm.pipeline.meta_test_run import MetaTestConfig

        from_mapping(MetaTestConfig, dict(job.settings))
    if isinstance(job, External):
        try:
            job.on_machine(way).check()
        except UserError as error:
            raise UserError(f"policy.command: {error}") from None
    if not is_training(job):
        return
    from shiftrm.policies.commands import METHODS, elsewhere
    from shiftrm.policies.configs import SFTConfig, ppo_config, refused
    from shiftrm.trainers.settings import resolve

    settings = {**job.settings, **way}
    if settings.get("report_to", "none") != "none":
        check_reporting(settings["report_to"])
    settings["bf16"] = False  # an accelerator decides that, which this machine may lack
    work = Path("out")  # nothing is written
    if isinstance(job, MetaTrain):
        from shiftrm.oodpl.training_command import settings_of as meta_settings

        meta_settings(settings, work=work)
        return
    if isinstance(job, TrainReward):
        resolve(settings, job.training().config, work=work, command_name="train")
        return
    method = job.method if isinstance(job, Optimise) else "sft"
    steps = settings.get("gradient_accumulation_steps")
    if method in ("rloo", "grpo") and steps is not None:  # whose batch is that of all processes
        settings["gradient_accumulation_steps"] = int(steps) * processes
    chosen = resolve(
        settings,
        SFTConfig if method == "sft" else METHODS[method],
        work=work,
        command_name="sft" if method == "sft" else "optimise",
        task_type="CAUSAL_LM",
        refused=refused(method),
        elsewhere=elsewhere(method),
    )
    if method == "ppo":
        ppo_config(chosen.given)


def check_reporting(report_to: str) -> None:
    """Check that a tracker is known and installed.

    Raises:
        UserError: names the setting.
    """
    from importlib.util import find_spec

    from transformers.integrations import get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks([report_to])
    except ValueError as error:
        raise UserError(f"execution.report_to is {report_to!r}: {error}") from None
    if report_to in ("wandb", "tensorboard") and find_spec(report_to) is None:
        raise UserError(
            f"execution.report_to is {report_to!r}, which is not installed: pip install {report_to}"
        )
