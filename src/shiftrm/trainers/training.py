"""Train from files to a folder; shared by `shiftrm train` and `shiftrm adapt`.

`prepare` checks the options before anything is written, `open_work` claims the work folder beside
the output, `train_in_work` writes the result into it, and `publish` renames it to the output.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError
from transformers.trainer_callback import PrinterCallback

from shiftrm.data.pairs import COLUMNS, read_pairs
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, replace_directory
from shiftrm.models.loading import refuse_gguf
from shiftrm.progress import task
from shiftrm.trainers import work_folder
from shiftrm.trainers.kinds import Training, pairs_only
from shiftrm.trainers.memory import explain_out_of_memory, identity
from shiftrm.trainers.metarm_config import MetaRMConfig
from shiftrm.trainers.model_card import DataSet, Outcome, measurements
from shiftrm.trainers.progress import SHOWN, ProgressInWords, log_progress_to
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.trainers.settings import Settings, resolve
from shiftrm.trainers.tables import table
from shiftrm.trainers.training_log import write_training_log

__all__ = ["Job", "begin", "open_work", "prepare", "publish", "train_in_work"]

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A training run with checked options.

    Attributes:
        model: checkpoint folder or hub name to start from.
        output, target: the folder to write, as the user gave it and as an absolute path.
        work: the folder beside it that is used until the result is complete.
        tables: the pairs, by "pairs" and "eval NAME".
        data: the inputs, for the card.
        command: the command that the card shows for repeating this run.
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

    @property
    def finished(self) -> Path:
        """Return the folder of the result before it is published."""
        return self.work / work_folder.FINISHED

    def add_data(self, name: str, source: str, rows: list[Row]) -> None:
        """Add an input to the card and the run record."""
        self.data.append(DataSet(name, source, len(rows), fingerprint(source, rows)))


def prepare(
    model: str,
    *,
    pairs: str,
    output: Path,
    eval_pairs: Mapping[str, str] | None,
    settings: Mapping[str, Any],
    training: Training,
    command: str | None,
    command_name: str = "train",
) -> Job:
    """Check options and read the pairs, without writing anything.

    Args:
        model, pairs, output, eval_pairs, settings, command: as in `command.train`.
        training: the configuration and trainer classes.
        command_name: for errors.

    Raises:
        UserError: as `command.train`, except for errors that need the model or groups to be read.
    """
    job = begin(
        model,
        output=output,
        settings=settings,
        config=training.config,
        command=command,
        command_name=command_name,
        elsewhere={}
        if training.takes_groups
        else dict.fromkeys(_METARM, "it is MetaRM's: give --groups"),
    )
    job.training = training
    sources = {"pairs": pairs}
    sources |= {f"eval {name}".strip(): source for name, source in (eval_pairs or {}).items()}
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
) -> Job:
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
    if not exists(model):
        raise UserError(f"{model}: no such folder; give a checkpoint folder or a hub name")
    if (Path(model) / "adapter_config.json").is_file():
        raise UserError(
            f"{model}: is an adapter, which would stay as it is while the model is trained; merge "
            "it into its model first (`shiftrm` writes the merged one beside it)"
        )
    template = getattr(chosen.args, "chat_template_path", None)
    if template is not None and not (Path(template).exists() or exists(template)):
        raise UserError(f"chat_template_path={template}: no such file or folder")
    return Job(model, output, target, work, chosen, {}, [], command)


def train_in_work(
    job: Job, groups: list[Row] | None, checkpoint: Path | None, *, evaluate: bool = True
) -> Outcome:
    """Train and write the result to `job.finished`; the trainer is freed on return.

    Args:
        groups: unlabelled responses, if the training takes them.
        checkpoint: the checkpoint to resume from.
        evaluate: whether the trainer evaluates the held-out pairs before and after.
    """
    used = job.chosen.beyond_defaults()
    with task("loading the model and the data", None):
        trainer = _trainer(job, groups)
    trainer.choose_checkpointing()
    if trainer.accelerator.is_main_process:
        print(_opening(trainer), flush=True)
    try:
        before, result, after = _run(trainer, checkpoint, evaluate=evaluate)
    except (ImportError, NotImplementedError) as error:  # a missing optimizer or kernel
        raise user_error(job.model, error, job.chosen) from error
    outcome = Outcome(
        model=job.model,
        output=str(job.output),
        data=job.data,
        settings=used,
        seed=job.chosen.args.seed,
        command=job.command,
        before=before,
        after=after,
        **measurements(trainer, result),
    )
    write_model(trainer, job.finished)
    if trainer.accelerator.is_main_process:
        start: Row = {"step": 0}  # the trainer's log begins with training
        for name, metrics in (before or {}).items():
            prefix = f"eval_{name}_" if name else "eval_"
            start |= {f"{prefix}{key}": value for key, value in metrics.items()}
        history = [*([start] if before else []), *trainer.state.log_history]
        write_training_log(job.finished, history)
    return outcome


def _trainer(job: Job, groups: list[Row] | None) -> RewardTrainer:
    model, chosen = job.model, job.chosen
    heldout = {
        name.removeprefix("eval").strip(): t for name, t in job.tables.items() if name != "pairs"
    }
    args = chosen.args
    args.model_init_kwargs = chosen.model_options
    data = {
        "train_dataset": job.tables["pairs"],
        "eval_dataset": heldout.get("", heldout or None),
        **chosen.trainer_options,
    }
    try:
        if job.training.takes_groups:
            data["meta_dataset"] = groups
        trainer: RewardTrainer = job.training.trainer(model, args, **data)
    except UserError:
        raise
    except Exception as error:
        raise user_error(model, error, chosen) from error
    add_callbacks(trainer)
    return trainer


def _opening(trainer: RewardTrainer) -> str:
    """Return one line on what is trained and how."""
    args, parameters = trainer.args, list(trainer.model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    what = f"all {total:,} weights" if trained == total else f"{trained:,} of {total:,} weights"
    default = "" if args.learning_rate_given else ", the default for this"
    checkpointing = "on" if args.activation_checkpointing else "off"
    return (
        f"Training {what}: learning_rate {args.learning_rate:g}{default}; gradient checkpointing "
        f"{checkpointing}."
    )


def add_callbacks(trainer: Any, shown: Sequence[str] = SHOWN) -> None:
    """Add callbacks that print progress without a bar and mark complete checkpoints.

    Args:
        shown: metrics to include in progress lines.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressInWords(shown, speaks=trainer.args.disable_tqdm))
    trainer.add_callback(work_folder.MarkCompleteCheckpoints())


