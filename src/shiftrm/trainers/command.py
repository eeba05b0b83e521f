"""Train a reward model from files; the implementation of `shiftrm train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from shiftrm.data.groups import read_groups
from shiftrm.trainers.kinds import Training
from shiftrm.trainers.model_card import model_card, summary
from shiftrm.trainers.training import open_work, prepare, publish, train_in_work

__all__ = ["train"]


def train(
    model: str,
    *,
    pairs: str,
    output: Path,
    eval_pairs: Mapping[str, str] | None = None,
    groups: str | None = None,
    settings: Mapping[str, Any],
    training: Training,
    command: str | None = None,
) -> str | None:
    """Train a reward model from files and write it to a folder.

    Training works in `.NAME.work` beside the output folder, which is created only when training
    succeeds. Repeating an interrupted call resumes from the last complete checkpoint.

    Args:
        model: checkpoint folder or hub name to start from; a missing head is initialised.
        pairs, groups: sources (`data.sources`) of preference pairs and of unlabelled policy
            responses.
        eval_pairs: sources of held-out pairs by name; the name of a single source may be empty.
        output: folder to write: an ordinary sequence-classification checkpoint.
        settings: values by setting, see `trainers.settings`.
        training: the configuration and trainer classes; groups need a trainer that takes them.
        command: the command that the model card shows for repeating this run.

    Returns:
        A summary; None on all but the main process.

    Raises:
        UserError: bad files, unknown settings, an output folder that is not empty, a loss that is
            not finite, or a full disk. Only complete checkpoints are left behind.
    """
    job = prepare(
        model,
        pairs=pairs,
        output=output,
        eval_pairs=eval_pairs,
        settings=settings,
        training=training,
        command=command,
    )
    rows = None
    if groups is not None:
        rows = read_groups(groups)
        job.add_data("groups", groups, rows)
    processes = PartialState()
    with open_work(job) as checkpoint:
        outcome = train_in_work(job, rows, checkpoint)
        if processes.is_main_process:
            publish(job, model_card(outcome))
        processes.wait_for_everyone()
    return summary(outcome) if processes.is_main_process else None
