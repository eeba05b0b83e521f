"""Train a reward model from files to a folder: `shiftrm train`, and the first half of `adapt`.

`prepare` checks the options before anything is written, `open_work` claims the work folder beside
the output, `train_in_work` writes the result into it, and `publish` renames it to the output.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import COLUMNS, read_pairs
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.combined import refuse_combined
from shiftrm.models.loading import checkpoint_fingerprint, refuse_adapter, refuse_gguf
from shiftrm.trainers import work_folder
from shiftrm.trainers.kinds import MODELS, ORDINARY, Training, pairs_only
from shiftrm.trainers.machine import explain_out_of_memory
from shiftrm.trainers.members import combine, train_members
from shiftrm.trainers.model_card import DataSet, Outcome, model_card, summary
from shiftrm.trainers.one_model import train_model
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.reward_configs import MetaRMConfig
from shiftrm.trainers.settings import Settings, resolve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on which data.

    Attributes:
        model: checkpoint folder or hub name to start from; a missing head is initialised.
        pairs, groups: sources (`data.sources`) of preference pairs and of unlabelled policy
            responses.
        output: folder to write: an ordinary sequence-classification checkpoint.
        settings: values by setting, see `trainers.settings`.
        eval_pairs: sources of held-out pairs by name; the name of a single source may be empty.
        command: the command that the model card shows for repeating this run.
        policy, reference, reward: checkpoints for a trainer that takes them (`kinds.Training`).
    """

    model: str
    pairs: str
    output: Path
    settings: Mapping[str, Any]
    groups: str | None = None
    eval_pairs: Mapping[str, str] | None = None
    command: str | None = None
    policy: str | None = None
    reference: str | None = None
    reward: str | None = None


@dataclass
class TrainingJob:
    """A training run with checked options.

    Attributes:
        model: checkpoint folder or hub name to start from.
        output, target: the folder to write, as the user gave it and as an absolute path.
        work: the folder beside it that is used until the result is complete.
        tables: the pairs, by "pairs" and "eval NAME".
        data: the inputs, for the card.
        command: the command that the card shows for repeating this run.
        models: the checkpoints that the trainer takes besides its own, by argument.
    """

    model: str
    output: Path
    target: Path
    work: Path
    chosen: Settings
    tables: dict[str, Dataset]
    data: list[DataSet]
    command: str | None = None
    training: Training = field(default_factory=pairs_only)
    models: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> Path:
        """Return the folder of the result before it is published."""
        return self.work / work_folder.FINISHED

    def facts(self) -> dict[str, Any]:
        """Return the fields of `TrainedModel` that are known before training."""
        return {
            "model": self.model,
            "output": str(self.output),
            "data": self.data,
            "command": self.command,
        }

    def add_data(self, name: str, source: str, rows: list[Row]) -> None:
        """Add an input to the card and the run record."""
        self.data.append(DataSet(name, source, len(rows), fingerprint(source, rows)))

    def add_model(self, name: str, path: str) -> None:
        """Add a checkpoint that the trainer takes; it is an input like the data."""
        require_checkpoint(path)
        self.models[name] = path
        self.data.append(DataSet(name, path, None, checkpoint_fingerprint(path)))


def train(request: TrainingRequest, training: Training) -> str | None:
    """Train a reward model from files and write it to a folder.

    Training works in `.NAME.work` beside the output folder, which is created only when training
    succeeds. Repeating an interrupted call resumes from the last complete checkpoint.

    Args:
        training: the configuration and trainer classes; groups need a trainer that takes them.

    Returns:
        A summary; None on all but the main process.

    Raises:
        UserError: bad files, unknown settings, an output folder that is not empty, a loss that is
            not finite, or a full disk. Only complete checkpoints are left behind.
    """
    job = prepare(request, training)
    rows = None
    if request.groups is not None and not training.takes_groups:
        logger.warning("%s: the settings make no use of the groups", request.groups)
    elif request.groups is not None:
        rows = read_groups(request.groups)
        job.add_data("groups", request.groups, rows)
    processes = PartialState()
    with open_work(job) as checkpoint:
        outcome = train_in_work(job, rows, checkpoint)
        if processes.is_main_process:
            publish(job, model_card(outcome))
        processes.wait_for_everyone()
    return summary(outcome) if processes.is_main_process else None