def user_error(model: str, error: Exception, chosen: Settings) -> Exception:
    """Return a one-line error if a library rejected the model or settings, else the error."""
    words = first_line(error)
    if isinstance(error, OSError | SafetensorError) and not work_folder.is_disk_full(error):
        return UserError(f"{model}: cannot be loaded ({words})")
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return UserError(
            f"{model}: its weights do not fit a reward model of one label; give a policy, or a "
            "checkpoint with num_labels=1"
        )
    if isinstance(error, ValueError) and "`pad_token` ('None')" in str(error):
        return UserError(
            f"{model}: the tokenizer has neither a pad nor an EOS token; set them and save it "
            "again, or give eos_token=..."
        )
    if isinstance(error, TypeError) and chosen.given.get("model_init_kwargs"):
        return UserError(f"{model}: does not take these model_init_kwargs: {words}")
    if isinstance(
        error, ValueError | ImportError | NotImplementedError
    ) or "to be installed" in str(error):
        return UserError(f"{model}: cannot be trained with these settings: {words}")
    return error


def _run(
    trainer: RewardTrainer, checkpoint: Path | None, *, evaluate: bool
) -> tuple[dict[str, Any] | None, Any, dict[str, Any]]:
    """Evaluate, train (from the checkpoint, if given) and evaluate again."""
    before = None
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # by train() only
    if evaluate and not sharded:
        before = _evaluations(trainer)
    if checkpoint is not None and trainer.accelerator.is_main_process:
        print(f"Continuing from {checkpoint}", flush=True)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return before, result, _evaluations(trainer) if evaluate else {}


