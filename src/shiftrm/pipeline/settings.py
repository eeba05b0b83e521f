"""The settings of a stage's command, judged before the run starts as the command will."""

from collections.abc import Sequence
from pathlib import Path

from shiftrm.errors import UserError
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.launch import spoken

__all__ = ["check_words", "settings_of"]


def settings_of(stage: Stage) -> list[str]:
    """The `key=value` words of a stage's command: those after its output."""
    words = stage.settings.get("words")
    if not words or words[0] == "sample":
        return []
    after = words.index("--output") + 2
    return [*words[after:], *stage.execution["words"]]


def check_words(words: Sequence[str], given: Sequence[str], *, processes: int = 1) -> None:
    """Refuse an unknown setting or a bad value.

    Args:
        words: the command.
        given: its `key=value` words.
        processes: it will run on.

    Raises:
        UserError: as the command.
    """
    from shiftrm.policies.commands import METHODS, elsewhere
    from shiftrm.policies.configs import SFTConfig, ppo_config, refused
    from shiftrm.trainers.metarm_config import MetaRMConfig
    from shiftrm.trainers.reward import RewardConfig
    from shiftrm.trainers.settings import resolve

    settings = dict(word.split("=", 1) for word in spoken(given, {}, "out"))
    if settings.get("report_to", "none") != "none":
        check_reporting(settings["report_to"])
    settings["bf16"] = "false"  # an accelerator judges it, which this machine may lack
    work = Path("out")  # nothing is written
    if words[0] == "train":
        config = MetaRMConfig if "--groups" in words else RewardConfig
        resolve(settings, config, work=work, command_name="train")
        return
    if words[0] not in ("sft", "optimise"):
        return
    method = "sft" if words[0] == "sft" else words[1]
    if method in ("rloo", "grpo"):  # whose batch is that of all processes
        steps = int(settings["gradient_accumulation_steps"])
        settings["gradient_accumulation_steps"] = str(steps * processes)
    chosen = resolve(
        settings,
        SFTConfig if method == "sft" else METHODS[method],
        work=work,
        command_name=words[0],
        task_type="CAUSAL_LM",
        refused=refused(method),
        elsewhere=elsewhere(method),
    )
    if method == "ppo":
        ppo_config(chosen.given)


def check_reporting(report_to: str) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        UserError: names the setting.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks([report_to])
    except ValueError as error:
        raise UserError(f"execution.report_to is {report_to!r}: {error}") from None
    if report_to != "all":
        from importlib.util import find_spec

        if report_to in ("wandb", "tensorboard") and find_spec(report_to) is None:
            raise UserError(
                f"execution.report_to is {report_to!r}, which is not installed: pip install "
                f"{report_to}"
            )