def prepare(
    request: TrainingRequest, training: Training, *, command_name: str = "train"
) -> TrainingJob:
    """Check options and read the pairs, without writing anything.

    Args:
        command_name: for errors.

    Raises:
        UserError: as `train`, except for errors that need the model or groups to be read.
    """
    job = begin(
        request.model,
        output=request.output,
        settings=request.settings,
        config=training.config,
        command=request.command,
        command_name=command_name,
        elsewhere={}
        if training.takes_groups
        else dict.fromkeys(_METARM, "it is MetaRM's: give --groups"),
    )
    job.training = training
    training.trainer.check_start(request.model)
    heldout = request.eval_pairs or {}
    sources = {"pairs": request.pairs}
    sources |= {f"eval {name}".strip(): source for name, source in heldout.items()}
    for key, source in sources.items():
        rows = read_pairs(source)
        if key == "pairs":
            trained = {_key(row) for row in rows}
        elif known := sum(_key(row) in trained for row in rows):
            logger.warning(
                "%s: %d of its %d pairs are among those trained on, so its accuracy says little "
                "about new ones; give others as --eval-pairs",
                source,
                known,
                len(rows),
            )
        job.tables[key] = table(source, rows, COLUMNS)
        job.add_data(key, source, rows)
    for name in MODELS:
        if (path := getattr(request, name)) is not None:
            job.add_model(name, path)
    return job


def _key(row: Row) -> str:
    """Return a key that is equal for rows with the same texts."""
    return json.dumps([row.get("prompt"), row["chosen"], row["rejected"]], sort_keys=True)


_METARM = {f.name for f in dataclasses.fields(MetaRMConfig)}


def begin(
    model: str,
    *,
    output: Path,
    settings: Mapping[str, Any],
    config: type,
    command: str | None,
    command_name: str,
    **judging: Any,
) -> TrainingJob:
    """Return a job without data after quick checks of output, settings and model.

    Args:
        config, judging: as `settings.resolve` takes them.

    Raises:
        UserError: an existing output, unknown settings, a missing model or template, an adapter.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already there and not empty; choose another --output")
    target = Path(os.path.abspath(output))  # which has a name, even where "." is given
    work = target.with_name(f".{target.name}.work")
    chosen = resolve(settings, config, work=work, command_name=command_name, **judging)
    require_checkpoint(model)
    refuse_combined(model)
    refuse_adapter(model)
    template = getattr(chosen.args, "chat_template_path", None)
    if template is not None and not (Path(template).exists() or exists(template)):
        raise UserError(f"chat_template_path={template}: no such file or folder")
    return TrainingJob(model, output, target, work, chosen, {}, [], command)


def train_in_work(
    job: TrainingJob, groups: list[Row] | None, checkpoint: Path | None, *, evaluate: bool = True
) -> Outcome:
    """Train and write the result to `job.finished`; trainers are freed on return.

    Args:
        groups: unlabelled responses, if the training takes them.
        checkpoint: the checkpoint to resume from; several models find their own.
        evaluate: whether the held-out pairs are evaluated before and after.
    """

    def train_one(job: TrainingJob, checkpoint: Path | None) -> Outcome:
        return train_model(job, groups, checkpoint, evaluate=evaluate)

    several = job.training.members > 1
    outcome = train_members(job, train_one) if several else train_one(job, checkpoint)
    if job.training.combine is None:
        return outcome
    return combine(job, outcome, evaluate=evaluate)


def publish(job: TrainingJob, card: str) -> None:
    """Add the card and rename the result to the output; for the main process."""
    work_folder.publish_folder(job.finished, job.work, job.target, card)


@contextmanager
def open_work(job: TrainingJob, more: Mapping[str, Any] | None = None) -> Iterator[Path | None]:
    """Hold the work folder of a job; out-of-memory errors also become one line.

    Args:
        more: additional entries that must match to resume an interrupted run.
    """
    record = _run_record(job) | dict(more or {})
    with work_folder.hold_work(job.work, record) as checkpoint, explain_out_of_memory(job.chosen):
        yield checkpoint


def _run_record(job: TrainingJob) -> dict[str, Any]:
    """Return the entries that must match to resume an interrupted run."""
    record: dict[str, Any] = {
        "model": job.model,
        "model_files": checkpoint_fingerprint(job.model)[:16],
        "settings": job.chosen.identity(),
        "data": {d.name: {"source": d.source, "sha256": d.sha256[:16]} for d in job.data},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if (trainer := job.training.trainer.__name__) not in ORDINARY:  # they began without this
        record["trainer"] = trainer
    if job.training.combine is not None:  # others began without these
        record |= {"members": job.training.members, "combine": job.training.combine}
    return record


def require_checkpoint(model: str) -> None:
    """Raise UserError if this is neither a folder nor a hub name."""
    if not exists(model):
        raise UserError(f"{model}: no such folder; give a checkpoint folder or a hub name")


def exists(model: str) -> bool:
    """Return True for a local folder or a possible hub name (`owner/name`).

    Raises:
        UserError: the folder holds GGUF files.
    """
    refuse_gguf(model)
    return Path(model).is_dir() or (model.count("/") == 1 and not model.startswith((".", "/")))