def _evaluations(trainer: RewardTrainer) -> dict[str, Any]:
    """Return the metrics of each held-out set by name, without prefix."""
    sets = trainer.eval_dataset
    if sets is None:
        return {}
    names = list(sets) if isinstance(sets, dict) else [""]
    found = {}
    for name in names:
        prefix = f"eval_{name}" if name else "eval"
        with task(f"measuring {name or 'the held-out pairs'}", None):
            metrics = trainer.evaluate(name or None, metric_key_prefix=prefix)
        found[name] = {
            key.removeprefix(f"{prefix}_").removeprefix("eval_"): value
            for key, value in metrics.items()
        }
    return found


def write_model(trainer: Any, finished: Path) -> None:
    """Write the complete model and its tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    merged = hasattr(model, "merge_and_unload") and not getattr(model, "quantization_method", None)
    if merged and not sharded:
        # The adapter's head alone does not fit a policy, whose configuration has two labels.
        trainer.save_model(str(finished / "adapter"))
        if trainer.args.should_save:
            model.merge_and_unload().save_pretrained(finished)
            trainer.processing_class.save_pretrained(finished)
    else:
        trainer.save_model(str(finished))
    trainer.accelerator.wait_for_everyone()


def publish(job: Job, card: str) -> None:
    """Add the card and rename the result to the output; for the main process."""
    publish_folder(job.finished, job.work, job.target, card)


def publish_folder(finished: Path, work: Path, target: Path, card: str) -> None:
    """As `publish`, for any training that worked in `work`."""
    log_progress_to(None)  # the folder is about to be removed
    atomic_write_text(finished / "README.md", card)
    if (work / "runs").is_dir():  # what report_to=tensorboard wrote
        (work / "runs").rename(finished / "runs")
    if target.exists():
        target.rmdir()
    replace_directory(finished, target)
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def open_work(job: Job, more: Mapping[str, Any] | None = None) -> Iterator[Path | None]:
    """Hold the work folder of a job; out-of-memory errors also become one line.

    Args:
        more: additional entries that must match to resume an interrupted run.
    """
    record = _run_record(job) | dict(more or {})
    with hold_work(job.work, record) as checkpoint, explain_out_of_memory(job.chosen):
        yield checkpoint


@contextmanager
def hold_work(work: Path, record: dict[str, Any]) -> Iterator[Path | None]:
    """Claim the work folder and yield the checkpoint to resume from.

    After a failure inside, only complete checkpoints and sampled groups are kept, and the error
    says where they are.

    Args:
        record: entries that must match to resume an interrupted run.
    """
    work_folder.check(work, record)
    processes = PartialState()
    processes.wait_for_everyone()  # no process may write while another still checks
    try:
        if processes.is_main_process:
            work_folder.claim(work, record)
            log_progress_to(work)
        processes.wait_for_everyone()
        yield work_folder.resumable(work)
    except BaseException as error:
        log_progress_to(None)
        if processes.is_main_process:
            work_folder.release(work)
        kept = work_folder.last_checkpoint(work)
        if isinstance(error, UserError) and kept is not None:
            said = "" if "checkpoint" in str(error) else f"; the last good checkpoint is {kept}"
            raise UserError(f"{error}{said}; to start with other settings, delete {work}") from None
        if work_folder.is_disk_full(error):
            again = "to start anew" if kept is None else f"to continue from {kept}"
            again = "to continue" if kept is None and work_folder.has_samples(work) else again
            raise UserError(
                f"{work}: no space left on the disk; free some, then give the same command again "
                f"{again}"
            ) from None
        raise


def _run_record(job: Job) -> dict[str, Any]:
    """Return the entries that must match to resume an interrupted run."""
    return {
        "model": job.model,
        "settings": identity(job.chosen),
        "data": {d.name: {"source": d.source, "sha256": d.sha256[:16]} for d in job.data},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def exists(model: str) -> bool:
    """Return True for a local folder or a possible hub name (`owner/name`).

    Raises:
        UserError: the folder holds GGUF files.
    """
    refuse_gguf(model)
    return Path(model).is_dir() or (model.count("/") == 1 and not model.startswith((".", "/")))


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
